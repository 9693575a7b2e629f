//! The linear time-invariant blocks: S4D, S4 and H3.

use hognose_core::ops::causal_conv1d::{CausalConv1d, causal_conv1d};
use hognose_core::ops::elementwise::{mul, silu};
use hognose_core::ops::layout::split;
use hognose_core::ops::lti_discretise::{LtiDiscretise, Method, lti_discretise};
use hognose_core::ops::lti_scan::{LtiScan, lti_scan};
use hognose_core::ops::swiglu::swiglu;
use hognose_core::{Error, TensorId};

use super::Recorder;
use crate::mixers::{Discretization, H3Config};
use crate::state::LayerState;

impl Recorder<'_> {
    /// u `[tokens, d_model]` → `[tokens, d_model]`: in_proj → SSM → SiLU → out_proj → gate. The block of S4's published
    /// code (S4Block in state-spaces/s4) has GELU and a gate by the logistic function where this has SiLU and SwiGLU
    /// (Shazeer 2020, arXiv 2002.05202).
    pub(super) fn s4(
        &mut self,
        layer: usize,
        name: &str,
        discretization: Discretization,
        widths: &LayerState,
        u: TensorId,
    ) -> Result<TensorId, Error> {
        let x = self.linear(u, &format!("{name}.mixer.in_proj"))?;
        let y = self.lti_ssm(layer, name, discretization, widths, x)?;
        let y = silu(&mut self.graph, y)?;
        let y_gate = self.linear(y, &format!("{name}.mixer.out_proj"))?;
        swiglu(&mut self.graph, y_gate)
    }

    /// u `[tokens, d_model]` → `[tokens, d_model]`: in_proj → (q, k, v); q ⊙ SSM(shift(k) ⊙ v) → out_proj.
    pub(super) fn h3(
        &mut self,
        layer: usize,
        name: &str,
        m: &H3Config,
        widths: &LayerState,
        u: TensorId,
    ) -> Result<TensorId, Error> {
        let qkv = self.linear(u, &format!("{name}.mixer.in_proj"))?;
        let parts = split(&mut self.graph, qkv, &[m.d_inner; 3])?;
        let (q, k, v) = (parts[0], parts[1], parts[2]);
        let (initial_state, state_dest) = self.state(layer, "conv", widths.width("conv"));
        let shift = CausalConv1d {
            x: k,
            weight: self.param(&format!("{name}.mixer.conv1d.weight")),
            bias: None,
            initial_state,
            segments: self.segments,
            silu: false,
        };
        let shift = causal_conv1d(&mut self.graph, shift)?;
        self.store_state(shift.final_state, state_dest)?;
        let kv = mul(&mut self.graph, shift.y, v)?;
        let y = self.lti_ssm(layer, name, m.discretization, widths, kv)?;
        let y = mul(&mut self.graph, q, y)?;
        self.linear(y, &format!("{name}.mixer.out_proj"))
    }

    /// The time-invariant SSM of each channel of x, with its skip connection. It is diagonal, or diagonal plus rank one
    /// where the layer has a P.
    fn lti_ssm(
        &mut self,
        layer: usize,
        name: &str,
        discretization: Discretization,
        widths: &LayerState,
        x: TensorId,
    ) -> Result<TensorId, Error> {
        let operands = LtiDiscretise {
            log_a_real: self.param(&format!("{name}.mixer.log_A_real")),
            a_imag: self.param(&format!("{name}.mixer.A_imag")),
            log_dt: self.param(&format!("{name}.mixer.log_dt")),
            b: self.optional_param(&format!("{name}.mixer.B")),
            p: self.optional_param(&format!("{name}.mixer.P")),
            method: match discretization {
                Discretization::Zoh => Method::Zoh,
                Discretization::Bilinear => Method::Bilinear,
            },
        };
        let discrete = lti_discretise(&mut self.graph, operands)?;
        let (initial_state, state_dest) = self.state(layer, "ssm", widths.width("ssm"));
        let scan = LtiScan {
            x,
            a: discrete.a,
            b: discrete.b,
            c: self.param(&format!("{name}.mixer.C")),
            rank_one: discrete.rank_one,
            d: Some(self.param(&format!("{name}.mixer.D"))),
            initial_state,
            segments: self.segments,
        };
        let scan = lti_scan(&mut self.graph, scan)?;
        self.store_state(scan.final_state, state_dest)?;
        Ok(scan.y)
    }
}
