//! The gated MLP that may follow a mixer: fc2(y ⊙ silu(gate)) with fc1(x) = (y, gate).

use hognose_core::ops::swiglu::swiglu;
use hognose_core::{Error, TensorId};

use super::Recorder;

impl Recorder<'_> {
    /// x `[tokens, d_model]` → `[tokens, d_model]`.
    pub(super) fn mlp(&mut self, name: &str, x: TensorId) -> Result<TensorId, Error> {
        let y_gate = self.linear(x, &format!("{name}.mlp.fc1"))?;
        let gated = swiglu(&mut self.graph, y_gate)?;
        self.linear(gated, &format!("{name}.mlp.fc2"))
    }
}
