//! What can go wrong while recording, planning or running a graph.

use crate::dtype::DType;

/// An error of the core: a sentence that says what was expected and what was found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operand of another shape.
    #[error("{op}: {what} must be {expected}, but is {found}")]
    Shape { op: &'static str, what: &'static str, expected: String, found: String },
    /// An operand of another element type.
    #[error("{op}: {what} must hold {expected}, but holds {found}")]
    Type { op: &'static str, what: &'static str, expected: DType, found: DType },
    /// Something that the op does not compute.
    #[error("{op}: {message}")]
    Unsupported { op: &'static str, message: String },
    /// Segments that cannot be.
    #[error("pack: {0}")]
    Pack(String),
    /// A graph that cannot be planned, or bindings and an arena that do not belong to the plan.
    #[error("plan: {0}")]
    Plan(String),
    /// Memory that is too small for the external tensor `name`, or that overlaps another one's.
    #[error("binding of {name}: {message}")]
    Binding { name: String, message: String },
    /// The arena or a buffer does not fit into what is free.
    #[error(
        "not enough memory: {needed} are needed, {available} are available; a shorter --length, a smaller --batch or more recomputation lowers the need"
    )]
    Memory { needed: String, available: String },
    /// What a GPU, its driver or its libraries refuse.
    #[error("CUDA: {0}")]
    Cuda(String),
    /// The instruction set that was asked for is not there.
    #[error(transparent)]
    Isa(#[from] crate::cpu::isa::IsaError),
}

/// Bytes as a person reads them: `1.5 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}
