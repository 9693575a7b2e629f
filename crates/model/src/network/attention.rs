//! Causal attention as a layer: grouped heads, rotary positions, a window (Transformer++ with an MLP behind it).

use hognose_core::ops::attention::{Attention, attention};
use hognose_core::ops::layout::split;
use hognose_core::ops::rotary::{Rotary, rotary};
use hognose_core::{Error, TensorId};

use super::Recorder;
use crate::mixers::AttentionConfig;
use crate::state::LayerState;

impl Recorder<'_> {
    /// u `[tokens, d_model]` → `[tokens, d_model]`: in_proj → (q, k, v); q and k turned by position → attention →
    /// out_proj.
    pub(super) fn attention(
        &mut self,
        layer: usize,
        name: &str,
        m: &AttentionConfig,
        widths: &LayerState,
        u: TensorId,
    ) -> Result<TensorId, Error> {
        let qkv = self.linear(u, &format!("{name}.mixer.in_proj"))?;
        let kv_width = m.kv_heads * m.headdim;
        let parts = split(&mut self.graph, qkv, &[m.heads * m.headdim, kv_width, kv_width])?;
        let (position, position_dest) = self.state(layer, "position", widths.width("position"));
        let (kv, kv_dest) = self.state(layer, "kv", widths.width("kv"));
        let segments = self.segments;
        let mut turn = |x| {
            if m.rotary() == 0 {
                return Ok(x);
            }
            let (dims, base) = (m.rotary(), m.rotary_base);
            rotary(&mut self.graph, Rotary { x, headdim: m.headdim, dims, base, position, segments })
        };
        let (q, k) = (turn(parts[0])?, turn(parts[1])?);
        let operands = Attention {
            q,
            k,
            v: parts[2],
            heads: m.heads,
            kv_heads: m.kv_heads,
            window: m.window,
            position,
            kv,
            segments,
        };
        let attended = attention(&mut self.graph, operands)?;
        self.store_state(attended.final_position, position_dest)?;
        self.store_state(attended.final_kv, kv_dest)?;
        self.linear(attended.y, &format!("{name}.mixer.out_proj"))
    }
}
