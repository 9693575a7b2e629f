//! The sizes of LSTM and GRU.

use hognose_core::ops::rnn::Cell;
use serde::{Deserialize, Serialize};

use super::{Check, Kind, expanded};
use crate::config::{ConfigError, Init, ParamKind, ParamSpec, linear};

/// A recurrent network with gates between two linear layers; `GATES` says which.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RnnConfig<const GATES: usize> {
    /// Units, H.
    pub d_inner: usize,
    /// Bias on `in_proj`, `out_proj` and the GRU's product with its state.
    pub bias: bool,
}

/// Long short-term memory: gates i, f, g, o.
pub type LstmConfig = RnnConfig<{ Cell::Lstm.gates() }>;
/// The gated recurrent unit: gates r, z, n.
pub type GruConfig = RnnConfig<{ Cell::Gru.gates() }>;

impl<const GATES: usize> RnnConfig<GATES> {
    /// As many units as the model is wide.
    pub(super) fn of_width(d_model: usize) -> Self {
        RnnConfig { d_inner: d_model, bias: true }
    }

    /// Its recurrence.
    pub fn cell(&self) -> Cell {
        if GATES == Cell::Lstm.gates() { Cell::Lstm } else { Cell::Gru }
    }
}

impl<const GATES: usize> Kind for RnnConfig<GATES> {
    fn name(&self) -> &'static str {
        match self.cell() {
            Cell::Lstm => "lstm",
            Cell::Gru => "gru",
        }
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
        vec![("rnn", self.cell().state() * self.d_inner)]
    }

    fn validate(&self, check: &Check) -> Result<(), ConfigError> {
        check.positive(&[("d_inner", self.d_inner)])
    }

    fn parameters(&self, d_model: usize, out_scale: f32, all: &mut Vec<ParamSpec>) {
        let units = self.d_inner;
        linear("mixer.in_proj", GATES * units, d_model, self.bias, 1.0, all);
        // torch's start.
        let init = Init::Uniform { bound: (units as f32).powf(-0.5) };
        all.push(ParamSpec::new("mixer.hidden.weight", [GATES * units, units], ParamKind::Recurrent, init));
        // Beside in_proj's bias it changes nothing but the GRU's new state.
        if self.bias && self.cell() == Cell::Gru {
            all.push(ParamSpec::new("mixer.hidden.bias", [GATES * units], ParamKind::Bias, Init::Zeros));
        }
        linear("mixer.out_proj", d_model, units, self.bias, out_scale, all);
    }
}
