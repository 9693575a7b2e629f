//! The kinds of mixers by name, with the sizes that follow from a model's width; and what those are made of that no
//! published checkpoint format knows.

use hognose_core::ops::attention::POSITION;
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, Mamba1Config, Mamba2Config, Mixer, ParamSpec, linear, number};

/// Grouped causal attention in a window, with rotary positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionConfig {
    /// Query heads, H.
    pub heads: usize,
    /// Key and value heads, G; divides H.
    pub kv_heads: usize,
    /// Numbers of a head, P.
    pub headdim: usize,
    /// Tokens that a token sees, itself among them. Decides the size of the state.
    pub window: usize,
    /// Numbers of a head that turn with the position: an even number, 0 for none; the whole head where it is not given.
    #[serde(default)]
    pub rotary_dims: Option<usize>,
    /// The slowest angle is about one over this.
    #[serde(with = "number")]
    pub rotary_base: f32,
    /// Bias on `in_proj` and `out_proj`.
    pub bias: bool,
}

impl AttentionConfig {
    /// mamba-ssm's and Llama's habits: heads of about 64, all of a head turns.
    fn of_width(d_model: usize) -> AttentionConfig {
        let heads = (d_model / 64).max(1);
        let headdim = d_model / heads;
        AttentionConfig {
            heads,
            kv_heads: heads,
            headdim,
            window: 1024,
            rotary_dims: None,
            rotary_base: 1e4,
            bias: false,
        }
    }

    /// Numbers of a head that turn.
    pub fn rotary(&self) -> usize {
        self.rotary_dims.unwrap_or(self.headdim)
    }

    fn validate(&self, check: &Check) -> Result<(), ConfigError> {
        check.positive(&[
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("headdim", self.headdim),
            ("window", self.window),
        ])?;
        check.multiple(("heads", self.heads), ("kv_heads", self.kv_heads))?;
        check.size("rotary_dims", self.rotary(), 0, self.headdim)?;
        check.multiple(("rotary_dims", self.rotary()), ("a pair", 2))?;
        check.number("rotary_base", self.rotary_base, self.rotary_base > 1.0 && self.rotary_base.is_finite(), "above 1")
    }

    fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>) {
        let rows = (self.heads + 2 * self.kv_heads) * self.headdim;
        linear("mixer.in_proj", rows, d_model, self.bias, 1.0, all);
        linear("mixer.out_proj", d_model, self.heads * self.headdim, self.bias, out_scale, all);
    }
}

impl Mixer {
    /// The names of all kinds, as in patterns and configurations.
    pub const KINDS: [&str; 3] = ["mamba1", "mamba2", "attention"];

    /// The name of its kind.
    pub fn kind(&self) -> &'static str {
        match self {
            Mixer::Mamba1(_) => "mamba1",
            Mixer::Mamba2(_) => "mamba2",
            Mixer::Attention(_) => "attention",
        }
    }

    /// A mixer of a kind with the usual sizes in a model of width `d_model`, if the kind exists.
    pub fn of_kind(kind: &str, d_model: usize) -> Option<Mixer> {
        Some(match kind {
            "mamba1" => Mixer::Mamba1(mamba1(d_model)),
            "mamba2" => Mixer::Mamba2(mamba2(d_model)),
            "attention" => Mixer::Attention(AttentionConfig::of_width(d_model)),
            _ => return None,
        })
    }

    /// The same kind with the usual sizes for another width of the model; a Mamba keeps what does not depend on it.
    pub fn resize(&mut self, old: usize, new: usize) {
        let d_inner = (self.d_inner() / old.max(1)).max(1) * new;
        match self {
            Mixer::Mamba1(m) => (m.d_inner, m.dt_rank) = (d_inner, new.div_ceil(16)),
            Mixer::Mamba2(m) => (m.d_inner, m.d_ssm) = (d_inner, d_inner),
            Mixer::Attention(m) => *m = AttentionConfig::of_width(new),
        }
    }

    /// Sets the channels of the mixer, where they may be chosen.
    pub fn set_d_inner(&mut self, d_inner: usize) {
        match self {
            Mixer::Mamba1(m) => m.d_inner = d_inner,
            Mixer::Mamba2(m) => (m.d_inner, m.d_ssm) = (d_inner, d_inner),
            Mixer::Attention(_) => {}
        }
    }

    /// The parts of its state and their numbers, in the order of memory (see [`crate::state::LayerState`]).
    pub(crate) fn state(&self) -> Vec<(&'static str, usize)> {
        match self {
            Mixer::Mamba1(m) => vec![("conv", (m.d_conv - 1) * m.d_inner), ("ssm", m.d_state * m.d_inner)],
            Mixer::Mamba2(m) => vec![("conv", (m.d_conv - 1) * m.conv_dim()), ("ssm", m.d_ssm * m.d_state)],
            Mixer::Attention(m) => vec![("position", POSITION), ("kv", m.window * 2 * m.kv_heads * m.headdim)],
        }
    }

    /// Checks the sizes of a mixer that is none of the Mambas, in layer `layer`.
    pub(crate) fn validate(&self, layer: usize) -> Result<(), ConfigError> {
        let check = Check { layer };
        match self {
            Mixer::Mamba1(_) | Mixer::Mamba2(_) => Ok(()),
            Mixer::Attention(m) => m.validate(&check),
        }
    }

    /// The parameters of a mixer that is none of the Mambas; those that write into the residual stream are scaled.
    pub(crate) fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>) {
        match self {
            Mixer::Mamba1(_) | Mixer::Mamba2(_) => {}
            Mixer::Attention(m) => m.parameters(d_model, out_scale, all),
        }
    }
}

/// Checks of a layer's sizes; messages name the layer and the size.
struct Check {
    layer: usize,
}

impl Check {
    fn what(&self, what: &str) -> String {
        format!("layer {}: {what}", self.layer)
    }

    fn size(&self, what: &str, found: usize, min: usize, max: usize) -> Result<(), ConfigError> {
        crate::config::size(|| self.what(what), found, min, max)
    }

    fn positive(&self, sizes: &[(&str, usize)]) -> Result<(), ConfigError> {
        sizes.iter().try_for_each(|&(what, found)| crate::config::positive(|| self.what(what), found))
    }

    fn multiple(&self, (what, value): (&str, usize), (of, divisor): (&str, usize)) -> Result<(), ConfigError> {
        crate::config::multiple(self.layer, what, value, of, divisor)
    }

    fn number(&self, what: &str, found: f32, holds: bool, expected: &'static str) -> Result<(), ConfigError> {
        if holds { Ok(()) } else { Err(ConfigError::Number { what: self.what(what), found, expected }) }
    }
}

/// mamba-ssm's defaults: expansion 2, states of 16, convolution over 4, rank ⌈d_model/16⌉.
fn mamba1(d_model: usize) -> Mamba1Config {
    Mamba1Config {
        d_inner: 2 * d_model,
        d_state: 16,
        d_conv: 4,
        dt_rank: d_model.div_ceil(16),
        bias: false,
        conv_bias: true,
        dt_b_c_rms: None,
    }
}

/// mamba-ssm's defaults: expansion 2, heads of 64 (or the largest power of two below that fits), states of 128, one group.
fn mamba2(d_model: usize) -> Mamba2Config {
    let d_inner = 2 * d_model;
    Mamba2Config {
        d_inner,
        d_ssm: d_inner,
        d_state: 128,
        d_conv: 4,
        headdim: 1 << d_inner.trailing_zeros().min(6),
        ngroups: 1,
        chunk_size: 256,
        d_has_hdim: false,
        rmsnorm: true,
        norm_before_gate: false,
        dt_limit: (0.0, f32::INFINITY),
        bias: false,
        conv_bias: true,
    }
}
