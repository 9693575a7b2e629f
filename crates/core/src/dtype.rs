//! Element types. Three are enough: f32 for states, Δ, norms and masters, bf16 for matrix products and stored
//! activations, i32 for token ids and segment offsets (docs/precision.md).

use half::bf16;

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision, 4 bytes.
    F32,
    /// The upper half of an f32, 2 bytes.
    BF16,
    /// Signed 32-bit integers: token ids, offsets, row numbers.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::BF16 => 2,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
        })
    }
}

/// A Rust type that a tensor can hold: plain bytes, any bit pattern valid.
pub trait Element: Copy + Send + Sync + Default + 'static {
    /// The type's name at run time.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}
