//! 64-bit ARM.

#![allow(unused_unsafe, reason = "NEON is a part of the usual 64-bit ARM targets, where intrinsics are safe to call")]

use core::arch::aarch64::*;

use half::bf16;

use super::{Bytes, MAX_LANES, Simd};

/// The token for NEON: 4 lanes.
#[derive(Clone, Copy, Debug)]
pub struct Neon(());

impl Neon {
    /// # Safety
    /// The machine has NEON.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn new_unchecked() -> Neon {
        Neon(())
    }
}

/// Methods that are one expression of intrinsics.
macro_rules! methods {
    ($(fn $name:ident$(<const $n:ident: i32>)?(self $(, $arg:ident: $type:ty)*) -> $out:ty { $body:expr })*) => {$(
        #[inline(always)]
        fn $name$(<const $n: i32>)?(self $(, $arg: $type)*) -> $out {
            // SAFETY: the token exists only where the machine has the instructions.
            unsafe { $body }
        }
    )*};
}

/// Unsafe methods over pointers that are one expression of intrinsics.
macro_rules! pointer_methods {
    ($(fn $name:ident(self $(, $arg:ident: $type:ty)*) $(-> $out:ty)? { $body:expr })*) => {$(
        #[inline(always)]
        unsafe fn $name(self $(, $arg: $type)*) $(-> $out)? {
            // SAFETY: the token exists only where the machine has the instructions; the caller vouches for the
            // pointer.
            unsafe { $body }
        }
    )*};
}

impl Simd for Neon {
    const LANES: usize = 4;
    const REGISTERS: usize = 32;
    type V = float32x4_t;
    type M = uint32x4_t;

    pointer_methods! {
        fn load(self, from: *const f32) -> float32x4_t { vld1q_f32(from) }
        fn store(self, to: *mut f32, v: float32x4_t) { vst1q_f32(to, v) }
        fn load_partial(self, from: *const f32, n: usize) -> float32x4_t {{
            let mut whole = [0.0f32; 4];
            std::ptr::copy_nonoverlapping(from, whole.as_mut_ptr(), n);
            vld1q_f32(whole.as_ptr())
        }}
        fn store_partial(self, to: *mut f32, v: float32x4_t, n: usize) {{
            let mut whole = [0.0f32; 4];
            vst1q_f32(whole.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(whole.as_ptr(), to, n)
        }}
        fn load_bf16(self, from: *const bf16) -> float32x4_t {
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(from.cast()))))
        }
        fn load_bf16_pairs(self, from: *const bf16) -> (float32x4_t, float32x4_t) {{
            let pairs = vreinterpretq_u32_u16(vld1q_u16(from.cast()));
            let odd = vandq_u32(pairs, vdupq_n_u32(0xffff_0000));
            (vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)), vreinterpretq_f32_u32(odd))
        }}
        fn store_bf16(self, to: *mut bf16, v: float32x4_t) {{
            // Half a unit less one is added, and one more where the last kept bit is odd; a NaN keeps its upper
            // bits and becomes quiet.
            let bits = vreinterpretq_u32_f32(v);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
            let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
            vst1_u16(to.cast(), vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(v, v), rounded, quiet)))
        }}
    }

    methods! {
        fn transpose(self, rows: [float32x4_t; MAX_LANES]) -> [float32x4_t; MAX_LANES] {{
            let mut out = rows;
            let (a, b) = (vtrn1q_f32(rows[0], rows[1]), vtrn2q_f32(rows[0], rows[1]));
            let (c, d) = (vtrn1q_f32(rows[2], rows[3]), vtrn2q_f32(rows[2], rows[3]));
            out[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
            out[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
            out[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
            out[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
            out
        }}
        fn splat(self, x: f32) -> float32x4_t { vdupq_n_f32(x) }
        fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t { vaddq_f32(a, b) }
        fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t { vsubq_f32(a, b) }
        fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t { vmulq_f32(a, b) }
        fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t { vdivq_f32(a, b) }
        fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t { vfmaq_f32(c, a, b) }
        fn neg(self, a: float32x4_t) -> float32x4_t { vnegq_f32(a) }
        fn abs(self, a: float32x4_t) -> float32x4_t { vabsq_f32(a) }
        fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t { vbslq_f32(vcltq_f32(a, b), a, b) }
        fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t { vbslq_f32(vcgtq_f32(a, b), a, b) }
        fn sqrt(self, a: float32x4_t) -> float32x4_t { vsqrtq_f32(a) }
        fn floor(self, a: float32x4_t) -> float32x4_t { vrndmq_f32(a) }
        fn round(self, a: float32x4_t) -> float32x4_t { vrndnq_f32(a) }
        fn scale2(self, v: float32x4_t, n: float32x4_t) -> float32x4_t {{
            // 2ⁿ in two factors, each of them normal; the first product is exact.
            let n = vcvtq_s32_f32(vmaxq_f32(vminq_f32(n, vdupq_n_f32(252.0)), vdupq_n_f32(-252.0)));
            let half = vshrq_n_s32::<1>(n);
            vmulq_f32(vmulq_f32(v, power(half)), power(vsubq_s32(n, half)))
        }}
        fn scale2_normal(self, v: float32x4_t, rounded: float32x4_t) -> float32x4_t {{
            // The exponent grows by the lowest bits of `rounded`; those above them are zero.
            let exponent = vshlq_n_u32::<23>(vreinterpretq_u32_f32(rounded));
            vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(v), exponent))
        }}
        fn split_exponent(self, v: float32x4_t) -> (float32x4_t, float32x4_t) {{
            let least = vdupq_n_u32(std::f32::consts::FRAC_1_SQRT_2.to_bits());
            let offset = vsubq_u32(vreinterpretq_u32_f32(v), least);
            let exponent = vcvtq_f32_s32(vshrq_n_s32::<23>(vreinterpretq_s32_u32(offset)));
            let mantissa = vaddq_u32(vandq_u32(offset, vdupq_n_u32(0x007f_ffff)), least);
            (vreinterpretq_f32_u32(mantissa), exponent)
        }}
        fn lt(self, a: float32x4_t, b: float32x4_t) -> uint32x4_t { vcltq_f32(a, b) }
        fn gt(self, a: float32x4_t, b: float32x4_t) -> uint32x4_t { vcgtq_f32(a, b) }
        fn select(self, m: uint32x4_t, yes: float32x4_t, no: float32x4_t) -> float32x4_t { vbslq_f32(m, yes, no) }
        fn reduce_add(self, v: float32x4_t) -> f32 {{
            let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(v) + vget_lane_f32::<1>(v)
        }}
        fn reduce_max(self, v: float32x4_t) -> f32 { vmaxvq_f32(v) }
    }
}

impl Bytes for Neon {
    type B = uint8x16_t;
    type I = int32x4_t;

    pointer_methods! {
        fn load_bytes(self, from: *const u8) -> uint8x16_t { vld1q_u8(from) }
        fn load_u8(self, from: *const u8) -> float32x4_t {{
            let four = vcreate_u8(u64::from(from.cast::<u32>().read_unaligned()));
            vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four))))
        }}
        fn load_i8(self, from: *const u8) -> float32x4_t {{
            let four = vcreate_s8(u64::from(from.cast::<u32>().read_unaligned()));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(four))))
        }}
        fn load_f16(self, from: *const u8) -> float32x4_t {{
            // Exponents of f32 are biased by 112 more; the multiplication is exact, also for denormal numbers. What is
            // not finite gets the exponent of such numbers.
            let bits = vmovl_u16(vld1_u16(from.cast()));
            let magnitude = vshlq_n_u32::<13>(vandq_u32(bits, vdupq_n_u32(0x7fff)));
            let scaled = vmulq_f32(vreinterpretq_f32_u32(magnitude), vdupq_n_f32(f32::from_bits((127 + 112) << 23)));
            let infinite = vandq_u32(vcgeq_u32(magnitude, vdupq_n_u32(0x7c00 << 13)), vdupq_n_u32(0x7f80_0000));
            let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
            vreinterpretq_f32_u32(vorrq_u32(vorrq_u32(vreinterpretq_u32_f32(scaled), infinite), sign))
        }}
    }

    methods! {
        fn splat_bytes(self, four: i32) -> uint8x16_t { vreinterpretq_u8_s32(vdupq_n_s32(four)) }
        fn and(self, b: uint8x16_t, mask: u8) -> uint8x16_t { vandq_u8(b, vdupq_n_u8(mask)) }
        fn or(self, a: uint8x16_t, b: uint8x16_t) -> uint8x16_t { vorrq_u8(a, b) }
        fn shift_left<const N: i32>(self, b: uint8x16_t) -> uint8x16_t { vshlq_n_u8::<N>(b) }
        fn shift_right<const N: i32>(self, b: uint8x16_t) -> uint8x16_t { vshrq_n_u8::<N>(b) }
        fn splat_int(self, x: i32) -> int32x4_t { vdupq_n_s32(x) }
        fn dot(self, sums: int32x4_t, w: uint8x16_t, x: uint8x16_t) -> int32x4_t {
            // Up to 127 a byte is the same with a sign.
            Neon(()).signed_dot(sums, w, x)
        }
        fn signed_dot(self, sums: int32x4_t, w: uint8x16_t, x: uint8x16_t) -> int32x4_t {{
            // Two products of up to 128 · 127 fit into 16 bits.
            let (w, x) = (vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x));
            let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
            let high = vmull_s8(vget_high_s8(w), vget_high_s8(x));
            vpadalq_s16(sums, vpaddq_s16(low, high))
        }}
        fn signed_start(self, _x: i32) -> int32x4_t { vdupq_n_s32(0) }
        fn to_float(self, i: int32x4_t) -> float32x4_t { vcvtq_f32_s32(i) }
    }
}

/// 2ⁿ for −126 ≤ n ≤ 127.
///
/// # Safety
/// The machine has NEON.
#[inline(always)]
unsafe fn power(n: int32x4_t) -> float32x4_t {
    // SAFETY: the caller vouches for the instructions.
    unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127)))) }
}
