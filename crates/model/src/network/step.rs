//! A step of generation on a GPU: one token of each sequence, in a few fused kernels a layer.
//!
//! The same function as the general graph, within rounding: products read each weight once, norms are split between
//! the product before and the product behind, and the convolution's step is done where its input is made. Prompts and
//! training, CPUs and f32 use the general graph.

use hognose_core::graph::Layout;
use hognose_core::ops::elementwise::{mul, silu};
use hognose_core::ops::gated_rms_norm::gated_rms_norm;
use hognose_core::ops::layout::{concat, split};
use hognose_core::ops::sample::{self, Sample};
use hognose_core::ops::scan_step::{self, ScanStep, scan_step};
use hognose_core::ops::ssd_step::{self, Gate, SsdStep, ssd_step};
use hognose_core::ops::step_embedding::step_embedding;
use hognose_core::ops::step_linear::{
    Conv, MOST_TOKENS, Residual, RowScale, StepLinear, Stream, step_linear, step_linear_conv, step_linear_residual,
};
use hognose_core::ops::swiglu::swiglu;
use hognose_core::{DType, Error, TensorId};

use super::{IDS, MAILBOX, MAILBOX_STEPS, OPTIONS, PROGRESS, Recorder, SEEN, SLOTS};
use crate::config::{LayerConfig, Mamba1Config, Mamba2Config, Mixer, ModelConfig, NormKind};
use crate::state::LayerState;
use crate::weights::Form;

/// Sequences for which fused products are always faster than the library's.
const FEW: usize = 16;
/// Channels of the mixer up to which they are for more sequences: beyond, tokens read again by every block cost more than
/// kernels saved. Measured on an H100 with 64: 1536 channels 1.7 times the library's speed, 2048 1.1, 4096 0.7.
const MOST_CHANNELS: usize = 2048;

/// Whether a step of `tokens` sequences has a graph of its own: on GPUs, in bf16 or q8_0, for RMSNorm and for widths in eights.
pub fn has_step(config: &ModelConfig, form: &Form, tokens: usize) -> bool {
    let eights = |n: usize| n.is_multiple_of(8);
    let fits = |layer: &LayerConfig| {
        let mixer = match &layer.mixer {
            Mixer::Mamba1(m) => eights(m.d_inner) && m.d_state <= scan_step::MOST && m.dt_rank <= scan_step::MOST,
            Mixer::Mamba2(m) => eights(m.d_inner) && m.d_state <= ssd_step::MOST,
            _ => false,
        };
        mixer && eights(layer.d_intermediate.unwrap_or(0))
    };
    matches!(form, Form::Inference(DType::BF16 | DType::Q8_0, Layout::Rows))
        && (1..=MOST_TOKENS).contains(&tokens)
        && (tokens <= FEW || config.layers.iter().all(|layer| layer.mixer.d_inner() <= MOST_CHANNELS))
        && config.norm == NormKind::RmsNorm
        && eights(config.d_model)
        && config.layers.iter().all(fits)
}

/// What a block reads: rows that are normalised, or lack a factor a row, and the residual stream.
#[derive(Clone, Copy)]
struct Input {
    x: TensorId,
    scale: Option<RowScale>,
    stream: TensorId,
}

impl Recorder<'_> {
    /// One token of each of `tokens` sequences, and the choice of the next, which takes its place. Without a graph of
    /// its own, a step is a pack of segments of one token, and every slot must have one.
    ///
    /// # Errors
    /// As [`Recorder::step_logits`].
    pub fn step_choice(&mut self, penalty: bool) -> Result<(), Error> {
        let (ids, logits) = if has_step(self.config, &self.form, self.tokens) {
            self.step()?
        } else {
            let hidden = self.hidden()?;
            let ids = self.graph.externals().iter().find(|e| e.name == IDS).map(|e| e.tensor);
            let missing = || Error::Plan("a step without ids".into());
            (ids.ok_or_else(missing)?, self.logits(hidden)?)
        };
        let rows = self.tokens;
        let words = self.config.padded_vocab.div_ceil(32);
        let mut external = |name, rows, cols| self.graph.external(name, DType::I32, rows, cols);
        let choice = Sample {
            logits,
            options: external(OPTIONS, rows, sample::OPTIONS),
            seen: penalty.then(|| external(SEEN, rows, words)),
            progress: external(PROGRESS, rows, sample::PROGRESS),
            ids,
            mailbox: external(MAILBOX, MAILBOX_STEPS, rows),
        };
        sample::sample(&mut self.graph, choice)
    }

    /// Logits `[tokens, padded vocabulary]` after one token of each of `tokens` sequences.
    ///
    /// # Errors
    /// Sizes that the ops refuse; [`has_step`] says beforehand whether they do.
    pub fn step_logits(&mut self) -> Result<TensorId, Error> {
        Ok(self.step()?.1)
    }

    /// The external with the ids, and the logits.
    fn step(&mut self) -> Result<(TensorId, TensorId), Error> {
        let ids = self.graph.external(IDS, DType::I32, 1, self.tokens);
        let slots = self.step_slots();
        let table = self.param("backbone.embedding.weight");
        let config = self.config;
        // Names of the norms in order: the one behind a block is folded into the block's last product.
        let mut norms = Vec::new();
        for (i, layer) in config.layers.iter().enumerate() {
            norms.push(format!("backbone.layers.{i}.norm"));
            if layer.d_intermediate.is_some() {
                norms.push(format!("backbone.layers.{i}.norm2"));
            }
        }
        norms.push("backbone.norm_f".to_string());
        let norm_weight = self.param(&format!("{}.weight", norms[0]));
        let stream = step_embedding(&mut self.graph, ids, table, norm_weight)?;
        let mut input = self.step_input(stream);
        let mut next = norms[1..].iter();
        for (i, layer) in config.layers.iter().enumerate() {
            let name = format!("backbone.layers.{i}");
            let widths = LayerState::of(layer);
            let (y, scale) = match &layer.mixer {
                Mixer::Mamba1(m) => (self.mamba1_step(i, &name, m, &widths, input, slots)?, None),
                Mixer::Mamba2(m) => self.mamba2_step(i, &name, m, &widths, input, slots)?,
                other => {
                    let message = format!("{} has no fused step", other.kind());
                    return Err(Error::Unsupported { op: "step", message });
                }
            };
            input = self.step_residual(y, scale, &format!("{name}.mixer.out_proj"), input.stream, next.next())?;
            if layer.d_intermediate.is_some() {
                let product = self.step_product(input, &format!("{name}.mlp.fc1"));
                let y_gate = step_linear(&mut self.graph, product)?;
                let gated = swiglu(&mut self.graph, y_gate)?;
                input = self.step_residual(gated, None, &format!("{name}.mlp.fc2"), input.stream, next.next())?;
            }
        }
        // The library reads the largest matrix once for all sequences.
        if self.tokens > FEW && self.form == Form::Inference(DType::BF16, Layout::Rows) {
            let (normed, _) = self.norm("backbone.norm_f", input.stream, None)?;
            return Ok((ids, self.logits(normed)?));
        }
        let weight = self.output_matrix();
        let product = StepLinear::new(input.x, weight, None);
        let product = StepLinear { scale: input.scale, dtype: DType::F32, ..product };
        Ok((ids, step_linear(&mut self.graph, product)?))
    }

    /// Which states the tokens continue, where there are more sequences than tokens.
    fn step_slots(&mut self) -> Option<TensorId> {
        (self.tokens != self.segment_count).then(|| self.graph.external(SLOTS, DType::I32, 1, self.tokens))
    }

    fn step_product(&mut self, input: Input, name: &str) -> StepLinear {
        let weight = self.param(&format!("{name}.weight"));
        let bias = self.optional_param(&format!("{name}.bias"));
        StepLinear { scale: input.scale, ..StepLinear::new(input.x, weight, bias) }
    }

    /// The product that is added to the residual stream, ready for the block whose norm is `next`.
    fn step_residual(
        &mut self,
        x: TensorId,
        scale: Option<RowScale>,
        name: &str,
        residual: TensorId,
        next: Option<&String>,
    ) -> Result<Input, Error> {
        let product = self.step_product(Input { x, scale, stream: residual }, name);
        let norm = next.map_or("backbone.norm_f", String::as_str);
        let norm_weight = self.param(&format!("{norm}.weight"));
        let out = step_linear_residual(&mut self.graph, product, Residual { residual, norm_weight })?;
        Ok(self.step_input(out))
    }

    fn step_input(&self, made: Stream) -> Input {
        let scale = RowScale { squares: made.squares, width: self.config.d_model, eps: self.config.norm_eps };
        Input { x: made.weighted, scale: Some(scale), stream: made.stream }
    }

    /// The input projection with a step of the convolution on `conv.0` columns from `conv.1` on.
    fn step_in_proj(
        &mut self,
        (layer, name): (usize, &str),
        (first, width): (usize, usize),
        input: Input,
        slots: Option<TensorId>,
    ) -> Result<TensorId, Error> {
        let product = self.step_product(input, &format!("{name}.mixer.in_proj"));
        let weight = self.param(&format!("{name}.mixer.conv1d.weight"));
        let bias = self.optional_param(&format!("{name}.mixer.conv1d.bias"));
        let state = self.step_state(layer, "conv", width);
        step_linear_conv(&mut self.graph, StepLinear { slots, ..product }, Conv { first, weight, bias, state })
    }

    fn step_state(&mut self, layer: usize, part: &str, width: usize) -> TensorId {
        self.graph.external(super::state_name(layer, part, false), DType::F32, self.segment_count, width)
    }

    fn mamba1_step(
        &mut self,
        layer: usize,
        name: &str,
        m: &Mamba1Config,
        widths: &LayerState,
        input: Input,
        slots: Option<TensorId>,
    ) -> Result<TensorId, Error> {
        let xz = self.step_in_proj((layer, name), (0, widths.width("conv")), input, slots)?;
        let parts = split(&mut self.graph, xz, &[m.d_inner, m.d_inner])?;
        let (x, z) = (parts[0], parts[1]);
        let weight = self.param(&format!("{name}.mixer.x_proj.weight"));
        let product = StepLinear { dtype: DType::F32, ..StepLinear::new(x, weight, None) };
        let dt_b_c = step_linear(&mut self.graph, product)?;
        let step = ScanStep {
            x,
            z,
            dt_b_c,
            norm_eps: m.dt_b_c_rms,
            dt_weight: self.param(&format!("{name}.mixer.dt_proj.weight")),
            dt_bias: Some(self.param(&format!("{name}.mixer.dt_proj.bias"))),
            a: self.transition(name)?,
            d: Some(self.param(&format!("{name}.mixer.D"))),
            state: self.step_state(layer, "ssm", widths.width("ssm")),
            slots,
        };
        scan_step(&mut self.graph, step)
    }

    fn mamba2_step(
        &mut self,
        layer: usize,
        name: &str,
        m: &Mamba2Config,
        widths: &LayerState,
        input: Input,
        slots: Option<TensorId>,
    ) -> Result<(TensorId, Option<RowScale>), Error> {
        let (mlp, bc) = (m.d_mlp(), m.ngroups * m.d_state);
        let projected = self.step_in_proj((layer, name), (2 * mlp + m.d_ssm, widths.width("conv")), input, slots)?;
        let parts = split(&mut self.graph, projected, &[mlp, mlp, m.d_ssm, m.d_ssm, bc, bc, m.nheads()])?;
        let z = parts[2];
        // The factor of the norm belongs to whole rows only where the norm does.
        let folded = m.rmsnorm && m.ngroups == 1 && mlp == 0;
        let norm = if m.rmsnorm { Some(self.param(&format!("{name}.mixer.norm.weight"))) } else { None };
        let gate = match norm {
            None => Gate::Silu(z),
            Some(_) if !folded => Gate::None,
            Some(weight) if m.norm_before_gate => Gate::NormThenSilu(z, weight),
            Some(weight) => Gate::SiluThenNorm(z, weight),
        };
        let step = SsdStep {
            x: parts[3],
            dt: parts[6],
            a: self.transition(name)?,
            b: parts[4],
            c: parts[5],
            d: Some(self.param(&format!("{name}.mixer.D"))),
            dt_bias: Some(self.param(&format!("{name}.mixer.dt_bias"))),
            dt_limit: m.dt_limit,
            headdim: m.headdim,
            d_state: m.d_state,
            gate,
            state: self.step_state(layer, "ssm", widths.width("ssm")),
            slots,
        };
        let (mut y, squares) = ssd_step(&mut self.graph, step)?;
        if let Some(squares) = squares {
            return Ok((y, Some(RowScale { squares, width: m.d_ssm, eps: self.config.norm_eps })));
        }
        if norm.is_some() {
            let (group, eps) = (m.d_ssm / m.ngroups, self.config.norm_eps);
            y = gated_rms_norm(&mut self.graph, y, z, norm, group, eps, m.norm_before_gate)?;
        }
        if mlp > 0 {
            let gate = silu(&mut self.graph, parts[0])?;
            let gated = mul(&mut self.graph, gate, parts[1])?;
            y = concat(&mut self.graph, &[gated, y])?;
        }
        Ok((y, None))
    }
}
