//! Blocks of 256 numbers whose parts have small scales of their own, in units of one scale of the block: ggml's k-quants.
//!
//! Encoding a part of numbers x with weights w looks for the scale s, the minimum m and the whole numbers q that make
//! Σ w (s · q − m − x)² small. For given s and m the best q are the nearest ones; for given q the best s and m solve a
//! linear system. So some ranges are tried as a start, each is improved once in this way, and the best is kept; when
//! scale and minimum have been rounded to their few bits, their neighbours are tried, too. Large numbers count more.

use super::{f16_at, inverse, nearest, put_f16};

/// Ranges that are tried for a part, from a little less than its own to a little more.
const TRIALS: usize = 21;
/// What a trial adds to the number of steps that the part's range is cut into.
const TRIAL_STEP: f32 = 0.1;

/// Scales and minima of eight parts, 6 bits each, in 12 bytes.
fn six_bits(packed: &[u8], part: usize) -> (u8, u8) {
    let p = packed;
    match part {
        0..4 => (p[part] & 63, p[part + 4] & 63),
        _ => {
            let low = p[part + 4];
            (low & 15 | (p[part - 4] >> 6) << 4, low >> 4 | (p[part] >> 6) << 4)
        }
    }
}

/// The inverse of [`six_bits`].
fn pack_six_bits(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    std::array::from_fn(|i| match i {
        0..4 => scales[i] | (scales[i + 4] >> 4) << 6,
        4..8 => mins[i - 4] | (mins[i] >> 4) << 6,
        _ => scales[i - 4] & 15 | (mins[i - 4] & 15) << 4,
    })
}

/// d, e, scales and minima, then 128 bytes: of each 32 the low halves are one part, the high halves the next.
pub(super) fn decode_q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    decode_affine(block, &block[16..], |_, _| 0, out);
}

/// As Q4_K, with 32 bytes of fifth bits before the lower four: bit p of byte i belongs to number i of part p.
pub(super) fn decode_q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    decode_affine(block, &block[48..], |part, i| (block[16 + i] >> part & 1) << 4, out);
}

#[inline(always)]
fn decode_affine(head: &[u8], four: &[u8], fifth: impl Fn(usize, usize) -> u8, out: &mut [f32; 256]) {
    let (d, e) = (f16_at(head, 0), f16_at(head, 2));
    for (part, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = six_bits(&head[4..16], part);
        let (scale, min) = (d * f32::from(scale), e * f32::from(min));
        let shift = part % 2 * 4;
        for (i, (out, q)) in out.iter_mut().zip(&four[part / 2 * 32..][..32]).enumerate() {
            *out = scale * f32::from(q >> shift & 15 | fifth(part, i)) - min;
        }
    }
}

/// 128 bytes with the lower four bits, 64 with the upper two, 16 signed scales, d. Each half of 128 numbers has 64 and 32
/// of these bytes: numbers i, i + 32, i + 64 and i + 96 share the upper byte i, the lower ones lie at i and i + 32.
pub(super) fn decode_q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = f16_at(block, 208);
    for (part, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(scales[part] as i8);
        let (lower, shift, upper, place) = six_bit_places(part);
        for (i, out) in out.iter_mut().enumerate() {
            let q = low[lower + i] >> shift & 15 | (high[upper + i] >> place & 3) << 4;
            *out = scale * (f32::from(q) - 32.0);
        }
    }
}

/// Where the bits of a part of 16 numbers of Q6_K are: first lower byte and shift, first upper byte and shift.
fn six_bit_places(part: usize) -> (usize, usize, usize, usize) {
    let (half, quarter, sixteen) = (part / 8, part % 8 / 2, part % 2);
    (half * 64 + quarter % 2 * 32 + sixteen * 16, quarter / 2 * 4, half * 32 + sixteen * 16, quarter * 2)
}

/// Scale, minimum and numbers of a part of 32 of Q4_K, all in their few bits.
pub(crate) fn part_of_q4_k(block: &[u8; 144], part: usize) -> (u8, u8, [u8; 32]) {
    let (scale, min) = six_bits(&block[4..16], part);
    let four = &block[16 + part / 2 * 32..];
    (scale, min, std::array::from_fn(|i| four[i] >> (part % 2 * 4) & 15))
}

/// Scale and numbers (32 more than they stand for) of a part of 16 of Q6_K.
pub(crate) fn part_of_q6_k(block: &[u8; 210], part: usize) -> (i8, [u8; 16]) {
    let (lower, shift, upper, place) = six_bit_places(part);
    let q = |i: usize| block[lower + i] >> shift & 15 | (block[128 + upper + i] >> place & 3) << 4;
    (block[192 + part] as i8, std::array::from_fn(q))
}

pub(super) fn encode_q4_k(values: &[f32; 256], block: &mut [u8; 144]) {
    const LARGEST: f32 = 15.0;
    let parts = values.as_chunks::<32>().0;
    let weights: [[f32; 32]; 8] = std::array::from_fn(|p| affine_weights(&parts[p]));
    let wanted: [(f32, f32); 8] = std::array::from_fn(|p| affine(&parts[p], &weights[p], LARGEST));
    let d = put_f16(block, 0, wanted.iter().fold(0.0, |m, w| w.0.max(m)) / 63.0);
    let e = put_f16(block, 2, wanted.iter().fold(0.0, |m, w| w.1.max(m)) / 63.0);
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for (part, &(scale, min)) in wanted.iter().enumerate() {
        let near = |x: f32, unit: f32| {
            let middle = nearest((x * inverse(unit)).clamp(0.0, 63.0));
            [-1.0, 0.0, 1.0].map(|step| (middle + step).clamp(0.0, 63.0))
        };
        let mut best = f32::INFINITY;
        for s in near(scale, d) {
            for m in near(min, e) {
                let error = affine_error(&parts[part], &weights[part], d * s, e * m, LARGEST);
                if error < best {
                    (best, scales[part], mins[part]) = (error, s as u8, m as u8);
                }
            }
        }
    }
    block[4..16].copy_from_slice(&pack_six_bits(&scales, &mins));
    for (pair, out) in block[16..].as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let [low, high] = [2 * pair, 2 * pair + 1].map(|part| {
            let (scale, min) = (d * f32::from(scales[part]), e * f32::from(mins[part]));
            let inverse = inverse(scale);
            parts[part].map(|x| nearest(((x + min) * inverse).clamp(0.0, LARGEST)) as u8)
        });
        for (out, (low, high)) in out.iter_mut().zip(low.iter().zip(high)) {
            *out = low | high << 4;
        }
    }
}

/// How much each number counts: its magnitude and that of its neighbours.
fn affine_weights(x: &[f32; 32]) -> [f32; 32] {
    let rms = (x.iter().map(|v| v * v).sum::<f32>() / 32.0).sqrt();
    x.map(|v| rms + v.abs())
}

/// Σ w (s · q − m − x)² with the nearest q from 0 to `largest`.
#[inline(always)]
fn affine_error(x: &[f32; 32], w: &[f32; 32], scale: f32, min: f32, largest: f32) -> f32 {
    let inverse = inverse(scale);
    let mut sums = [0.0f32; 8];
    for (x, w) in x.as_chunks::<8>().0.iter().zip(w.as_chunks::<8>().0) {
        for i in 0..8 {
            let q = nearest(((x[i] + min) * inverse).clamp(0.0, largest));
            let error = scale * q - min - x[i];
            sums[i] += w[i] * error * error;
        }
    }
    sums.iter().sum()
}

/// Scale and minimum (both at least 0) for a part.
fn affine(x: &[f32; 32], w: &[f32; 32], largest: f32) -> (f32, f32) {
    let low = x.iter().fold(0.0f32, |m, &v| m.min(v));
    let high = x.iter().fold(0.0f32, |m, &v| m.max(v));
    let range = high - low;
    if range == 0.0 {
        return (0.0, 0.0);
    }
    let mut best = (range / largest, -low);
    let mut error = affine_error(x, w, best.0, best.1, largest);
    let (sum_w, sum_wx) = x.iter().zip(w).fold((0.0, 0.0), |s, (x, w)| (s.0 + w, s.1 + w * x));
    for trial in 0..TRIALS {
        let steps = largest + TRIAL_STEP * (trial as f32 - (TRIALS / 2) as f32);
        let inverse = steps / range;
        // Sums of w q, w q² and w q x.
        let (mut wq, mut wqq, mut wqx) = ([0.0f32; 8], [0.0f32; 8], [0.0f32; 8]);
        for (x, w) in x.as_chunks::<8>().0.iter().zip(w.as_chunks::<8>().0) {
            for i in 0..8 {
                let q = nearest(((x[i] - low) * inverse).clamp(0.0, largest));
                wq[i] += w[i] * q;
                wqq[i] += w[i] * q * q;
                wqx[i] += w[i] * q * x[i];
            }
        }
        let [wq, wqq, wqx] = [wq, wqq, wqx].map(|s| s.iter().sum::<f32>());
        let determinant = sum_w * wqq - wq * wq;
        if determinant <= 0.0 {
            continue;
        }
        let mut scale = (sum_w * wqx - sum_wx * wq) / determinant;
        let mut min = (wq * wqx - wqq * sum_wx) / determinant;
        if min < 0.0 {
            (scale, min) = (wqx / wqq, 0.0);
        }
        if scale > 0.0 {
            let found = affine_error(x, w, scale, min, largest);
            if found < error {
                (error, best) = (found, (scale, min));
            }
        }
    }
    best
}

pub(super) fn encode_q6_k(values: &[f32; 256], block: &mut [u8; 210]) {
    let parts = values.as_chunks::<16>().0;
    let wanted: [f32; 16] = std::array::from_fn(|p| symmetric(&parts[p]));
    // The part with the largest scale gets −128, whatever its sign.
    let largest = wanted.iter().fold(0.0f32, |m, &s| if s.abs() > m.abs() { s } else { m });
    let d = put_f16(block, 208, -largest / 128.0);
    block[..192].fill(0);
    for (part, x) in parts.iter().enumerate() {
        let middle = nearest((wanted[part] * inverse(d)).clamp(-128.0, 127.0));
        let (mut best, mut scale) = (f32::INFINITY, 0.0);
        for s in [-1.0, 0.0, 1.0].map(|step| (middle + step).clamp(-128.0, 127.0)) {
            let error = symmetric_error(x, d * s);
            if error < best {
                (best, scale) = (error, s);
            }
        }
        block[192 + part] = scale as i8 as u8;
        let inverse = inverse(d * scale);
        let (lower, shift, upper, place) = six_bit_places(part);
        for (i, x) in x.iter().enumerate() {
            let q = (nearest((x * inverse).clamp(-32.0, 31.0)) + 32.0) as u8;
            block[lower + i] |= (q & 15) << shift;
            block[128 + upper + i] |= (q >> 4) << place;
        }
    }
}

/// Σ x² (s · q − x)² with the nearest q.
#[inline(always)]
fn symmetric_error(x: &[f32; 16], scale: f32) -> f32 {
    let inverse = inverse(scale);
    let mut sums = [0.0f32; 8];
    for x in x.as_chunks::<8>().0 {
        for i in 0..8 {
            let error = scale * nearest((x[i] * inverse).clamp(-32.0, 31.0)) - x[i];
            sums[i] += x[i] * x[i] * error * error;
        }
    }
    sums.iter().sum()
}

/// The scale of a part: negative where the largest magnitude is positive, since q reaches further down.
fn symmetric(x: &[f32; 16]) -> f32 {
    let largest = x.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    if largest == 0.0 {
        return 0.0;
    }
    let mut best = -largest / 32.0;
    let mut error = symmetric_error(x, best);
    for trial in 0..TRIALS {
        let steps = 32.0 + TRIAL_STEP * (trial as f32 - (TRIALS / 2) as f32);
        let inverse = -steps / largest;
        let (mut qq, mut qx) = (0.0, 0.0);
        for &x in x {
            let q = nearest((x * inverse).clamp(-32.0, 31.0));
            qq += x * x * q * q;
            qx += x * x * q * x;
        }
        if qq > 0.0 {
            let found = symmetric_error(x, qx / qq);
            if found < error {
                (error, best) = (found, qx / qq);
            }
        }
    }
    best
}
