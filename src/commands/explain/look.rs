//! What a trained model does while it reads a text: for `selection` and `ssd`.

use anyhow::Context;
use hognose::{DType, LoadOptions, Loaded, Tokenizer};
use hognose_model::config::Mixer;
use hognose_model::observe::{Observed, observe};
use hognose_theory::nalgebra::DMatrix;

use crate::args::{ExplainArgs, Usage};

// A model of bytes that was trained for this; see demo/README.md.
static WEIGHTS: &[u8] = include_bytes!("demo/model.safetensors");
static CONFIG: &[u8] = include_bytes!("demo/config.json");

/// Tokens of a text at most: heat maps have a cell for each, or for each pair.
const LONGEST: usize = 512;

/// A model that has read a text.
pub struct Reading {
    /// What the model is, in words.
    pub model: String,
    /// The tokens as texts, with visible blanks.
    pub pieces: Vec<String>,
    /// The recurrences, by layer; layers without one are left out.
    pub layers: Vec<Layer>,
}

/// The recurrence of a layer. A *unit* has a Δ of its own: a head of Mamba-2, a channel of Mamba-1.
pub struct Layer {
    /// Its number in the model.
    pub number: usize,
    /// Units, their width P, state size N, and units that share B and C.
    pub units: usize,
    width: usize,
    states: usize,
    shared: usize,
    /// Δ `[T, units]`, after bias, softplus and limits.
    pub delta: Vec<f64>,
    /// A: `[units, 1]` for Mamba-2, whose states decay alike, `[units, N]` for Mamba-1.
    a: Vec<f64>,
    /// `[T, units · P]`
    x: Vec<f64>,
    /// `[T, groups · N]`
    b: Vec<f64>,
    c: Vec<f64>,
    y: Vec<f64>,
    /// The gate of y, where the recurrence has one.
    z: Option<Vec<f64>>,
    /// The skip connection: a value a unit or a channel.
    d: Vec<f64>,
}

/// Reads `--text` (or `text`) with `--model` (or the small one that ships).
///
/// # Errors
/// A model that cannot be loaded or has no tokenizer, a text that is empty or too long.
pub fn read(args: &ExplainArgs, text: &str) -> anyhow::Result<Reading> {
    let text = args.text.as_deref().unwrap_or(text);
    let (name, loaded) = load(args)?;
    let Some(tokenizer) = &loaded.tokenizer else {
        return Err(Usage(format!("{name} has no tokenizer.json, which --text needs; put one into its folder")).into());
    };
    let mut ids = tokenizer.encode(text.as_bytes(), true)?;
    if ids.is_empty() || ids.len() > LONGEST {
        return Err(Usage(format!("the text has {} tokens; expected 1 to {LONGEST}", ids.len())).into());
    }
    let mut pieces =
        ids.iter().map(|&id| Ok(visible(&tokenizer.decode(&[id])?))).collect::<anyhow::Result<Vec<_>>>()?;
    for id in loaded.start() {
        ids.insert(0, id);
        pieces.insert(0, "·".into());
    }
    let observed = observe(&loaded.model, &ids)?;
    let mut layers = Vec::new();
    for (number, (tensors, config)) in observed.iter().zip(&loaded.model.config.layers).enumerate() {
        if !tensors.is_empty() {
            layers.push(Layer::new(number, tensors, &config.mixer, &loaded)?);
        }
    }
    anyhow::ensure!(!layers.is_empty(), "{name} has no selective layers to look into");
    let model = format!("{name} ({} parameters)", crate::terminal::thousands(loaded.model.config.parameter_count()));
    Ok(Reading { model, pieces, layers })
}

fn load(args: &ExplainArgs) -> anyhow::Result<(String, Loaded)> {
    let options = |dtype| -> anyhow::Result<LoadOptions> {
        Ok(LoadOptions { device: Some(args.compute.device()?), dtype: Some(dtype), tokenizer: None })
    };
    if let Some(model) = &args.model {
        let dtype = args.compute.dtype.map_or(DType::F32, |d| d.dtype());
        let loaded = hognose::load(model, &options(dtype)?).map_err(anyhow::Error::from_boxed)?;
        return Ok((model.clone(), loaded));
    }
    // Checkpoints are folders.
    let folder = tempfile::tempdir().context("cannot make a temporary folder for the model that ships")?;
    for (name, bytes) in [("model.safetensors", WEIGHTS), ("config.json", CONFIG)] {
        std::fs::write(folder.path().join(name), bytes).context("cannot write the model that ships")?;
    }
    let path = folder.path().to_string_lossy().into_owned();
    let mut loaded = hognose::load(&path, &options(DType::F32)?).map_err(anyhow::Error::from_boxed)?;
    loaded.tokenizer = Some(Tokenizer::Bytes);
    Ok(("the small Mamba-2 that ships".into(), loaded))
}

/// A token's text with blanks that can be seen.
fn visible(piece: &str) -> String {
    let shown = |c: char| match c {
        ' ' => '␣',
        '\n' => '⏎',
        c if c.is_control() => '·',
        c => c,
    };
    if piece.is_empty() { "·".into() } else { piece.chars().map(shown).collect() }
}

impl Layer {
    fn new(
        number: usize,
        tensors: &std::collections::BTreeMap<&'static str, Observed>,
        mixer: &Mixer,
        loaded: &Loaded,
    ) -> anyhow::Result<Layer> {
        let tensor = |name: &str| -> anyhow::Result<(usize, Vec<f64>)> {
            let found = tensors.get(name).with_context(|| format!("layer {number} shows no {name}"))?;
            Ok((found.cols, found.values.iter().map(|&v| v.into()).collect()))
        };
        let parameter = |name: &str| -> anyhow::Result<Vec<f64>> {
            let name = format!("backbone.layers.{number}.mixer.{name}");
            let weights = &loaded.model.weights;
            let found = weights.entries().find(|(_, spec)| spec.name == name);
            let (offset, spec) = found.with_context(|| format!("the model has no {name}"))?;
            Ok(weights.buffer().to_vec::<f32>(offset, spec.numel()).into_iter().map(f64::from).collect())
        };
        let (bias, states, limit) = if let Mixer::Mamba1(m) = mixer {
            (parameter("dt_proj.bias")?, m.d_state, (0.0, f64::INFINITY))
        } else if let Mixer::Mamba2(m) = mixer {
            (parameter("dt_bias")?, m.d_state, (m.dt_limit.0.into(), m.dt_limit.1.into()))
        } else {
            anyhow::bail!("layer {number} is of a kind that explain does not know");
        };
        let (units, dt) = tensor("dt")?;
        let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
        let delta = |(i, dt): (usize, &f64)| softplus(dt + bias[i % units]).clamp(limit.0, limit.1);
        let (channels, x) = tensor("x")?;
        let (columns, b) = tensor("B")?;
        Ok(Layer {
            number,
            units,
            width: channels / units,
            states,
            shared: units / (columns / states),
            delta: dt.iter().enumerate().map(delta).collect(),
            // In the form for inference A_log is A.
            a: parameter("A_log")?,
            x,
            b,
            c: tensor("C")?.1,
            y: tensor("y")?.1,
            z: tensors.contains_key("z").then(|| tensor("z")).transpose()?.map(|z| z.1),
            d: parameter("D")?,
        })
    }

    /// Number of tokens.
    pub fn steps(&self) -> usize {
        self.delta.len() / self.units
    }

    /// What a unit is called.
    pub fn unit(&self) -> &'static str {
        if self.width == 1 { "channel" } else { "head" }
    }

    /// Δ of a unit at every token.
    pub fn deltas(&self, unit: usize) -> Vec<f64> {
        self.delta.iter().skip(unit).step_by(self.units).copied().collect()
    }

    /// The matrix M of a unit with y = M x + D x: M_ts = Σ_n C_t[n] exp(A_n (Δ_(s+1) + … + Δ_t)) Δ_s B_s[n].
    pub fn attention(&self, unit: usize) -> DMatrix<f64> {
        let (steps, groups) = (self.steps(), self.units / self.shared);
        let at = |values: &[f64], t: usize, n: usize| values[(t * groups + unit / self.shared) * self.states + n];
        let deltas = self.deltas(unit);
        let mut sums = deltas.clone();
        for t in 1..steps {
            sums[t] += sums[t - 1];
        }
        let decays = self.a.len() / self.units;
        let mut m = DMatrix::zeros(steps, steps);
        for t in 0..steps {
            for s in 0..=t {
                let past = sums[t] - sums[s];
                let term = |n: usize| {
                    let a = self.a[unit * decays + n % decays];
                    at(&self.c, t, n) * (a * past).exp() * at(&self.b, s, n)
                };
                m[(t, s)] = deltas[s] * (0..self.states).map(term).sum::<f64>();
            }
        }
        m
    }

    /// How far M x + D x is from what the layer computed, over all outputs of a unit, by the largest of them.
    pub fn off(&self, unit: usize, m: &DMatrix<f64>) -> f64 {
        let (steps, channels) = (self.steps(), self.units * self.width);
        let (mut off, mut largest) = (0.0f64, f64::MIN_POSITIVE);
        for channel in unit * self.width..(unit + 1) * self.width {
            let skip = self.d[channel * self.d.len() / channels];
            for t in 0..steps {
                let x = |s: usize| self.x[s * channels + channel];
                let mut y = (0..=t).map(|s| m[(t, s)] * x(s)).sum::<f64>() + skip * x(t);
                if let Some(z) = &self.z {
                    let gate = z[t * channels + channel];
                    y *= gate / (1.0 + (-gate).exp());
                }
                let found = self.y[t * channels + channel];
                off = if found.is_nan() { f64::INFINITY } else { off.max((found - y).abs()) };
                largest = largest.max(y.abs());
            }
        }
        off / largest
    }
}
