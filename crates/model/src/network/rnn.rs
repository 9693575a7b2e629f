//! LSTM and GRU as layers.

use hognose_core::ops::rnn::{RnnScan, rnn_scan};
use hognose_core::{Error, TensorId};

use super::Recorder;
use crate::mixers::RnnConfig;
use crate::state::LayerState;

impl Recorder<'_> {
    /// u `[tokens, d_model]` → `[tokens, d_model]`: in_proj → what the input adds to the gates → recurrence → out_proj.
    pub(super) fn rnn<const GATES: usize>(
        &mut self,
        layer: usize,
        name: &str,
        m: &RnnConfig<GATES>,
        widths: &LayerState,
        u: TensorId,
    ) -> Result<TensorId, Error> {
        let x = self.linear(u, &format!("{name}.mixer.in_proj"))?;
        let (initial_state, state_dest) = self.state(layer, "rnn", widths.width("rnn"));
        let rnn = RnnScan {
            cell: m.cell(),
            x,
            weight: self.param(&format!("{name}.mixer.hidden.weight")),
            bias: self.optional_param(&format!("{name}.mixer.hidden.bias")),
            initial_state,
            segments: self.segments,
        };
        let scanned = rnn_scan(&mut self.graph, rnn)?;
        self.store_state(scanned.final_state, state_dest)?;
        self.linear(scanned.y, &format!("{name}.mixer.out_proj"))
    }
}
