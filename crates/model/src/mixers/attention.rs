//! Attention's sizes.

use hognose_core::ops::attention::POSITION;
use serde::{Deserialize, Serialize};

use super::{Check, Kind};
use crate::config::{ConfigError, ParamSpec, linear, number};

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
    pub(super) fn of_width(d_model: usize) -> AttentionConfig {
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
}

impl Kind for AttentionConfig {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn d_inner(&self) -> usize {
        self.heads * self.headdim
    }

    fn resize(&mut self, _: usize, new: usize) {
        *self = AttentionConfig::of_width(new);
    }

    fn state(&self) -> Vec<(&'static str, usize)> {
        vec![("position", POSITION), ("kv", self.window * 2 * self.kv_heads * self.headdim)]
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
