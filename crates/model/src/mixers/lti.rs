//! Sizes, states and parameters of the linear time-invariant kinds: S4D, S4 and H3.

use serde::{Deserialize, Serialize};

use super::{Check, Kind};
use crate::config::{ConfigError, Init, ParamKind, ParamSpec, linear};

/// Range of Δ at initialisation (S4's and S4D's published habit).
const DT_INIT: Init = Init::LogStep { min: 1e-3, max: 0.1 };
/// C is complex normal of variance 1.
const C_INIT: Init = Init::Normal { std: std::f32::consts::FRAC_1_SQRT_2 };

/// Where a diagonal A of N/2 conjugate pairs starts, n = 0 … N/2 − 1 (Gu et al. 2022, arXiv 2206.11893, section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Diagonal {
    /// −½ + iπn.
    Lin,
    /// −½ + i (N/π)(N/(2n+1) − 1).
    Inv,
    /// The eigenvalues of the normal part of HiPPO-LegS.
    Legs,
    /// −(n+1), with imaginary parts that start at 0 and are learned.
    Real,
    /// −½ exp(z) + iπ(N/2)u, z normal and u uniform in each channel.
    Random,
}

/// How a continuous model becomes a recurrence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Discretization {
    /// The zero-order hold.
    Zoh,
    /// Trapezoids, also called Tustin's method.
    Bilinear,
}

/// S4D (arXiv 2206.11893): a diagonal A in each channel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct S4dConfig {
    /// Channels of the mixer, D.
    pub d_inner: usize,
    /// State size of one channel, N: N/2 complex numbers, one of each conjugate pair. Even.
    pub d_state: usize,
    /// Where A starts.
    pub init: Diagonal,
    /// How A and B become a recurrence.
    pub discretization: Discretization,
    /// Bias on `in_proj` and `out_proj`.
    pub bias: bool,
}

/// S4 (Gu, Goel & Ré 2021, arXiv 2111.00396): A = Λ − P P* in each channel, which starts as HiPPO-LegS; bilinear.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct S4Config {
    /// Channels of the mixer, D.
    pub d_inner: usize,
    /// State size of one channel, N: N/2 complex numbers, one of each conjugate pair. Even.
    pub d_state: usize,
    /// Bias on `in_proj` and `out_proj`.
    pub bias: bool,
}

/// H3 (Fu et al. 2022, arXiv 2212.14052) with heads of one channel: q ⊙ SSM(shift(k) ⊙ v), where SSM is diagonal and shift
/// is an SSM whose state is the last `d_conv` inputs, which is a causal convolution.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct H3Config {
    /// Channels of the mixer, D.
    pub d_inner: usize,
    /// State size of the diagonal SSM of one channel, N. Even.
    pub d_state: usize,
    /// State size of the shift SSM.
    pub d_conv: usize,
    /// Where A starts.
    pub init: Diagonal,
    /// How A and B become a recurrence.
    pub discretization: Discretization,
    /// Bias on `in_proj` and `out_proj`.
    pub bias: bool,
}

impl S4dConfig {
    /// S4D's habits: states of 64, S4D-Lin.
    pub(super) fn of_width(d_model: usize) -> S4dConfig {
        S4dConfig {
            d_inner: d_model,
            d_state: 64,
            init: Diagonal::Lin,
            discretization: Discretization::Zoh,
            bias: true,
        }
    }
}

impl S4Config {
    /// S4's habits: states of 64.
    pub(super) fn of_width(d_model: usize) -> S4Config {
        S4Config { d_inner: d_model, d_state: 64, bias: true }
    }
}

impl H3Config {
    /// H3's habits, with a short shift.
    pub(super) fn of_width(d_model: usize) -> H3Config {
        let (init, discretization) = (Diagonal::Lin, Discretization::Zoh);
        H3Config { d_inner: d_model, d_state: 64, d_conv: 4, init, discretization, bias: true }
    }
}

fn validate(check: &Check, d_inner: usize, d_state: usize) -> Result<(), ConfigError> {
    check.positive(&[("d_inner", d_inner), ("d_state", d_state)])?;
    check.multiple(("d_state", d_state), ("a conjugate pair", 2))
}

fn ssm(name: &str, shape: [usize; 2], init: Init, all: &mut Vec<ParamSpec>) {
    all.push(ParamSpec::new(format!("mixer.{name}"), shape, ParamKind::Ssm, init));
}

/// What all share: the diagonal, C, Δ and D. Complex numbers are two rows, states before channels.
fn diagonal(init: Diagonal, (d_inner, d_state): (usize, usize), all: &mut Vec<ParamSpec>) {
    let pairs = d_state / 2;
    ssm("log_A_real", [pairs, d_inner], Init::LogDecay(init), all);
    ssm("A_imag", [pairs, d_inner], Init::Frequency(init), all);
    ssm("C", [d_state, d_inner], C_INIT, all);
    all.push(ParamSpec::new("mixer.log_dt", [d_inner], ParamKind::Ssm, DT_INIT));
    all.push(ParamSpec::new("mixer.D", [d_inner], ParamKind::Ssm, Init::Ones));
}

impl Kind for S4dConfig {
    fn name(&self) -> &'static str {
        "s4d"
    }

    fn d_inner(&self) -> usize {
        self.d_inner
    }

    fn set_d_inner(&mut self, d_inner: usize) {
        self.d_inner = d_inner;
    }

    fn resize(&mut self, old: usize, new: usize) {
        self.d_inner = super::expanded(self.d_inner, old, new);
    }

    fn state(&self) -> Vec<(&'static str, usize)> {
        vec![("ssm", self.d_state * self.d_inner)]
    }

    fn validate(&self, check: &Check) -> Result<(), ConfigError> {
        validate(check, self.d_inner, self.d_state)
    }

    fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>) {
        linear("mixer.in_proj", self.d_inner, d_model, self.bias, 1.0, all);
        diagonal(self.init, (self.d_inner, self.d_state), all);
        linear("mixer.out_proj", 2 * d_model, self.d_inner, self.bias, out_scale, all);
    }
}

impl Kind for S4Config {
    fn name(&self) -> &'static str {
        "s4"
    }

    fn d_inner(&self) -> usize {
        self.d_inner
    }

    fn set_d_inner(&mut self, d_inner: usize) {
        self.d_inner = d_inner;
    }

    fn resize(&mut self, old: usize, new: usize) {
        self.d_inner = super::expanded(self.d_inner, old, new);
    }

    fn state(&self) -> Vec<(&'static str, usize)> {
        vec![("ssm", self.d_state * self.d_inner)]
    }

    fn validate(&self, check: &Check) -> Result<(), ConfigError> {
        validate(check, self.d_inner, self.d_state)
    }

    fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>) {
        linear("mixer.in_proj", self.d_inner, d_model, self.bias, 1.0, all);
        diagonal(Diagonal::Legs, (self.d_inner, self.d_state), all);
        ssm("B", [self.d_state, self.d_inner], Init::LegsInput, all);
        ssm("P", [self.d_state, self.d_inner], Init::LegsLowRank, all);
        linear("mixer.out_proj", 2 * d_model, self.d_inner, self.bias, out_scale, all);
    }
}

impl Kind for H3Config {
    fn name(&self) -> &'static str {
        "h3"
    }

    fn d_inner(&self) -> usize {
        self.d_inner
    }

    fn set_d_inner(&mut self, d_inner: usize) {
        self.d_inner = d_inner;
    }

    fn resize(&mut self, old: usize, new: usize) {
        self.d_inner = super::expanded(self.d_inner, old, new);
    }

    fn state(&self) -> Vec<(&'static str, usize)> {
        vec![("conv", (self.d_conv - 1) * self.d_inner), ("ssm", self.d_state * self.d_inner)]
    }

    fn validate(&self, check: &Check) -> Result<(), ConfigError> {
        check.positive(&[("d_conv", self.d_conv)])?;
        validate(check, self.d_inner, self.d_state)
    }

    fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>) {
        linear("mixer.in_proj", 3 * self.d_inner, d_model, self.bias, 1.0, all);
        crate::config::convolution(self.d_inner, self.d_conv, false, all);
        diagonal(self.init, (self.d_inner, self.d_state), all);
        linear("mixer.out_proj", d_model, self.d_inner, self.bias, out_scale, all);
    }
}
