//! Element types. Three are enough to compute with: f32 for states, Δ, norms and masters, bf16 for matrix products and
//! stored activations, i32 for token ids and segment offsets (docs/precision.md). Weights for inference may also lie in
//! blocks of few bits a number ([`crate::quant`]).

use half::bf16;

use crate::quant::Kind;

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // the names that everybody knows these blocks by
pub enum DType {
    /// IEEE single precision, 4 bytes.
    F32,
    /// The upper half of an f32, 2 bytes.
    BF16,
    /// Signed 32-bit integers: token ids, offsets, row numbers.
    I32,
    /// Weights in blocks of 32: a scale and 8 bits a number.
    Q8_0,
    /// Weights in blocks of 256: scales and minima, and 4 bits a number.
    Q4_K,
    /// Weights in blocks of 256: scales, and 6 bits a number.
    Q6_K,
}

impl DType {
    /// Bytes of one element. Panics for types of blocks, whose elements have none of their own: where weights may be
    /// meant, use [`DType::row_bytes`].
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::BF16 => 2,
            _ => panic!("an element of a block has no size of its own"),
        }
    }

    /// The blocks in which rows of this type lie, for types of blocks.
    pub const fn blocks(self) -> Option<Kind> {
        match self {
            DType::F32 | DType::BF16 | DType::I32 => None,
            DType::Q8_0 => Some(Kind::Q8_0),
            DType::Q4_K => Some(Kind::Q4_K),
            DType::Q6_K => Some(Kind::Q6_K),
        }
    }

    /// Bytes of a row of `cols` elements. A row starts with a block of its own, and its last block is filled up.
    pub const fn row_bytes(self, cols: usize) -> usize {
        match self.blocks() {
            Some(kind) => kind.row_bytes(cols),
            None => cols * self.size(),
        }
    }

    /// The type in which rows of this length are kept where this type is asked for: blocks of 256 fit multiples of 256
    /// only, other rows take Q8_0, the next finer type, whose blocks may be filled up.
    pub const fn for_rows_of(self, cols: usize) -> DType {
        match self {
            DType::Q4_K | DType::Q6_K if !cols.is_multiple_of(256) => DType::Q8_0,
            _ => self,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
            DType::Q8_0 => "q8_0",
            DType::Q4_K => "q4_k",
            DType::Q6_K => "q6_k",
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
