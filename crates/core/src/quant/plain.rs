//! Blocks of 32 numbers with one scale, and perhaps one minimum.

use super::{f16_at, inverse, nearest, put_f16};

/// d, then 16 bytes: low halves are numbers 0 to 15, high halves 16 to 31; less 8.
pub(super) fn decode_q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for (&q, (low, high)) in block[2..].iter().zip(low.iter_mut().zip(high)) {
        *low = d * (f32::from(q & 15) - 8.0);
        *high = d * (f32::from(q >> 4) - 8.0);
    }
}

/// d, m, then as in Q4_0.
pub(super) fn decode_q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for (&q, (low, high)) in block[4..].iter().zip(low.iter_mut().zip(high)) {
        *low = d * f32::from(q & 15) + m;
        *high = d * f32::from(q >> 4) + m;
    }
}

/// d, 32 fifth bits, then the lower four as in Q4_0; less 16.
pub(super) fn decode_q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for (out, q) in out.iter_mut().zip(five_bits(&block[2..])) {
        *out = d * (f32::from(q) - 16.0);
    }
}

/// d, m, then as in Q5_0.
pub(super) fn decode_q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    for (out, q) in out.iter_mut().zip(five_bits(&block[4..])) {
        *out = d * f32::from(q) + m;
    }
}

/// Fifth bits of 32 numbers in 4 bytes, then their lower four.
fn five_bits(bytes: &[u8]) -> [u8; 32] {
    let fifth = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    std::array::from_fn(|i| {
        let both = bytes[4 + i % 16];
        let four = if i < 16 { both & 15 } else { both >> 4 };
        four | ((fifth >> i & 1) as u8) << 4
    })
}

/// d, then 32 signed bytes.
pub(super) fn decode_q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(q as i8);
    }
}

/// The largest magnitude becomes 127. Numbers are rounded with the scale as it is stored, so its own rounding costs
/// nothing but at the largest ones.
pub(super) fn encode_q8_0(values: &[f32; 32], block: &mut [u8; 34]) {
    let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let inverse = inverse(put_f16(block, 0, largest / 127.0));
    for (q, v) in block[2..].iter_mut().zip(values) {
        *q = nearest((v * inverse).clamp(-127.0, 127.0)) as i8 as u8;
    }
}
