//! The kinds of mixers by name, one file a family: sizes that follow from a model's width, what is checked of them, states
//! and parameters.

mod attention;
mod gated_conv;
mod lti;
mod mamba;
mod rnn;
mod s6;
mod vim;

pub use attention::AttentionConfig;
pub use gated_conv::GatedConvConfig;
pub use lti::{Diagonal, Discretization, H3Config, S4Config, S4dConfig};
pub use rnn::{GruConfig, LstmConfig, RnnConfig};
pub use s6::{Choice, InputRule, S6Config, Transition};
pub use vim::VimConfig;

use crate::config::{ConfigError, Mamba1Config, Mamba2Config, Mixer, ParamSpec};

/// What a kind of mixer says of itself.
pub(crate) trait Kind {
    /// Its name in patterns and configurations.
    fn name(&self) -> &'static str;

    /// Channels of the mixer, the input width of `out_proj`.
    fn d_inner(&self) -> usize;

    /// Sets the channels, where they may be chosen.
    fn set_d_inner(&mut self, _d_inner: usize) {}

    /// Takes the usual sizes for another width of the model.
    fn resize(&mut self, old: usize, new: usize);

    /// The parts of its state and their numbers, in the order of memory (see [`crate::state::LayerState`]).
    fn state(&self) -> Vec<(&'static str, usize)>;

    /// Checks its sizes.
    fn validate(&self, check: &Check) -> Result<(), ConfigError>;

    /// Appends its parameters; those that write into the residual stream are scaled.
    fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>);
}

impl Mixer {
    /// The names of all kinds, as in patterns and configurations.
    pub const KINDS: [&str; 11] =
        ["mamba1", "mamba2", "attention", "s6", "s4d", "s4", "h3", "gated_conv", "lstm", "gru", "vim"];

    /// A mixer of a kind with the usual sizes in a model of width `d_model`, if the kind exists.
    pub fn of_kind(kind: &str, d_model: usize) -> Option<Mixer> {
        Some(match kind {
            "mamba1" => Mixer::Mamba1(Mamba1Config::of_width(d_model)),
            "mamba2" => Mixer::Mamba2(Mamba2Config::of_width(d_model)),
            "attention" => Mixer::Attention(AttentionConfig::of_width(d_model)),
            "s6" => Mixer::S6(S6Config::of_width(d_model)),
            "s4d" => Mixer::S4d(S4dConfig::of_width(d_model)),
            "s4" => Mixer::S4(S4Config::of_width(d_model)),
            "h3" => Mixer::H3(H3Config::of_width(d_model)),
            "gated_conv" => Mixer::GatedConv(GatedConvConfig::of_width(d_model)),
            "lstm" => Mixer::Lstm(LstmConfig::of_width(d_model)),
            "gru" => Mixer::Gru(GruConfig::of_width(d_model)),
            "vim" => Mixer::Vim(VimConfig::of_width(d_model)),
            _ => return None,
        })
    }

    fn get(&self) -> &dyn Kind {
        match self {
            Mixer::Mamba1(m) => m,
            Mixer::Mamba2(m) => m,
            Mixer::Attention(m) => m,
            Mixer::S6(m) => m,
            Mixer::S4d(m) => m,
            Mixer::S4(m) => m,
            Mixer::H3(m) => m,
            Mixer::GatedConv(m) => m,
            Mixer::Lstm(m) => m,
            Mixer::Gru(m) => m,
            Mixer::Vim(m) => m,
        }
    }

    fn get_mut(&mut self) -> &mut dyn Kind {
        match self {
            Mixer::Mamba1(m) => m,
            Mixer::Mamba2(m) => m,
            Mixer::Attention(m) => m,
            Mixer::S6(m) => m,
            Mixer::S4d(m) => m,
            Mixer::S4(m) => m,
            Mixer::H3(m) => m,
            Mixer::GatedConv(m) => m,
            Mixer::Lstm(m) => m,
            Mixer::Gru(m) => m,
            Mixer::Vim(m) => m,
        }
    }

    /// The name of its kind.
    pub fn kind(&self) -> &'static str {
        self.get().name()
    }

    /// Channels of the mixer, the input width of `out_proj`.
    pub fn d_inner(&self) -> usize {
        self.get().d_inner()
    }

    /// Sets the channels of the mixer, where they may be chosen.
    pub fn set_d_inner(&mut self, d_inner: usize) {
        self.get_mut().set_d_inner(d_inner);
    }

    /// The same kind with the usual sizes for another width of the model; a Mamba keeps what does not depend on it.
    pub fn resize(&mut self, old: usize, new: usize) {
        self.get_mut().resize(old, new);
    }

    /// Whether a token's result depends on no token after it.
    pub fn is_causal(&self) -> bool {
        !matches!(self, Mixer::Vim(_))
    }

    pub(crate) fn state(&self) -> Vec<(&'static str, usize)> {
        self.get().state()
    }

    pub(crate) fn validate(&self, check: &Check) -> Result<(), ConfigError> {
        self.get().validate(check)
    }

    pub(crate) fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>) {
        self.get().parameters(d_model, out_scale, all);
    }
}

/// Checks of a layer's sizes; messages name the layer and the size.
pub(crate) struct Check {
    pub(crate) layer: usize,
}

impl Check {
    pub(crate) fn what(&self, what: &str) -> String {
        format!("layer {}: {what}", self.layer)
    }

    pub(crate) fn size(&self, what: &str, found: usize, min: usize, max: usize) -> Result<(), ConfigError> {
        crate::config::size(|| self.what(what), found, min, max)
    }

    pub(crate) fn positive(&self, sizes: &[(&str, usize)]) -> Result<(), ConfigError> {
        sizes.iter().try_for_each(|&(what, found)| crate::config::positive(|| self.what(what), found))
    }

    pub(crate) fn multiple(
        &self,
        (what, value): (&str, usize),
        (of, divisor): (&str, usize),
    ) -> Result<(), ConfigError> {
        crate::config::multiple(self.layer, what, value, of, divisor)
    }

    pub(crate) fn number(
        &self,
        what: &str,
        found: f32,
        holds: bool,
        expected: &'static str,
    ) -> Result<(), ConfigError> {
        if holds { Ok(()) } else { Err(ConfigError::Number { what: self.what(what), found, expected }) }
    }
}

/// As many times the new width of the model as it was of the old one.
fn expanded(d_inner: usize, old: usize, new: usize) -> usize {
    (d_inner / old.max(1)).max(1) * new
}
