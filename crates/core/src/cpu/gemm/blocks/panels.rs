//! How 16 rows of blocks lie together.
//!
//! Lines of 64 bytes hold four neighbouring numbers of each of the 16 rows, so a lane's sum takes the four of its row. In
//! order, of a block of the panel:
//! - Q8_0: 8 lines of signed bytes for its 32 numbers; 16 scales, f16.
//! - Q4_K: 16 scales d and 16 scales e, f16; then for each part of 32 numbers 4 lines with numbers i of the part's first
//!   half in the lower and of its second in the upper halves of the bytes; 16 scales and 16 minima, bytes.
//! - Q6_K: 16 scales d, f16; then for each part of 32 numbers 4 lines as those of Q4_K; 2 lines with the upper two bits: line
//!   h has numbers of lines 2h (first, second half) and 2h + 1; 2 · 16 scales of halves, signed bytes.

use half::f16;

use crate::dtype::DType;
use crate::quant;

/// Rows of a panel.
pub(super) const ROWS: usize = 16;
/// Bytes of a line: four numbers of each row.
pub(super) const LINE: usize = 4 * ROWS;

/// Q8_0: where the scales are; bytes of a block.
pub(super) const Q8_0_SCALES: usize = 8 * LINE;
pub(super) const Q8_0_BYTES: usize = Q8_0_SCALES + 2 * ROWS;
/// Q4_K: where the first part is, its bytes, where its scales and minima are in it.
pub(super) const Q4_K_PARTS: usize = 4 * ROWS;
pub(super) const Q4_K_SCALES: usize = 4 * LINE;
pub(super) const Q4_K_MINS: usize = Q4_K_SCALES + ROWS;
pub(super) const Q4_K_PART: usize = Q4_K_MINS + ROWS;
pub(super) const Q4_K_BYTES: usize = Q4_K_PARTS + 8 * Q4_K_PART;
/// Q6_K: where the first part is, its bytes, where its upper bits and its scales are in it.
pub(super) const Q6_K_PARTS: usize = 2 * ROWS;
pub(super) const Q6_K_UPPER: usize = 4 * LINE;
pub(super) const Q6_K_SCALES: usize = Q6_K_UPPER + 2 * LINE;
pub(super) const Q6_K_PART: usize = Q6_K_SCALES + 2 * ROWS;
pub(super) const Q6_K_BYTES: usize = Q6_K_PARTS + 8 * Q6_K_PART;

/// Numbers of a part.
const PART: usize = 32;

/// The type of blocks of a panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Panel {
    Q8,
    Q4,
    Q6,
}

impl Panel {
    pub fn of(dtype: DType) -> Panel {
        match dtype {
            DType::Q8_0 => Panel::Q8,
            DType::Q4_K => Panel::Q4,
            DType::Q6_K => Panel::Q6,
            DType::F32 | DType::BF16 | DType::I32 => panic!("{dtype} is not a type of blocks"),
        }
    }

    /// Numbers of a block of one row.
    pub fn len(self) -> usize {
        match self {
            Panel::Q8 => 32,
            Panel::Q4 | Panel::Q6 => 256,
        }
    }

    /// Bytes of a block of all rows.
    pub fn block_bytes(self) -> usize {
        match self {
            Panel::Q8 => Q8_0_BYTES,
            Panel::Q4 => Q4_K_BYTES,
            Panel::Q6 => Q6_K_BYTES,
        }
    }

    /// Blocks of rows of k numbers.
    pub fn blocks(self, k: usize) -> usize {
        k.div_ceil(self.len())
    }

    /// Bytes of a panel with rows of k numbers.
    pub fn bytes(self, k: usize) -> usize {
        self.blocks(k) * self.block_bytes()
    }

    /// Puts a row of blocks, as a file has it, into a panel of zeros.
    pub fn put(self, lane: usize, row: &[u8], to: &mut [u8]) {
        let to = to.chunks_exact_mut(self.block_bytes());
        match self {
            Panel::Q8 => row.as_chunks().0.iter().zip(to).for_each(|(block, to)| put_q8_0(block, lane, to)),
            Panel::Q4 => row.as_chunks().0.iter().zip(to).for_each(|(block, to)| put_q4_k(block, lane, to)),
            Panel::Q6 => row.as_chunks().0.iter().zip(to).for_each(|(block, to)| put_q6_k(block, lane, to)),
        }
    }

    /// Decodes the first numbers of a row.
    pub fn decode(self, lane: usize, panel: &[u8], out: &mut [f32]) {
        let (part, value): (usize, PartOf) = match self {
            Panel::Q8 => (PART, part_q8_0),
            Panel::Q4 => (PART, part_q4_k),
            Panel::Q6 => (PART / 2, part_q6_k),
        };
        for (block, out) in panel.chunks_exact(self.block_bytes()).zip(out.chunks_mut(self.len())) {
            for (index, out) in out.chunks_mut(part).enumerate() {
                let affine = value(block, lane, index);
                for (out, q) in out.iter_mut().zip(affine.q) {
                    *out = affine.scale * f32::from(q) - affine.min;
                }
            }
        }
    }
}

/// A part of a lane's block: the block, the lane, the part's number.
type PartOf = fn(&[u8], usize, usize) -> Affine;

/// Numbers scale · q − min.
struct Affine {
    scale: f32,
    min: f32,
    q: [i16; PART],
}

/// Byte of a line for number `i % 4` of a row; numbers 0..4 are in line 0.
fn at(lane: usize, i: usize) -> usize {
    i / 4 * LINE + 4 * lane + i % 4
}

fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn put_q8_0(block: &[u8; 34], lane: usize, to: &mut [u8]) {
    to[Q8_0_SCALES + 2 * lane..][..2].copy_from_slice(&block[..2]);
    for (i, &q) in block[2..].iter().enumerate() {
        to[at(lane, i)] = q;
    }
}

fn part_q8_0(block: &[u8], lane: usize, _: usize) -> Affine {
    let q = std::array::from_fn(|i| i16::from(block[at(lane, i)] as i8));
    Affine { scale: f16_at(block, Q8_0_SCALES + 2 * lane), min: 0.0, q }
}

fn put_q4_k(block: &[u8; 144], lane: usize, to: &mut [u8]) {
    to[2 * lane..][..2].copy_from_slice(&block[..2]);
    to[2 * ROWS + 2 * lane..][..2].copy_from_slice(&block[2..4]);
    for (part, to) in to[Q4_K_PARTS..].chunks_exact_mut(Q4_K_PART).enumerate() {
        let (scale, min, q) = quant::part_of_q4_k(block, part);
        (to[Q4_K_SCALES + lane], to[Q4_K_MINS + lane]) = (scale, min);
        for i in 0..PART / 2 {
            to[at(lane, i)] = q[i] | q[PART / 2 + i] << 4;
        }
    }
}

fn part_q4_k(block: &[u8], lane: usize, part: usize) -> Affine {
    let bytes = &block[Q4_K_PARTS + part * Q4_K_PART..][..Q4_K_PART];
    let q = std::array::from_fn(|i| i16::from(bytes[at(lane, i % 16)] >> (i / 16 * 4) & 15));
    let scale = f16_at(block, 2 * lane) * f32::from(bytes[Q4_K_SCALES + lane]);
    let min = f16_at(block, 2 * ROWS + 2 * lane) * f32::from(bytes[Q4_K_MINS + lane]);
    Affine { scale, min, q }
}

fn put_q6_k(block: &[u8; 210], lane: usize, to: &mut [u8]) {
    to[2 * lane..][..2].copy_from_slice(&block[208..]);
    for (part, to) in to[Q6_K_PARTS..].chunks_exact_mut(Q6_K_PART).enumerate() {
        for half in 0..2 {
            let (scale, q) = quant::part_of_q6_k(block, 2 * part + half);
            to[Q6_K_SCALES + half * ROWS + lane] = scale as u8;
            for (i, q) in q.into_iter().enumerate() {
                to[at(lane, i)] |= (q & 15) << (4 * half);
                let (line, shift) = upper(half, i / 4);
                to[Q6_K_UPPER + line * LINE + 4 * lane + i % 4] |= (q >> 4) << shift;
            }
        }
    }
}

/// Q6_K: the line with the upper bits of a half's numbers in line `j`, and where in its bytes.
fn upper(half: usize, j: usize) -> (usize, usize) {
    (j / 2, 4 * (j % 2) + 2 * half)
}

fn part_q6_k(block: &[u8], lane: usize, sixteen: usize) -> Affine {
    let (part, half) = (sixteen / 2, sixteen % 2);
    let bytes = &block[Q6_K_PARTS + part * Q6_K_PART..][..Q6_K_PART];
    let q = std::array::from_fn(|i| {
        let i = i % 16;
        let (line, shift) = upper(half, i / 4);
        let upper = bytes[Q6_K_UPPER + line * LINE + 4 * lane + i % 4] >> shift & 3;
        i16::from(bytes[at(lane, i)] >> (4 * half) & 15 | upper << 4) - 32
    });
    let scale = f16_at(block, 2 * lane) * f32::from(bytes[Q6_K_SCALES + half * ROWS + lane] as i8);
    Affine { scale, min: 0.0, q }
}
