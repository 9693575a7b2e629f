//! The Mamba-2 block (Dao & Gu 2024, arXiv 2405.21060, section 7).

use hognose_core::ops::causal_conv1d::{CausalConv1d, causal_conv1d};
use hognose_core::ops::elementwise::{mul, silu};
use hognose_core::ops::gated_rms_norm::gated_rms_norm;
use hognose_core::ops::layout::{concat, split};
use hognose_core::ops::ssd::{Ssd, ssd};
use hognose_core::{Error, TensorId};

use super::Recorder;
use crate::config::Mamba2Config;
use crate::state::LayerState;

impl Recorder<'_> {
    /// u `[tokens, d_model]` → `[tokens, d_model]`: in_proj → (z0, x0, z, xBC, Δ); xBC → conv + SiLU → SSD → gated norm;
    /// beside silu(z0) ⊙ x0 where the mixer has a gated MLP part; → out_proj.
    pub(super) fn mamba2(
        &mut self,
        layer: usize,
        name: &str,
        m: &Mamba2Config,
        widths: &LayerState,
        u: TensorId,
    ) -> Result<TensorId, Error> {
        let bc = m.ngroups * m.d_state;
        let projected = self.linear(u, &format!("{name}.mixer.in_proj"))?;
        let parts = [m.d_mlp(), m.d_mlp(), m.d_ssm, m.conv_dim(), m.nheads()];
        let parts = split(&mut self.graph, projected, &parts)?;
        let (z0, x0, z, xbc, dt) = (parts[0], parts[1], parts[2], parts[3], parts[4]);

        let (initial_state, state_dest) = self.state(layer, "conv", widths.width("conv"));
        let conv = CausalConv1d {
            x: xbc,
            weight: self.param(&format!("{name}.mixer.conv1d.weight")),
            bias: self.optional_param(&format!("{name}.mixer.conv1d.bias")),
            initial_state,
            segments: self.segments,
            silu: true,
        };
        let conv = causal_conv1d(&mut self.graph, conv)?;
        self.store_state(conv.final_state, state_dest)?;
        let xbc = split(&mut self.graph, conv.y, &[m.d_ssm, bc, bc])?;

        let (initial_state, state_dest) = self.state(layer, "ssm", widths.width("ssm"));
        let scan = Ssd {
            x: xbc[0],
            dt,
            a: self.transition(name)?,
            b: xbc[1],
            c: xbc[2],
            d: Some(self.param(&format!("{name}.mixer.D"))),
            z: (!m.rmsnorm).then_some(z),
            dt_bias: Some(self.param(&format!("{name}.mixer.dt_bias"))),
            initial_state,
            segments: self.segments,
            headdim: m.headdim,
            d_state: m.d_state,
            chunk: m.chunk_size,
            softplus: true,
            dt_limit: m.dt_limit,
        };
        self.observe(layer, &[("x", xbc[0]), ("dt", dt), ("B", xbc[1]), ("C", xbc[2])])?;
        if !m.rmsnorm {
            self.observe(layer, &[("z", z)])?;
        }
        let scan = ssd(&mut self.graph, scan)?;
        self.observe(layer, &[("y", scan.y)])?;
        self.store_state(scan.final_state, state_dest)?;
        let mut y = scan.y;
        if m.rmsnorm {
            let weight = Some(self.param(&format!("{name}.mixer.norm.weight")));
            let group = m.d_ssm / m.ngroups;
            y = gated_rms_norm(&mut self.graph, y, z, weight, group, self.config.norm_eps, m.norm_before_gate)?;
        }
        if m.d_mlp() > 0 {
            let gate = silu(&mut self.graph, z0)?;
            let gated = mul(&mut self.graph, gate, x0)?;
            y = concat(&mut self.graph, &[gated, y])?;
        }
        self.linear(y, &format!("{name}.mixer.out_proj"))
    }
}
