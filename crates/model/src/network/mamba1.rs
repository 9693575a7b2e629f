//! The Mamba-1 block (Gu & Dao 2023, arXiv 2312.00752, figure 3), and Falcon-Mamba's with norms on Δ, B and C.

use hognose_core::ops::causal_conv1d::{CausalConv1d, causal_conv1d};
use hognose_core::ops::layout::split;
use hognose_core::ops::norm::rms_norm;
use hognose_core::ops::selective_scan::{Discretisation, SelectiveScan, selective_scan};
use hognose_core::{Error, TensorId};

use super::Recorder;
use crate::config::Mamba1Config;
use crate::state::LayerState;

impl Recorder<'_> {
    /// u `[tokens, d_model]` → `[tokens, d_model]`: in_proj → (x, z); x → conv + SiLU → S6 → ⊙ silu(z) → out_proj.
    pub(super) fn mamba1(
        &mut self,
        layer: usize,
        name: &str,
        m: &Mamba1Config,
        widths: &LayerState,
        u: TensorId,
    ) -> Result<TensorId, Error> {
        let xz = self.linear(u, &format!("{name}.mixer.in_proj"))?;
        let parts = split(&mut self.graph, xz, &[m.d_inner, m.d_inner])?;
        let y = self.selective(name, m, Some((layer, widths)), parts[0], parts[1])?;
        self.linear(y, &format!("{name}.mixer.out_proj"))
    }

    /// x, z `[tokens, d_inner]` → `[tokens, d_inner]`: x → conv + SiLU → S6 → ⊙ silu(z). With the layer's number and the widths
    /// of its state, if it has one.
    pub(super) fn selective(
        &mut self,
        name: &str,
        m: &Mamba1Config,
        state: Option<(usize, &LayerState)>,
        x: TensorId,
        z: TensorId,
    ) -> Result<TensorId, Error> {
        let part = |recorder: &mut Self, part| {
            state.map_or((None, None), |(layer, widths)| recorder.state(layer, part, widths.width(part)))
        };
        let (initial_state, state_dest) = part(self, "conv");
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
        let x = conv.y;

        let dt_b_c = self.linear(x, &format!("{name}.mixer.x_proj"))?;
        let mut parts = split(&mut self.graph, dt_b_c, &[m.dt_rank, m.d_state, m.d_state])?;
        if let Some(eps) = m.dt_b_c_rms {
            for part in &mut parts {
                *part = rms_norm(&mut self.graph, *part, None, None, eps)?.y;
            }
        }
        let dt_weight = self.param(&format!("{name}.mixer.dt_proj.weight"));
        let dt = hognose_core::ops::linear::linear(&mut self.graph, parts[0], dt_weight, None)?;

        let (initial_state, state_dest) = part(self, "ssm");
        let scan = SelectiveScan {
            x,
            dt,
            a: self.transition(name)?,
            b: parts[1],
            c: parts[2],
            d: Some(self.param(&format!("{name}.mixer.D"))),
            z: Some(z),
            dt_bias: Some(self.param(&format!("{name}.mixer.dt_proj.bias"))),
            initial_state,
            segments: self.segments,
            softplus: true,
            // Every released checkpoint was trained with B̄ = ΔB, not with the ZOH of the paper.
            discretisation: Discretisation::Euler,
        };
        let scan = selective_scan(&mut self.graph, scan)?;
        if let Some((layer, _)) = state {
            let seen = [("x", x), ("dt", dt), ("B", parts[1]), ("C", parts[2]), ("z", z), ("y", scan.y)];
            self.observe(layer, &seen)?;
        }
        self.store_state(scan.final_state, state_dest)?;
        Ok(scan.y)
    }
}
