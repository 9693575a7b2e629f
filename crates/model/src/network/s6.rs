//! The Mamba-1 block with every part optional (see [`S6Config`]).

use hognose_core::ops::causal_conv1d::{CausalConv1d, causal_conv1d};
use hognose_core::ops::diagonal_scan::{DiagonalScan, Part, diagonal_scan};
use hognose_core::ops::elementwise::{mul, silu};
use hognose_core::ops::layout::split;
use hognose_core::ops::linear::linear;
use hognose_core::ops::selective_scan::Discretisation;
use hognose_core::{Error, TensorId};

use super::Recorder;
use crate::mixers::{Choice, InputRule, S6Config};
use crate::state::LayerState;

impl Recorder<'_> {
    /// u `[tokens, d_model]` → `[tokens, d_model]`: in_proj → (x, z); x → conv + SiLU → S6 → ⊙ silu(z) → out_proj.
    /// SiLU stays without the convolution.
    pub(super) fn s6(
        &mut self,
        layer: usize,
        name: &str,
        m: &S6Config,
        widths: &LayerState,
        u: TensorId,
    ) -> Result<TensorId, Error> {
        let xz = self.linear(u, &format!("{name}.mixer.in_proj"))?;
        let (x, z) = if m.gate {
            let parts = split(&mut self.graph, xz, &[m.d_inner, m.d_inner])?;
            (parts[0], Some(parts[1]))
        } else {
            (xz, None)
        };
        let x = if m.d_conv > 0 {
            let (initial_state, state_dest) = self.state(layer, "conv", widths.width("conv"));
            let conv = CausalConv1d {
                x,
                weight: self.param(&format!("{name}.mixer.conv1d.weight")),
                bias: self.optional_param(&format!("{name}.mixer.conv1d.bias")),
                initial_state,
                segments: self.segments,
                silu: true,
            };
            let conv = causal_conv1d(&mut self.graph, conv)?;
            self.store_state(conv.final_state, state_dest)?;
            conv.y
        } else {
            silu(&mut self.graph, x)?
        };

        // What the input chooses of Δ, B and C, in this order.
        let widths_of_parts: Vec<usize> = m.selected().into_iter().filter(|&w| w > 0).collect();
        let mut parts = Vec::new().into_iter();
        if !widths_of_parts.is_empty() {
            let dt_b_c = self.linear(x, &format!("{name}.mixer.x_proj"))?;
            parts = split(&mut self.graph, dt_b_c, &widths_of_parts)?.into_iter();
        }
        let mut chosen = |choice| (choice == Choice::Selective).then(|| parts.next()).flatten();
        let (dt, b, c) = (chosen(m.dt), chosen(m.b), chosen(m.c));
        let dt = match dt {
            Some(dt) => {
                let weight = self.param(&format!("{name}.mixer.dt_proj.weight"));
                Some(linear(&mut self.graph, dt, weight, None)?)
            }
            None => None,
        };
        let mut part = |what: &str, chosen: Option<TensorId>| match chosen {
            Some(t) => Part::Selective(t),
            None => Part::Fixed(self.param(&format!("{name}.mixer.{what}"))),
        };
        let (b, c) = (part("B", b), part("C", c));
        let (initial_state, state_dest) = self.state(layer, "ssm", widths.width("ssm"));
        let scan = DiagonalScan {
            x,
            dt,
            dt_bias: Some(self.param(&format!("{name}.mixer.dt_proj.bias"))),
            a: self.transition(name)?,
            a_imag: self.optional_param(&format!("{name}.mixer.A_imag")),
            b,
            c,
            d: Some(self.param(&format!("{name}.mixer.D"))),
            initial_state,
            segments: self.segments,
            discretisation: match m.discretization {
                InputRule::Euler => Discretisation::Euler,
                InputRule::Zoh => Discretisation::Zoh,
            },
        };
        let scan = diagonal_scan(&mut self.graph, scan)?;
        self.observe(layer, &[("x", x), ("y", scan.y)])?;
        self.store_state(scan.final_state, state_dest)?;
        let y = match z {
            Some(z) => {
                let gate = silu(&mut self.graph, z)?;
                mul(&mut self.graph, scan.y, gate)?
            }
            None => scan.y,
        };
        self.linear(y, &format!("{name}.mixer.out_proj"))
    }
}
