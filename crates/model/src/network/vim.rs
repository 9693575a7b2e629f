//! Mamba-1 in both directions (Vim, arXiv 2401.09417, algorithm 1).

use hognose_core::ops::elementwise::add;
use hognose_core::ops::layout::split;
use hognose_core::ops::reverse_rows::reverse_rows;
use hognose_core::{Error, TensorId};

use super::{Recorder, States};
use crate::mixers::VimConfig;

impl Recorder<'_> {
    /// u `[tokens, d_model]` → `[tokens, d_model]`: in_proj → (x, z), as they are and reversed, each through conv + SiLU → S6 →
    /// ⊙ silu(z); the sum of the one and of the other reversed back → out_proj.
    pub(super) fn vim(&mut self, name: &str, m: &VimConfig, u: TensorId) -> Result<TensorId, Error> {
        if self.states == States::Carried {
            let message =
                "reads a sequence in both directions, so no state is carried from one window to the next".into();
            return Err(Error::Unsupported { op: "vim", message });
        }
        let direction = m.direction();
        let xz = self.linear(u, &format!("{name}.mixer.in_proj"))?;
        let halves = [m.d_inner, m.d_inner];
        let parts = split(&mut self.graph, xz, &halves)?;
        let forwards = self.selective(name, &direction, None, parts[0], parts[1])?;
        let reversed = reverse_rows(&mut self.graph, xz, self.segments)?;
        let parts = split(&mut self.graph, reversed, &halves)?;
        let name_back = if m.tied { name.to_string() } else { format!("{name}.reverse") };
        let backwards = self.selective(&name_back, &direction, None, parts[0], parts[1])?;
        let backwards = reverse_rows(&mut self.graph, backwards, self.segments)?;
        let y = add(&mut self.graph, forwards, backwards)?;
        self.linear(y, &format!("{name}.mixer.out_proj"))
    }
}
