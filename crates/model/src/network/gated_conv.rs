//! The gated convolution: what remains of a Mamba-1 block without its SSM. (Gates on convolutions: Dauphin et al. 2017,
//! arXiv 1612.08083; in this block, as a baseline of Mamba: Yu and Wang, MambaOut, arXiv 2405.07992.)

use hognose_core::ops::causal_conv1d::{CausalConv1d, causal_conv1d};
use hognose_core::ops::elementwise::{mul, silu};
use hognose_core::ops::layout::split;
use hognose_core::{Error, TensorId};

use super::Recorder;
use crate::mixers::GatedConvConfig;
use crate::state::LayerState;

impl Recorder<'_> {
    /// u `[tokens, d_model]` → `[tokens, d_model]`: in_proj → (x, z); conv(x) ⊙ silu(z) → out_proj.
    pub(super) fn gated_conv(
        &mut self,
        layer: usize,
        name: &str,
        m: &GatedConvConfig,
        widths: &LayerState,
        u: TensorId,
    ) -> Result<TensorId, Error> {
        let xz = self.linear(u, &format!("{name}.mixer.in_proj"))?;
        let parts = split(&mut self.graph, xz, &[m.d_inner, m.d_inner])?;
        let (initial_state, state_dest) = self.state(layer, "conv", widths.width("conv"));
        let conv = CausalConv1d {
            x: parts[0],
            weight: self.param(&format!("{name}.mixer.conv1d.weight")),
            bias: self.optional_param(&format!("{name}.mixer.conv1d.bias")),
            initial_state,
            segments: self.segments,
            silu: false,
        };
        let conv = causal_conv1d(&mut self.graph, conv)?;
        self.store_state(conv.final_state, state_dest)?;
        let gate = silu(&mut self.graph, parts[1])?;
        let y = mul(&mut self.graph, conv.y, gate)?;
        self.linear(y, &format!("{name}.mixer.out_proj"))
    }
}
