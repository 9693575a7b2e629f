//! The Mambas' usual sizes, states and parameters.

use super::{Check, Kind};
use crate::config::{
    ConfigError, Init, Mamba1Config, Mamba2Config, ParamKind, ParamSpec, convolution, epsilon, linear,
};

/// Range and floor of Δ at initialisation (Mamba, section 3.6, and mamba-ssm's defaults).
const DT_INIT: Init = Init::DtBias { min: 1e-3, max: 0.1, floor: 1e-4 };

impl Mamba1Config {
    /// mamba-ssm's defaults: expansion 2, states of 16, convolution over 4, rank ⌈d_model/16⌉.
    pub(super) fn of_width(d_model: usize) -> Mamba1Config {
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
}

impl Kind for Mamba1Config {
    fn name(&self) -> &'static str {
        "mamba1"
    }

    fn d_inner(&self) -> usize {
        self.d_inner
    }

    fn set_d_inner(&mut self, d_inner: usize) {
        self.d_inner = d_inner;
    }

    /// Keeps the expansion and what does not depend on the width.
    fn resize(&mut self, old: usize, new: usize) {
        (self.d_inner, self.dt_rank) = (expanded(self.d_inner, old, new), new.div_ceil(16));
    }

    fn state(&self) -> Vec<(&'static str, usize)> {
        vec![("conv", (self.d_conv - 1) * self.d_inner), ("ssm", self.d_state * self.d_inner)]
    }

    fn validate(&self, check: &Check) -> Result<(), ConfigError> {
        check.positive(&[
            ("d_inner", self.d_inner),
            ("d_state", self.d_state),
            ("d_conv", self.d_conv),
            ("dt_rank", self.dt_rank),
        ])?;
        self.dt_b_c_rms.map_or(Ok(()), |eps| epsilon(|| check.what("dt_b_c_rms"), eps))
    }

    fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>) {
        let (d, n, r) = (self.d_inner, self.d_state, self.dt_rank);
        linear("mixer.in_proj", 2 * d, d_model, self.bias, 1.0, all);
        convolution(d, self.d_conv, self.conv_bias, all);
        all.push(ParamSpec::matrix("mixer.x_proj.weight", r + 2 * n, d, 1.0));
        let bound = (r as f32).powf(-0.5);
        all.push(ParamSpec::new("mixer.dt_proj.weight", [d, r], ParamKind::Matrix, Init::Uniform { bound }));
        all.push(ParamSpec::new("mixer.dt_proj.bias", [d], ParamKind::Ssm, DT_INIT));
        all.push(ParamSpec::new("mixer.A_log", [d, n], ParamKind::Ssm, Init::LogRange));
        all.push(ParamSpec::new("mixer.D", [d], ParamKind::Ssm, Init::Ones));
        linear("mixer.out_proj", d_model, d, self.bias, out_scale, all);
    }
}

impl Mamba2Config {
    /// mamba-ssm's defaults: expansion 2, heads of 64 (or the largest power of two below that fits), states of 128, one
    /// group.
    pub(super) fn of_width(d_model: usize) -> Mamba2Config {
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
}

impl Kind for Mamba2Config {
    fn name(&self) -> &'static str {
        "mamba2"
    }

    fn d_inner(&self) -> usize {
        self.d_inner
    }

    fn set_d_inner(&mut self, d_inner: usize) {
        (self.d_inner, self.d_ssm) = (d_inner, d_inner);
    }

    /// Keeps the expansion and what does not depend on the width.
    fn resize(&mut self, old: usize, new: usize) {
        self.set_d_inner(expanded(self.d_inner, old, new));
    }

    fn state(&self) -> Vec<(&'static str, usize)> {
        vec![("conv", (self.d_conv - 1) * self.conv_dim()), ("ssm", self.d_ssm * self.d_state)]
    }

    fn validate(&self, check: &Check) -> Result<(), ConfigError> {
        check.positive(&[("d_inner", self.d_inner)])?;
        check.size("d_ssm", self.d_ssm, 1, self.d_inner)?;
        check.positive(&[
            ("d_state", self.d_state),
            ("d_conv", self.d_conv),
            ("headdim", self.headdim),
            ("ngroups", self.ngroups),
            ("chunk_size", self.chunk_size),
        ])?;
        check.multiple(("d_ssm", self.d_ssm), ("headdim", self.headdim))?;
        check.multiple(("the number of heads", self.nheads()), ("ngroups", self.ngroups))?;
        let (low, high) = self.dt_limit;
        if low >= 0.0 && low < high { Ok(()) } else { Err(ConfigError::DtLimit { low, high }) }
    }

    fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>) {
        let h = self.nheads();
        linear("mixer.in_proj", self.d_in_proj(), d_model, self.bias, 1.0, all);
        convolution(self.conv_dim(), self.d_conv, self.conv_bias, all);
        all.push(ParamSpec::new("mixer.dt_bias", [h], ParamKind::Ssm, DT_INIT));
        all.push(ParamSpec::new("mixer.A_log", [h], ParamKind::Ssm, Init::LogUniform { low: 1.0, high: 16.0 }));
        let d_rows = if self.d_has_hdim { self.d_ssm } else { h };
        all.push(ParamSpec::new("mixer.D", [d_rows], ParamKind::Ssm, Init::Ones));
        if self.rmsnorm {
            all.push(ParamSpec::new("mixer.norm.weight", [self.d_ssm], ParamKind::Norm, Init::Ones));
        }
        linear("mixer.out_proj", d_model, self.d_inner, self.bias, out_scale, all);
    }
}

/// As many times the new width of the model as it was of the old one.
fn expanded(d_inner: usize, old: usize, new: usize) -> usize {
    (d_inner / old.max(1)).max(1) * new
}
