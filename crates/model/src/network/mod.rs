//! The model as a function that writes a graph: layers of `x + mixer(norm(x))`, each perhaps followed by
//! `x + mlp(norm2(x))`, on a pack of tokens.

mod attention;
mod gated_conv;
mod lti;
mod mamba1;
mod mamba2;
mod mlp;
mod rnn;
mod s6;
mod step;
mod vim;

pub use step::has_step;

use std::collections::BTreeMap;

use hognose_core::ops::cross_entropy::{self, CrossEntropy};
use hognose_core::ops::dropout::dropout;
use hognose_core::ops::embedding::embedding;
use hognose_core::ops::gather_rows::gather_rows;
use hognose_core::ops::linear::{linear, linear_to};
use hognose_core::ops::norm::{layer_norm_to, rms_norm_to};
use hognose_core::{DType, Error, Graph, TensorId};

use crate::config::{Mixer, ModelConfig, NormKind, ParamSpec};
use crate::mixers::Discretization;
use crate::state::LayerState;
use crate::weights::{Form, ROUNDED, matrix_shape};

/// Name of the external with the token ids, i32 `[1, tokens]`.
pub const IDS: &str = "ids";
/// Name of the external with the segment offsets, i32 `[1, segments + 1]`.
pub const SEGMENTS: &str = "segments";
/// Name of the external with the targets, i32 `[1, tokens]`; −1 where nothing is to be predicted.
pub const TARGETS: &str = "targets";
/// Name of the external with the loss's scale, f32 `[1, 1]`: one over the number of predicted tokens.
pub const LOSS_SCALE: &str = "loss_scale";
/// Name of the external with the seed of dropout and the rows before the first one, i32 `[1, 3]`.
pub const DROPOUT_SEED: &str = "dropout_seed";
/// Name of the external with the rows whose logits are wanted, i32 `[1, rows]`.
pub const ROWS: &str = "rows";
/// Name of the external with the slots that the tokens of a step continue, i32 `[1, tokens]`.
pub const SLOTS: &str = "slots";
/// Names of the externals of a choice: how each sequence chooses, which ids occurred, how far it is, and where chosen
/// ids are left (see [`hognose_core::ops::sample`]).
pub const OPTIONS: &str = "options";
pub const SEEN: &str = "seen";
pub const PROGRESS: &str = "progress";
pub const MAILBOX: &str = "mailbox";
/// Steps whose ids the mailbox holds.
pub const MAILBOX_STEPS: usize = 64;

/// Name of the external with a layer's state: the state that segments start from, and the one they end with.
pub fn state_name(layer: usize, part: &str, end: bool) -> String {
    format!("state.{layer}.{part}.{}", if end { "end" } else { "start" })
}

/// Name of the external with a tensor inside of a layer (see [`Recorder::observing`]).
pub fn observed_name(layer: usize, what: &str) -> String {
    format!("observed.{layer}.{what}")
}

/// What happens to the states of a pack's segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum States {
    /// Every segment starts from zero; final states are dropped.
    None,
    /// Segment s starts from row s of the state externals and its final state replaces it there.
    InPlace,
    /// Segment s starts from row s of the start states; final states go to the end states (training keeps the start
    /// for the backward pass).
    Carried,
}

/// Writes a model's ops into a graph for a pack of `tokens` rows in `segments` segments.
pub struct Recorder<'a> {
    /// What was recorded so far.
    pub graph: Graph,
    config: &'a ModelConfig,
    form: Form,
    specs: BTreeMap<String, ParamSpec>,
    params: BTreeMap<String, TensorId>,
    tokens: usize,
    segment_count: usize,
    segments: TensorId,
    states: States,
    dropout: Option<Dropout>,
    observed: bool,
}

struct Dropout {
    probability: f32,
    seed: TensorId,
    uses: u32,
}

impl<'a> Recorder<'a> {
    /// Starts a graph. `form` says how the parameters lie in memory.
    pub fn new(config: &'a ModelConfig, form: &Form, tokens: usize, segments: usize, states: States) -> Recorder<'a> {
        let mut graph = Graph::new();
        if *form == Form::TrainingRounded {
            graph.round_products();
        }
        let offsets = graph.external(SEGMENTS, DType::I32, 1, segments + 1);
        let specs = config.parameters().into_iter().map(|p| (p.name.clone(), p)).collect();
        Recorder {
            graph,
            config,
            form: form.clone(),
            specs,
            params: BTreeMap::new(),
            tokens,
            segment_count: segments,
            segments: offsets,
            states,
            dropout: None,
            observed: false,
        }
    }

    /// Makes what goes into and comes out of each layer's recurrence an output of the graph, named by
    /// [`observed_name`]: `x`, `dt` (before bias and softplus), `B`, `C`, `y`, and `z` where the recurrence gates y.
    pub fn observing(mut self) -> Self {
        self.observed = true;
        self
    }

    fn observe(&mut self, layer: usize, tensors: &[(&str, TensorId)]) -> Result<(), Error> {
        for &(what, t) in tensors.iter().filter(|_| self.observed) {
            self.graph.output(observed_name(layer, what), t)?;
        }
        Ok(())
    }

    /// Applies dropout with this probability to what each mixer and MLP adds to the residual stream.
    pub fn with_dropout(mut self, probability: f32) -> Self {
        if probability > 0.0 {
            let seed = self.graph.external(DROPOUT_SEED, DType::I32, 1, 3);
            self.dropout = Some(Dropout { probability, seed, uses: 0 });
        }
        self
    }

    /// The parameters used so far, by canonical name.
    pub fn params(&self) -> &BTreeMap<String, TensorId> {
        &self.params
    }

    /// The external tensor of a parameter.
    fn param(&mut self, name: &str) -> TensorId {
        if let Some(&t) = self.params.get(name) {
            return t;
        }
        let spec = &self.specs[name];
        let (rows, cols) = matrix_shape(&spec.shape);
        let (dtype, layout) = self.form.read_as(spec, self.config);
        let rounded = dtype != self.form.of(spec, self.config).0;
        let external = if rounded { format!("{ROUNDED}{name}") } else { name.to_string() };
        let t = self.graph.external_with_layout(external, dtype, rows, cols, layout);
        self.params.insert(name.to_string(), t);
        t
    }

    fn optional_param(&mut self, name: &str) -> Option<TensorId> {
        self.specs.contains_key(name).then(|| self.param(name))
    }

    /// A = −exp(A_log): computed in the graph for training, once at loading for inference.
    fn transition(&mut self, layer: &str) -> Result<TensorId, Error> {
        let a_log = self.param(&format!("{layer}.mixer.A_log"));
        match &self.form {
            Form::Training(_) | Form::TrainingRounded => {
                hognose_core::ops::elementwise::neg_exp(&mut self.graph, a_log)
            }
            Form::Inference(..) | Form::Stored(..) => Ok(a_log),
        }
    }

    fn linear(&mut self, x: TensorId, name: &str) -> Result<TensorId, Error> {
        let weight = self.param(&format!("{name}.weight"));
        let bias = self.optional_param(&format!("{name}.bias"));
        linear(&mut self.graph, x, weight, bias)
    }

    /// Norm of `x` + the residual stream; returns (normed, new residual stream).
    fn norm(&mut self, name: &str, x: TensorId, residual: Option<TensorId>) -> Result<(TensorId, TensorId), Error> {
        let weight = self.param(&format!("{name}.weight"));
        let (eps, dtype) = (self.config.norm_eps, self.form.activations());
        let out = match self.config.norm {
            NormKind::RmsNorm => rms_norm_to(&mut self.graph, x, residual, Some(weight), eps, dtype)?,
            NormKind::LayerNorm => {
                let bias = self.param(&format!("{name}.bias"));
                layer_norm_to(&mut self.graph, x, residual, [weight, bias], eps, dtype)?
            }
        };
        Ok((out.y, out.residual))
    }

    fn drop(&mut self, x: TensorId) -> Result<TensorId, Error> {
        match &mut self.dropout {
            None => Ok(x),
            Some(d) => {
                d.uses += 1;
                dropout(&mut self.graph, x, d.probability, d.seed, d.uses)
            }
        }
    }

    /// The state externals of a layer's part (`conv` or `ssm`), `width` elements a segment: where segments start from,
    /// and where their final state goes.
    fn state(&mut self, layer: usize, part: &str, width: usize) -> (Option<TensorId>, Option<TensorId>) {
        let mut external =
            |end| self.graph.external(state_name(layer, part, end), DType::F32, self.segment_count, width);
        match self.states {
            States::None => (None, None),
            States::InPlace => {
                let t = external(false);
                (Some(t), Some(t))
            }
            States::Carried => (Some(external(false)), Some(external(true))),
        }
    }

    fn store_state(&mut self, state: TensorId, dest: Option<TensorId>) -> Result<(), Error> {
        match dest {
            Some(dest) => self.graph.store(state, dest).map(drop),
            None => Ok(()),
        }
    }

    /// The hidden vectors after the last norm, `[tokens, d_model]`.
    pub fn hidden(&mut self) -> Result<TensorId, Error> {
        let ids = self.graph.external(IDS, DType::I32, 1, self.tokens);
        let table = self.param("backbone.embedding.weight");
        let mut x = embedding(&mut self.graph, ids, table)?;
        let mut residual = None;
        let config = self.config;
        for (i, layer) in config.layers.iter().enumerate() {
            self.graph.begin_region();
            let name = format!("backbone.layers.{i}");
            let (normed, stream) = self.norm(&format!("{name}.norm"), x, residual)?;
            let widths = LayerState::of(layer);
            x = match &layer.mixer {
                Mixer::Mamba1(m) => self.mamba1(i, &name, m, &widths, normed)?,
                Mixer::Mamba2(m) => self.mamba2(i, &name, m, &widths, normed)?,
                Mixer::Attention(m) => self.attention(i, &name, m, &widths, normed)?,
                Mixer::S6(m) => self.s6(i, &name, m, &widths, normed)?,
                Mixer::S4d(m) => self.s4(i, &name, m.discretization, &widths, normed)?,
                Mixer::S4(_) => self.s4(i, &name, Discretization::Bilinear, &widths, normed)?,
                Mixer::H3(m) => self.h3(i, &name, m, &widths, normed)?,
                Mixer::GatedConv(m) => self.gated_conv(i, &name, m, &widths, normed)?,
                Mixer::Lstm(m) => self.rnn(i, &name, m, &widths, normed)?,
                Mixer::Gru(m) => self.rnn(i, &name, m, &widths, normed)?,
                Mixer::Vim(m) => self.vim(&name, m, normed)?,
            };
            x = self.drop(x)?;
            residual = Some(stream);
            if layer.d_intermediate.is_some() {
                let (normed, stream) = self.norm(&format!("{name}.norm2"), x, residual)?;
                x = self.mlp(&name, normed)?;
                x = self.drop(x)?;
                residual = Some(stream);
            }
            self.graph.end_region();
        }
        Ok(self.norm("backbone.norm_f", x, residual)?.0)
    }

    /// The hidden vectors of `rows` chosen rows.
    pub fn gather(&mut self, hidden: TensorId, rows: usize) -> Result<TensorId, Error> {
        let index = self.graph.external(ROWS, DType::I32, 1, rows);
        gather_rows(&mut self.graph, hidden, index)
    }

    /// The output matrix `[padded vocabulary, d_model]`: the embedding where it is tied.
    pub fn output_matrix(&mut self) -> TensorId {
        let name = if self.config.tie_embeddings { "backbone.embedding.weight" } else { "lm_head.weight" };
        self.param(name)
    }

    /// Logits of hidden vectors, `[rows, padded vocabulary]`.
    pub fn logits(&mut self, hidden: TensorId) -> Result<TensorId, Error> {
        let weight = self.output_matrix();
        linear_to(&mut self.graph, hidden, weight, None, DType::F32)
    }

    /// Cross-entropy of the next tokens, without ever holding all logits.
    pub fn loss(&mut self, hidden: TensorId, with_gradient: bool) -> Result<cross_entropy::Outputs, Error> {
        let targets = self.graph.external(TARGETS, DType::I32, 1, self.tokens);
        let scale = self.graph.external(LOSS_SCALE, DType::F32, 1, 1);
        let weight = self.output_matrix();
        let inputs = CrossEntropy { h: hidden, weight, targets, scale, with_gradient };
        cross_entropy::cross_entropy(&mut self.graph, inputs)
    }
}
