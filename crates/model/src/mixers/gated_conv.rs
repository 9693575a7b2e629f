//! The gated convolution's sizes.

use serde::{Deserialize, Serialize};

use super::{Check, Kind, expanded};
use crate::config::{ConfigError, ParamSpec, convolution, linear};

/// A causal depthwise convolution times a gate: a Mamba-1 mixer without its SSM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatedConvConfig {
    /// Channels of the mixer, D.
    pub d_inner: usize,
    /// Width of the causal convolution: a token sees itself and d_conv − 1 before it.
    pub d_conv: usize,
    /// Bias on `in_proj` and `out_proj`.
    pub bias: bool,
    /// Bias on the convolution.
    pub conv_bias: bool,
}

impl GatedConvConfig {
    /// Mamba's expansion, and MambaOut's filters of 7 taps.
    pub(super) fn of_width(d_model: usize) -> GatedConvConfig {
        GatedConvConfig { d_inner: 2 * d_model, d_conv: 7, bias: false, conv_bias: true }
    }
}

impl Kind for GatedConvConfig {
    fn name(&self) -> &'static str {
        "gated_conv"
    }

    fn d_inner(&self) -> usize {
        self.d_inner
    }

    fn set_d_inner(&mut self, d_inner: usize) {
        self.d_inner = d_inner;
    }

    fn resize(&mut self, old: usize, new: usize) {
        self.d_inner = expanded(self.d_inner, old, new);
    }

    fn state(&self) -> Vec<(&'static str, usize)> {
        vec![("conv", (self.d_conv - 1) * self.d_inner)]
    }

    fn validate(&self, check: &Check) -> Result<(), ConfigError> {
        check.positive(&[("d_inner", self.d_inner), ("d_conv", self.d_conv)])
    }

    fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>) {
        linear("mixer.in_proj", 2 * self.d_inner, d_model, self.bias, 1.0, all);
        convolution(self.d_inner, self.d_conv, self.conv_bias, all);
        linear("mixer.out_proj", d_model, self.d_inner, self.bias, out_scale, all);
    }
}
