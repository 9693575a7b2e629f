//! Weights in blocks of few bits a number, laid out as ggml has them.
//!
//! A row of a matrix is cut into blocks; a block has 16-bit scales of its own and its numbers as small integers. Eight
//! kinds are read; three are also written and computed with ([`DType::Q8_0`], [`DType::Q4_K`], [`DType::Q6_K`]). Rows
//! that the length of a block does not divide are filled up with zeros; only Q8_0 is used for such rows.
//!
//! Encoding chooses scales by least squares; what it may cost is stated by [`Q8_0_ERROR`] and the `_RMS` constants.

mod k;
mod plain;
#[cfg(test)]
mod tests;

use crate::dtype::DType;

pub(crate) use k::{part_of_q4_k, part_of_q6_k};

/// Q8_0: the largest error over the largest magnitude of a block, for scales that f16 holds as normal numbers.
pub const Q8_0_ERROR: f32 = 1.0 / 252.0;
/// Q8_0: root mean square of the errors over that of the numbers, for normally distributed ones.
pub const Q8_0_RMS: f32 = 0.0065;
/// The same of Q6_K.
pub const Q6_K_RMS: f32 = 0.02;
/// The same of Q4_K.
pub const Q4_K_RMS: f32 = 0.075;

/// A kind of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // the names that everybody knows these blocks by
pub enum Kind {
    /// 32 numbers d · q, q from −8 to 7.
    Q4_0,
    /// 32 numbers d · q + m, q from 0 to 15.
    Q4_1,
    /// 32 numbers d · q, q from −16 to 15.
    Q5_0,
    /// 32 numbers d · q + m, q from 0 to 31.
    Q5_1,
    /// 32 numbers d · q, q from −127 to 127.
    Q8_0,
    /// 256 numbers d · s · q − e · m, q from 0 to 15; s and m of 6 bits for 32 numbers each.
    Q4_K,
    /// As Q4_K, q from 0 to 31.
    Q5_K,
    /// 256 numbers d · s · q, q from −32 to 31; s of 8 bits for 16 numbers each.
    Q6_K,
}

impl Kind {
    /// Numbers of a block.
    pub const fn block_len(self) -> usize {
        match self {
            Kind::Q4_0 | Kind::Q4_1 | Kind::Q5_0 | Kind::Q5_1 | Kind::Q8_0 => 32,
            Kind::Q4_K | Kind::Q5_K | Kind::Q6_K => 256,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Kind::Q4_0 => 18,
            Kind::Q4_1 => 20,
            Kind::Q5_0 => 22,
            Kind::Q5_1 => 24,
            Kind::Q8_0 => 34,
            Kind::Q4_K => 144,
            Kind::Q5_K => 176,
            Kind::Q6_K => 210,
        }
    }

    /// Bytes of a row of `cols` numbers.
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols.div_ceil(self.block_len()) * self.block_bytes()
    }

    /// The type of blocks, among those that are computed with, in which numbers of this kind lie in memory: the same, or
    /// the next finer one.
    pub const fn computed_as(self) -> DType {
        match self {
            Kind::Q4_K => DType::Q4_K,
            Kind::Q4_0 | Kind::Q4_1 | Kind::Q5_0 | Kind::Q5_1 | Kind::Q5_K | Kind::Q6_K => DType::Q6_K,
            Kind::Q8_0 => DType::Q8_0,
        }
    }

    /// Decodes the first `out.len()` numbers of some blocks: a row, or a part of one that starts with a block.
    ///
    /// # Panics
    /// Where the blocks hold fewer numbers.
    pub fn decode(self, blocks: &[u8], out: &mut [f32]) {
        assert!(blocks.len() >= self.row_bytes(out.len()), "{} bytes for {} numbers", blocks.len(), out.len());
        match self {
            Kind::Q4_0 => each(blocks, out, plain::decode_q4_0),
            Kind::Q4_1 => each(blocks, out, plain::decode_q4_1),
            Kind::Q5_0 => each(blocks, out, plain::decode_q5_0),
            Kind::Q5_1 => each(blocks, out, plain::decode_q5_1),
            Kind::Q8_0 => each(blocks, out, plain::decode_q8_0),
            Kind::Q4_K => each(blocks, out, k::decode_q4_k),
            Kind::Q5_K => each(blocks, out, k::decode_q5_k),
            Kind::Q6_K => each(blocks, out, k::decode_q6_k),
        }
    }
}

/// Magnitudes beyond this cannot be encoded: 63 of the largest 16-bit scale is the lowest minimum of Q4_K, which reaches
/// least.
pub const LARGEST: f32 = 4e6;

/// Encodes a row, filled up with zeros to whole blocks. Magnitudes above [`LARGEST`] come out wrong, though finite:
/// callers refuse them.
///
/// # Panics
/// Where `to` has not [`DType::row_bytes`], or the type is none of blocks.
pub fn encode(dtype: DType, row: &[f32], to: &mut [u8]) {
    assert_eq!(to.len(), dtype.row_bytes(row.len()), "row_bytes are needed");
    match dtype {
        DType::Q8_0 => each_of(row, to, plain::encode_q8_0),
        DType::Q4_K => each_of(row, to, k::encode_q4_k),
        DType::Q6_K => each_of(row, to, k::encode_q6_k),
        DType::F32 | DType::BF16 | DType::I32 => panic!("{dtype} is not a type of blocks"),
    }
}

/// The blocks of a row of Q8_0 as row-major matrices in memory have them: the numbers of all blocks first, then their
/// scales. Pairs of blocks lie in turns of eight numbers, so that 16 bytes have the same eight columns of both: what a
/// thread of a GPU takes at once.
pub fn split_q8_0(blocks: &[u8], row: &mut [u8]) {
    let (blocks, _) = blocks.as_chunks::<34>();
    let (numbers, scales) = row.split_at_mut(32 * blocks.len());
    for (block, scale) in blocks.iter().zip(scales.chunks_exact_mut(2)) {
        scale.copy_from_slice(&block[..2]);
    }
    for (pair, numbers) in blocks.chunks(2).zip(numbers.chunks_mut(64)) {
        for (h, block) in pair.iter().enumerate() {
            for (q, eight) in block[2..].chunks(8).enumerate() {
                numbers[(pair.len() * q + h) * 8..][..8].copy_from_slice(eight);
            }
        }
    }
}

/// Decodes a row that [`split_q8_0`] made.
pub fn decode_split_q8_0(row: &[u8], out: &mut [f32]) {
    let (numbers, scales) = row.split_at(out.len().next_multiple_of(32));
    for (b, out) in out.chunks_mut(32).enumerate() {
        let pair = &numbers[b / 2 * 64..(b / 2 * 64 + 64).min(numbers.len())];
        let scale = f16_at(scales, 2 * b);
        for (i, out) in out.iter_mut().enumerate() {
            let q = pair[(pair.len() / 32 * (i / 8) + b % 2) * 8 + i % 8];
            *out = scale * f32::from(q as i8);
        }
    }
}

/// Decodes block after block; of the last one perhaps only the beginning is wanted.
fn each<const LEN: usize, const BYTES: usize>(
    blocks: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let (whole, rest) = out.as_chunks_mut::<LEN>();
    let (blocks, _) = blocks.as_chunks::<BYTES>();
    for (block, out) in blocks.iter().zip(&mut *whole) {
        decode(block, out);
    }
    if !rest.is_empty() {
        let mut last = [0.0; LEN];
        decode(&blocks[whole.len()], &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// Encodes block after block.
fn each_of<const LEN: usize, const BYTES: usize>(
    row: &[f32],
    to: &mut [u8],
    encode: impl Fn(&[f32; LEN], &mut [u8; BYTES]),
) {
    let (whole, rest) = row.as_chunks::<LEN>();
    let (blocks, _) = to.as_chunks_mut::<BYTES>();
    for (values, block) in whole.iter().zip(&mut *blocks) {
        encode(values, block);
    }
    if !rest.is_empty() {
        let mut last = [0.0; LEN];
        last[..rest.len()].copy_from_slice(rest);
        encode(&last, &mut blocks[whole.len()]);
    }
}

/// A 16-bit number of a block.
fn f16_at(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Stores a scale as f16 and returns what was stored: rounded away from 0, so that the largest number of the block stays
/// within reach also where f16 has few digits left; at most the largest finite one.
fn put_f16(block: &mut [u8], at: usize, value: f32) -> f32 {
    let limit = half::f16::MAX.to_f32();
    let value = value.clamp(-limit, limit);
    let near = half::f16::from_f32(value);
    let short = near.to_f32().abs() < value.abs();
    let stored = half::f16::from_bits(near.to_bits() + u16::from(short));
    block[at..at + 2].copy_from_slice(&stored.to_le_bytes());
    stored.to_f32()
}

/// 1/x, and 0 for 0.
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { x.recip() }
}

/// The nearest whole number, ties to even, of a magnitude below 2²²: what `round_ties_even` gives, but vectorised with
/// the instructions of any machine.
#[inline(always)]
fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 · 2²³: numbers of this size have no digits behind the point
    (x + SHIFT) - SHIFT
}
