//! Bidirectional Mamba's sizes and parameters.

use serde::{Deserialize, Serialize};

use super::{Check, Kind};
use crate::config::{ConfigError, Mamba1Config, ParamSpec};

/// Mamba-1 along a sequence and against it, with one `in_proj`, one gate and one `out_proj`; what the two directions give is
/// added (Vim, Zhu et al., arXiv 2401.09417; with `in_proj` and `out_proj` shared, BiMamba of Caduceus, Schiff et al.,
/// arXiv 2403.03234, is the same). Not causal: it has no state and cannot go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VimConfig {
    /// Channels of the mixer, D.
    pub d_inner: usize,
    /// State size of one channel, N.
    pub d_state: usize,
    /// Width of the convolutions.
    pub d_conv: usize,
    /// Rank of the projections to Δ, R.
    pub dt_rank: usize,
    /// Bias on `in_proj` and `out_proj`.
    pub bias: bool,
    /// Bias on the convolutions.
    pub conv_bias: bool,
    /// Both directions have the same convolution and SSM, so that the reversed input gives the reversed output.
    pub tied: bool,
}

impl VimConfig {
    /// The sizes of Mamba-1, directions with weights of their own.
    pub(super) fn of_width(d_model: usize) -> VimConfig {
        let Mamba1Config { d_inner, d_state, d_conv, dt_rank, bias, conv_bias, .. } = Mamba1Config::of_width(d_model);
        VimConfig { d_inner, d_state, d_conv, dt_rank, bias, conv_bias, tied: false }
    }

    /// One direction.
    pub(crate) fn direction(&self) -> Mamba1Config {
        let VimConfig { d_inner, d_state, d_conv, dt_rank, bias, conv_bias, .. } = *self;
        Mamba1Config { d_inner, d_state, d_conv, dt_rank, bias, conv_bias, dt_b_c_rms: None }
    }
}

impl Kind for VimConfig {
    fn name(&self) -> &'static str {
        "vim"
    }

    fn d_inner(&self) -> usize {
        self.d_inner
    }

    fn set_d_inner(&mut self, d_inner: usize) {
        self.d_inner = d_inner;
    }

    fn resize(&mut self, old: usize, new: usize) {
        let mut one = self.direction();
        one.resize(old, new);
        (self.d_inner, self.dt_rank) = (one.d_inner, one.dt_rank);
    }

    fn state(&self) -> Vec<(&'static str, usize)> {
        Vec::new()
    }

    fn validate(&self, check: &Check) -> Result<(), ConfigError> {
        self.direction().validate(check)
    }

    /// Those of Mamba-1; `reverse.mixer.*` are the reversed direction's.
    fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>) {
        let mut one = Vec::new();
        self.direction().parameters(d_model, out_scale, &mut one);
        let shared = |p: &&ParamSpec| p.name.starts_with("mixer.in_proj") || p.name.starts_with("mixer.out_proj");
        let own = one.iter().filter(|p| !self.tied && !shared(p));
        let reversed: Vec<ParamSpec> =
            own.map(|p| ParamSpec { name: format!("reverse.{}", p.name), ..p.clone() }).collect();
        all.extend(one);
        all.extend(reversed);
    }
}
