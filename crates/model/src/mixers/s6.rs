//! Sizes, state and parameters of S6 with every part optional.

use std::f32::consts::{FRAC_1_SQRT_2, LN_2};

use serde::{Deserialize, Serialize};

use super::mamba::DT_INIT;
use super::{Check, Kind};
use crate::config::{ConfigError, Init, ParamKind, ParamSpec, convolution, linear};

/// The Mamba-1 block (Gu & Dao 2023, arXiv 2312.00752), of which every part can be left out or be made independent of the
/// input: what the paper's ablations (tables 6 to 10) vary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct S6Config {
    /// Channels of the mixer, D.
    pub d_inner: usize,
    /// State size of one channel, N; where A is complex, N/2 complex numbers that stand for conjugate pairs.
    pub d_state: usize,
    /// Width of the causal convolution; 0 leaves it out.
    pub d_conv: usize,
    /// Rank of the projection to Δ, R.
    pub dt_rank: usize,
    /// Whether y is multiplied by silu(z).
    pub gate: bool,
    /// The step size Δ: the input's, or a number a channel.
    pub dt: Choice,
    /// B: the input's and shared by all channels, or N numbers for each channel, as in S4D (the paper's algorithm 1).
    pub b: Choice,
    /// C, likewise.
    pub c: Choice,
    /// Whether A is real or complex, and where it starts.
    pub a: Transition,
    /// How the input enters the state.
    pub discretization: InputRule,
    /// Bias on `in_proj` and `out_proj`.
    pub bias: bool,
    /// Bias on the convolution.
    pub conv_bias: bool,
}

/// Whether a part of the model is chosen anew at each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// A function of the input.
    Selective,
    /// A parameter.
    Fixed,
}

/// Where the diagonal A starts, n = 0, 1, …; the last three are complex (the paper's table 8; Gu et al. 2022, arXiv
/// 2206.11893, section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transition {
    /// −(n+1): S4D-Real, what Mamba starts from.
    Real,
    /// −exp(z), z normal.
    Random,
    /// −½.
    Constant,
    /// −½ + iπn.
    Lin,
    /// −½ + i (N/π)(N/(2n+1) − 1).
    Inv,
    /// The eigenvalues of the normal part of HiPPO-LegS.
    Legs,
}

/// How the input enters the state; the decay is exp(ΔA) in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InputRule {
    /// ΔB, as in every released Mamba.
    Euler,
    /// The zero-order hold, (exp(ΔA) − 1)/A · B, as the paper prints it.
    Zoh,
}

impl Transition {
    /// Whether A is complex.
    pub fn is_complex(self) -> bool {
        matches!(self, Transition::Lin | Transition::Inv | Transition::Legs)
    }
}

impl S6Config {
    /// Mamba-1's sizes, with everything that it has.
    pub(super) fn of_width(d_model: usize) -> S6Config {
        S6Config {
            d_inner: 2 * d_model,
            d_state: 16,
            d_conv: 4,
            dt_rank: d_model.div_ceil(16),
            gate: true,
            dt: Choice::Selective,
            b: Choice::Selective,
            c: Choice::Selective,
            a: Transition::Real,
            discretization: InputRule::Euler,
            bias: false,
            conv_bias: true,
        }
    }

    /// Columns of what the input chooses, of Δ (before its projection), B and C.
    pub fn selected(&self) -> [usize; 3] {
        let width = |choice, width| if choice == Choice::Selective { width } else { 0 };
        [width(self.dt, self.dt_rank), width(self.b, self.d_state), width(self.c, self.d_state)]
    }
}

impl Kind for S6Config {
    fn name(&self) -> &'static str {
        "s6"
    }

    fn d_inner(&self) -> usize {
        self.d_inner
    }

    fn set_d_inner(&mut self, d_inner: usize) {
        self.d_inner = d_inner;
    }

    fn resize(&mut self, old: usize, new: usize) {
        self.d_inner = super::expanded(self.d_inner, old, new);
        self.dt_rank = new.div_ceil(16);
    }

    fn state(&self) -> Vec<(&'static str, usize)> {
        let ssm = ("ssm", self.d_state * self.d_inner);
        if self.d_conv == 0 { vec![ssm] } else { vec![("conv", (self.d_conv - 1) * self.d_inner), ssm] }
    }

    fn validate(&self, check: &Check) -> Result<(), ConfigError> {
        check.positive(&[("d_inner", self.d_inner), ("d_state", self.d_state), ("dt_rank", self.dt_rank)])?;
        check.size("d_conv", self.d_conv, 0, 1 << 16)?;
        if self.a.is_complex() { check.multiple(("d_state", self.d_state), ("a conjugate pair", 2)) } else { Ok(()) }
    }

    fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>) {
        let (d, n) = (self.d_inner, self.d_state);
        let mut ssm = |name: &str, shape: [usize; 2], init| {
            all.push(ParamSpec::new(format!("mixer.{name}"), shape, ParamKind::Ssm, init));
        };
        let states = if self.a.is_complex() { n / 2 } else { n };
        let init = match self.a {
            Transition::Real => Init::LogRange,
            Transition::Random => Init::Normal { std: 1.0 },
            _ => Init::Constant { value: -LN_2 },
        };
        ssm("A_log", [d, states], init);
        if self.a.is_complex() {
            ssm("A_imag", [d, states], Init::Frequencies(self.a));
        }
        // Of variance 1: real numbers, or complex ones, whose imaginary parts follow the real ones.
        let std = if self.a.is_complex() { FRAC_1_SQRT_2 } else { 1.0 };
        for (name, choice) in [("B", self.b), ("C", self.c)] {
            if choice == Choice::Fixed {
                ssm(name, [d, n], Init::Normal { std });
            }
        }
        all.push(ParamSpec::new("mixer.D", [d], ParamKind::Ssm, Init::Ones));
        linear("mixer.in_proj", d * (1 + usize::from(self.gate)), d_model, self.bias, 1.0, all);
        if self.d_conv > 0 {
            convolution(d, self.d_conv, self.conv_bias, all);
        }
        let selected = self.selected().iter().sum();
        if selected > 0 {
            all.push(ParamSpec::matrix("mixer.x_proj.weight", selected, d, 1.0));
        }
        if self.dt == Choice::Selective {
            all.push(ParamSpec::matrix("mixer.dt_proj.weight", d, self.dt_rank, 1.0));
        }
        all.push(ParamSpec::new("mixer.dt_proj.bias", [d], ParamKind::Ssm, DT_INIT));
        linear("mixer.out_proj", d_model, d, self.bias, out_scale, all);
    }
}
