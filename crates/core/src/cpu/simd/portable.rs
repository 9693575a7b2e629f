//! Arrays of eight, vectorised as far as the compiler sees fit.

use half::{bf16, f16};

use super::{Bytes, MAX_LANES, Simd};

/// The token for plain Rust: 8 lanes.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

/// Eight lanes, aligned so that the compiler may keep them in registers of any width.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
pub struct Lanes([f32; 8]);

/// A truth value per lane: all bits or none.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
pub struct Mask([u32; 8]);

#[inline(always)]
fn map(a: Lanes, f: impl Fn(f32) -> f32) -> Lanes {
    let mut out = a;
    for lane in &mut out.0 {
        *lane = f(*lane);
    }
    out
}

#[inline(always)]
fn zip(a: Lanes, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    let mut out = a;
    for (lane, b) in out.0.iter_mut().zip(b.0) {
        *lane = f(*lane, b);
    }
    out
}

#[inline(always)]
fn compare(a: Lanes, b: Lanes, f: impl Fn(&f32, &f32) -> bool) -> Mask {
    Mask(std::array::from_fn(|i| u32::from(f(&a.0[i], &b.0[i])).wrapping_neg()))
}

/// The nearest integer, ties to even: adding and taking away 2²³ leaves no bits for a fraction. (The library's
/// function is a call on x86-64 without SSE4.1.)
#[inline(always)]
fn round(x: f32) -> f32 {
    const NO_FRACTION: f32 = 8_388_608.0;
    let shift = NO_FRACTION.copysign(x);
    let rounded = ((x + shift) - shift).copysign(x);
    if x.abs() < NO_FRACTION { rounded } else { x }
}

/// 2ⁿ for −126 ≤ n ≤ 127.
#[inline(always)]
fn power(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// Sums or maxima by halves.
#[inline(always)]
fn tree(v: Lanes, f: impl Fn(f32, f32) -> f32) -> f32 {
    let v = v.0;
    let four: [f32; 4] = std::array::from_fn(|i| f(v[i], v[i + 4]));
    f(f(four[0], four[2]), f(four[1], four[3]))
}

impl Simd for Portable {
    const LANES: usize = 8;
    const REGISTERS: usize = 8;
    type V = Lanes;
    type M = Mask;

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        Lanes([x; 8])
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Lanes {
        // SAFETY: the caller vouches for 8 values.
        Lanes(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Lanes) {
        // SAFETY: the caller vouches for room for 8 values.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(v.0) }
    }

    #[inline(always)]
    unsafe fn load_partial(self, from: *const f32, n: usize) -> Lanes {
        let mut out = Lanes([0.0; 8]);
        // SAFETY: the caller vouches for n <= 8 values.
        unsafe { std::ptr::copy_nonoverlapping(from, out.0.as_mut_ptr(), n) };
        out
    }

    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, v: Lanes, n: usize) {
        // SAFETY: the caller vouches for room for n <= 8 values.
        unsafe { std::ptr::copy_nonoverlapping(v.0.as_ptr(), to, n) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Lanes {
        // SAFETY: the caller vouches for 8 values, and bf16 is 16 bits and nothing else.
        let bits = unsafe { from.cast::<[u16; 8]>().read_unaligned() };
        Lanes(bits.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(self, from: *const bf16) -> (Lanes, Lanes) {
        // SAFETY: the caller vouches for 16 values, and bf16 is 16 bits and nothing else.
        let bits = unsafe { from.cast::<[[u16; 2]; 8]>().read_unaligned() };
        let widen = |bits: u16| f32::from_bits(u32::from(bits) << 16);
        (Lanes(bits.map(|pair| widen(pair[0]))), Lanes(bits.map(|pair| widen(pair[1]))))
    }

    #[inline(always)]
    fn transpose(self, rows: [Lanes; MAX_LANES]) -> [Lanes; MAX_LANES] {
        let mut out = rows;
        for (i, row) in rows[..8].iter().enumerate() {
            for (j, column) in out[..8].iter_mut().enumerate() {
                column.0[i] = row.0[j];
            }
        }
        out
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, v: Lanes) {
        // SAFETY: the caller vouches for room for 8 values.
        unsafe { to.cast::<[bf16; 8]>().write_unaligned(v.0.map(bf16::from_f32)) }
    }

    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        self.add(self.mul(a, b), c)
    }

    #[inline(always)]
    fn neg(self, a: Lanes) -> Lanes {
        map(a, |a| -a)
    }

    #[inline(always)]
    fn abs(self, a: Lanes) -> Lanes {
        map(a, f32::abs)
    }

    #[inline(always)]
    fn min(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn max(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn sqrt(self, a: Lanes) -> Lanes {
        map(a, f32::sqrt)
    }

    #[inline(always)]
    fn floor(self, a: Lanes) -> Lanes {
        map(a, |a| {
            let nearest = round(a);
            if nearest > a { nearest - 1.0 } else { nearest }
        })
    }

    #[inline(always)]
    fn round(self, a: Lanes) -> Lanes {
        map(a, round)
    }

    #[inline(always)]
    fn scale2(self, v: Lanes, n: Lanes) -> Lanes {
        // 2ⁿ in two factors, each of them normal; the first product is exact.
        zip(v, n, |v, n| {
            let n = n.clamp(-252.0, 252.0) as i32;
            let half = n >> 1;
            v * power(half) * power(n - half)
        })
    }

    #[inline(always)]
    fn scale2_normal(self, v: Lanes, rounded: Lanes) -> Lanes {
        // The exponent grows by the lowest bits of `rounded`; those above them are zero.
        zip(v, rounded, |v, rounded| f32::from_bits(v.to_bits().wrapping_add(rounded.to_bits() << 23)))
    }

    #[inline(always)]
    fn split_exponent(self, v: Lanes) -> (Lanes, Lanes) {
        const SQRT_HALF: u32 = std::f32::consts::FRAC_1_SQRT_2.to_bits();
        let offset = v.0.map(|v| v.to_bits().wrapping_sub(SQRT_HALF));
        let mantissa = offset.map(|bits| f32::from_bits((bits & 0x007f_ffff) + SQRT_HALF));
        (Lanes(mantissa), Lanes(offset.map(|bits| (bits as i32 >> 23) as f32)))
    }

    #[inline(always)]
    fn lt(self, a: Lanes, b: Lanes) -> Mask {
        compare(a, b, f32::lt)
    }

    #[inline(always)]
    fn gt(self, a: Lanes, b: Lanes) -> Mask {
        compare(a, b, f32::gt)
    }

    #[inline(always)]
    fn select(self, m: Mask, yes: Lanes, no: Lanes) -> Lanes {
        Lanes(std::array::from_fn(|i| f32::from_bits((yes.0[i].to_bits() & m.0[i]) | (no.0[i].to_bits() & !m.0[i]))))
    }

    #[inline(always)]
    fn reduce_add(self, v: Lanes) -> f32 {
        tree(v, |a, b| a + b)
    }

    #[inline(always)]
    fn reduce_max(self, v: Lanes) -> f32 {
        tree(v, |a, b| if a > b { a } else { b })
    }
}

/// Eight lanes of four bytes.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
pub struct Quads([[u8; 4]; 8]);

/// Eight lanes of i32.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
pub struct Ints([i32; 8]);

impl Bytes for Portable {
    type B = Quads;
    type I = Ints;

    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> Quads {
        // SAFETY: the caller vouches for 32 bytes.
        Quads(unsafe { from.cast::<[[u8; 4]; 8]>().read_unaligned() })
    }

    #[inline(always)]
    fn splat_bytes(self, four: i32) -> Quads {
        Quads([four.to_le_bytes(); 8])
    }

    #[inline(always)]
    fn and(self, b: Quads, mask: u8) -> Quads {
        Quads(b.0.map(|four| four.map(|b| b & mask)))
    }

    #[inline(always)]
    fn or(self, a: Quads, b: Quads) -> Quads {
        Quads(std::array::from_fn(|i| std::array::from_fn(|j| a.0[i][j] | b.0[i][j])))
    }

    #[inline(always)]
    fn shift_left<const N: i32>(self, b: Quads) -> Quads {
        Quads(b.0.map(|four| four.map(|b| b << N)))
    }

    #[inline(always)]
    fn shift_right<const N: i32>(self, b: Quads) -> Quads {
        Quads(b.0.map(|four| four.map(|b| b >> N)))
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Ints {
        Ints([x; 8])
    }

    #[inline(always)]
    fn dot(self, sums: Ints, w: Quads, x: Quads) -> Ints {
        // Up to 127 a byte is the same with a sign.
        self.signed_dot(sums, w, x)
    }

    #[inline(always)]
    fn signed_dot(self, sums: Ints, w: Quads, x: Quads) -> Ints {
        let product = |i: usize, j: usize| i32::from(w.0[i][j] as i8) * i32::from(x.0[i][j] as i8);
        Ints(std::array::from_fn(|i| sums.0[i] + product(i, 0) + product(i, 1) + product(i, 2) + product(i, 3)))
    }

    #[inline(always)]
    fn signed_start(self, _: i32) -> Ints {
        Ints([0; 8])
    }

    #[inline(always)]
    fn to_float(self, i: Ints) -> Lanes {
        Lanes(i.0.map(|i| i as f32))
    }

    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> Lanes {
        // SAFETY: the caller vouches for 8 bytes.
        Lanes(unsafe { from.cast::<[u8; 8]>().read_unaligned() }.map(f32::from))
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const u8) -> Lanes {
        // SAFETY: the caller vouches for 8 bytes.
        Lanes(unsafe { from.cast::<[i8; 8]>().read_unaligned() }.map(f32::from))
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> Lanes {
        // SAFETY: the caller vouches for 16 bytes.
        Lanes(unsafe { from.cast::<[u16; 8]>().read_unaligned() }.map(|bits| f16::from_bits(bits).to_f32()))
    }
}
