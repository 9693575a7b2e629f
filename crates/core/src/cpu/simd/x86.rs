//! AVX-512 and AVX2 with FMA.

use core::arch::x86_64::*;

use half::bf16;

use super::{Bytes, MAX_LANES, Simd};

/// The token for AVX-512 F, BW, DQ and VL, and perhaps VNNI: 16 lanes.
#[derive(Clone, Copy, Debug)]
pub struct Avx512<const VNNI: bool = false>(());

/// The token for AVX2, FMA and F16C: 8 lanes.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl<const VNNI: bool> Avx512<VNNI> {
    /// # Safety
    /// The machine has AVX-512 F, BW, DQ and VL, AVX2, FMA and F16C; and AVX-512 VNNI where this says so.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn new_unchecked() -> Avx512<VNNI> {
        Avx512(())
    }
}

impl Avx2 {
    /// # Safety
    /// The machine has AVX2, FMA and F16C.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn new_unchecked() -> Avx2 {
        Avx2(())
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

/// The mask of the lowest `n` of 16 lanes.
#[inline(always)]
fn lowest(n: usize) -> __mmask16 {
    debug_assert!(n <= 16);
    ((1u32 << n) - 1) as __mmask16
}

/// The bits of √½, the least mantissa of `split_exponent`.
const SQRT_HALF: i32 = std::f32::consts::FRAC_1_SQRT_2.to_bits() as i32;

impl<const VNNI: bool> Simd for Avx512<VNNI> {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    type V = __m512;
    type M = __mmask16;

    pointer_methods! {
        fn load(self, from: *const f32) -> __m512 { _mm512_loadu_ps(from) }
        fn store(self, to: *mut f32, v: __m512) { _mm512_storeu_ps(to, v) }
        fn load_partial(self, from: *const f32, n: usize) -> __m512 { _mm512_maskz_loadu_ps(lowest(n), from) }
        fn store_partial(self, to: *mut f32, v: __m512, n: usize) { _mm512_mask_storeu_ps(to, lowest(n), v) }
        fn load_bf16(self, from: *const bf16) -> __m512 { widen_512(_mm256_loadu_si256(from.cast())) }
        fn load_bf16_pairs(self, from: *const bf16) -> (__m512, __m512) {{
            let pairs = _mm512_loadu_si512(from.cast());
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(odd))
        }}
        fn store_bf16(self, to: *mut bf16, v: __m512) { _mm256_storeu_si256(to.cast(), narrow_512(v)) }
        fn load_partial_bf16(self, from: *const bf16, n: usize) -> __m512 {
            widen_512(_mm256_maskz_loadu_epi16(lowest(n), from.cast()))
        }
        fn store_partial_bf16(self, to: *mut bf16, v: __m512, n: usize) {
            _mm256_mask_storeu_epi16(to.cast(), lowest(n), narrow_512(v))
        }
    }

    methods! {
        fn transpose(self, rows: [__m512; MAX_LANES]) -> [__m512; MAX_LANES] {{
            // Pairs of rows, pairs of pairs, then blocks of four lanes, twice: 64 shuffles.
            let mut a = rows;
            for i in (0..16).step_by(2) {
                a[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
                a[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
            }
            let mut b = a;
            for i in (0..16).step_by(4) {
                b[i] = unpack_low_512(a[i], a[i + 2]);
                b[i + 1] = unpack_high_512(a[i], a[i + 2]);
                b[i + 2] = unpack_low_512(a[i + 1], a[i + 3]);
                b[i + 3] = unpack_high_512(a[i + 1], a[i + 3]);
            }
            for i in 0..4 {
                a[i] = _mm512_shuffle_f32x4::<0x88>(b[i], b[i + 4]);
                a[i + 4] = _mm512_shuffle_f32x4::<0xdd>(b[i], b[i + 4]);
                a[i + 8] = _mm512_shuffle_f32x4::<0x88>(b[i + 8], b[i + 12]);
                a[i + 12] = _mm512_shuffle_f32x4::<0xdd>(b[i + 8], b[i + 12]);
            }
            for i in 0..4 {
                b[i] = _mm512_shuffle_f32x4::<0x88>(a[i], a[i + 8]);
                b[i + 8] = _mm512_shuffle_f32x4::<0xdd>(a[i], a[i + 8]);
                b[i + 4] = _mm512_shuffle_f32x4::<0x88>(a[i + 4], a[i + 12]);
                b[i + 12] = _mm512_shuffle_f32x4::<0xdd>(a[i + 4], a[i + 12]);
            }
            b
        }}
        fn bf16_pairs(self, even: __m512, odd: __m512) -> __m512 {{
            let (even, odd) = (rounded_512(even), rounded_512(odd));
            let upper = _mm512_and_si512(odd, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            _mm512_castsi512_ps(_mm512_or_si512(upper, _mm512_srli_epi32::<16>(even)))
        }}
        fn splat(self, x: f32) -> __m512 { _mm512_set1_ps(x) }
        fn add(self, a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(self, a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(self, a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(self, a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn neg(self, a: __m512) -> __m512 { _mm512_xor_ps(a, _mm512_set1_ps(-0.0)) }
        fn abs(self, a: __m512) -> __m512 { _mm512_abs_ps(a) }
        fn min(self, a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        fn max(self, a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        fn sqrt(self, a: __m512) -> __m512 { _mm512_sqrt_ps(a) }
        fn floor(self, a: __m512) -> __m512 {
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(a)
        }
        fn round(self, a: __m512) -> __m512 {
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
        }
        fn scale2(self, v: __m512, n: __m512) -> __m512 { _mm512_scalef_ps(v, n) }
        fn scale2_normal(self, v: __m512, rounded: __m512) -> __m512 {{
            // The exponent grows by the lowest bits of `rounded`; those above them are zero.
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(rounded));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), exponent))
        }}
        fn split_exponent(self, v: __m512) -> (__m512, __m512) {{
            let offset = _mm512_sub_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(SQRT_HALF));
            let exponent = _mm512_cvtepi32_ps(_mm512_srai_epi32::<23>(offset));
            let mantissa = _mm512_and_si512(offset, _mm512_set1_epi32(0x007f_ffff));
            let mantissa = _mm512_add_epi32(mantissa, _mm512_set1_epi32(SQRT_HALF));
            (_mm512_castsi512_ps(mantissa), exponent)
        }}
        fn lt(self, a: __m512, b: __m512) -> __mmask16 { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
        fn gt(self, a: __m512, b: __m512) -> __mmask16 { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) }
        fn select(self, m: __mmask16, yes: __m512, no: __m512) -> __m512 { _mm512_mask_blend_ps(m, no, yes) }
        fn reduce_add(self, v: __m512) -> f32 {
            Avx2(()).reduce_add(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)))
        }
        fn reduce_max(self, v: __m512) -> f32 {
            Avx2(()).reduce_max(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)))
        }
    }
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    type V = __m256;
    type M = __m256;

    pointer_methods! {
        fn load(self, from: *const f32) -> __m256 { _mm256_loadu_ps(from) }
        fn store(self, to: *mut f32, v: __m256) { _mm256_storeu_ps(to, v) }
        fn load_partial(self, from: *const f32, n: usize) -> __m256 { _mm256_maskload_ps(from, mask_256(n)) }
        fn store_partial(self, to: *mut f32, v: __m256, n: usize) { _mm256_maskstore_ps(to, mask_256(n), v) }
        fn load_bf16(self, from: *const bf16) -> __m256 {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()))))
        }
        fn load_bf16_pairs(self, from: *const bf16) -> (__m256, __m256) {{
            let pairs = _mm256_loadu_si256(from.cast());
            let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(odd))
        }}
        fn store_bf16(self, to: *mut bf16, v: __m256) { _mm_storeu_si128(to.cast(), narrow_256(v)) }
    }

    methods! {
        fn transpose(self, rows: [__m256; MAX_LANES]) -> [__m256; MAX_LANES] {{
            // Pairs of rows, pairs of pairs, then halves: 24 shuffles.
            let mut a = rows;
            for i in (0..8).step_by(2) {
                a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
                a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
            }
            let mut b = a;
            for i in (0..8).step_by(4) {
                b[i] = _mm256_shuffle_ps::<0x44>(a[i], a[i + 2]);
                b[i + 1] = _mm256_shuffle_ps::<0xee>(a[i], a[i + 2]);
                b[i + 2] = _mm256_shuffle_ps::<0x44>(a[i + 1], a[i + 3]);
                b[i + 3] = _mm256_shuffle_ps::<0xee>(a[i + 1], a[i + 3]);
            }
            for i in 0..4 {
                a[i] = _mm256_permute2f128_ps::<0x20>(b[i], b[i + 4]);
                a[i + 4] = _mm256_permute2f128_ps::<0x31>(b[i], b[i + 4]);
            }
            a
        }}
        fn bf16_pairs(self, even: __m256, odd: __m256) -> __m256 {{
            let (even, odd) = (rounded_256(even), rounded_256(odd));
            _mm256_castsi256_ps(_mm256_blend_epi16::<0xaa>(_mm256_srli_epi32::<16>(even), odd))
        }}
        fn splat(self, x: f32) -> __m256 { _mm256_set1_ps(x) }
        fn add(self, a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
        fn sub(self, a: __m256, b: __m256) -> __m256 { _mm256_sub_ps(a, b) }
        fn mul(self, a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
        fn div(self, a: __m256, b: __m256) -> __m256 { _mm256_div_ps(a, b) }
        fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
        fn neg(self, a: __m256) -> __m256 { _mm256_xor_ps(a, _mm256_set1_ps(-0.0)) }
        fn abs(self, a: __m256) -> __m256 { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
        fn min(self, a: __m256, b: __m256) -> __m256 { _mm256_min_ps(a, b) }
        fn max(self, a: __m256, b: __m256) -> __m256 { _mm256_max_ps(a, b) }
        fn sqrt(self, a: __m256) -> __m256 { _mm256_sqrt_ps(a) }
        fn floor(self, a: __m256) -> __m256 {
            _mm256_round_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(a)
        }
        fn round(self, a: __m256) -> __m256 {
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
        }
        fn scale2(self, v: __m256, n: __m256) -> __m256 {{
            // 2ⁿ in two factors, each of them normal; the first product is exact.
            let limit = _mm256_set1_ps(252.0);
            let n = _mm256_max_ps(_mm256_min_ps(n, limit), _mm256_xor_ps(limit, _mm256_set1_ps(-0.0)));
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let v = _mm256_mul_ps(v, power_256(half));
            _mm256_mul_ps(v, power_256(_mm256_sub_epi32(n, half)))
        }}
        fn scale2_normal(self, v: __m256, rounded: __m256) -> __m256 {{
            // The exponent grows by the lowest bits of `rounded`; those above them are zero.
            let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(rounded));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), exponent))
        }}
        fn split_exponent(self, v: __m256) -> (__m256, __m256) {{
            let offset = _mm256_sub_epi32(_mm256_castps_si256(v), _mm256_set1_epi32(SQRT_HALF));
            let exponent = _mm256_cvtepi32_ps(_mm256_srai_epi32::<23>(offset));
            let mantissa = _mm256_and_si256(offset, _mm256_set1_epi32(0x007f_ffff));
            let mantissa = _mm256_add_epi32(mantissa, _mm256_set1_epi32(SQRT_HALF));
            (_mm256_castsi256_ps(mantissa), exponent)
        }}
        fn lt(self, a: __m256, b: __m256) -> __m256 { _mm256_cmp_ps::<_CMP_LT_OQ>(a, b) }
        fn gt(self, a: __m256, b: __m256) -> __m256 { _mm256_cmp_ps::<_CMP_GT_OQ>(a, b) }
        fn select(self, m: __m256, yes: __m256, no: __m256) -> __m256 { _mm256_blendv_ps(no, yes, m) }
        fn reduce_add(self, v: __m256) -> f32 {{
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }}
        fn reduce_max(self, v: __m256) -> f32 {{
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }}
    }
}

impl<const VNNI: bool> Bytes for Avx512<VNNI> {
    type B = __m512i;
    type I = __m512i;

    pointer_methods! {
        fn load_bytes(self, from: *const u8) -> __m512i { _mm512_loadu_si512(from.cast()) }
        fn load_u8(self, from: *const u8) -> __m512 {
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())))
        }
        fn load_i8(self, from: *const u8) -> __m512 {
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))
        }
        fn load_f16(self, from: *const u8) -> __m512 { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    methods! {
        fn splat_bytes(self, four: i32) -> __m512i { _mm512_set1_epi32(four) }
        fn and(self, b: __m512i, mask: u8) -> __m512i { _mm512_and_si512(b, _mm512_set1_epi8(mask as i8)) }
        fn or(self, a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
        fn shift_left<const N: i32>(self, b: __m512i) -> __m512i {
            _mm512_sll_epi16(b, _mm_cvtsi32_si128(N))
        }
        fn shift_right<const N: i32>(self, b: __m512i) -> __m512i {
            _mm512_srl_epi16(b, _mm_cvtsi32_si128(N))
        }
        fn splat_int(self, x: i32) -> __m512i { _mm512_set1_epi32(x) }
        fn dot(self, sums: __m512i, w: __m512i, x: __m512i) -> __m512i {{
            if VNNI {
                _mm512_dpbusd_epi32(sums, w, x)
            } else {
                let pairs = _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1));
                _mm512_add_epi32(sums, pairs)
            }
        }}
        fn signed_dot(self, sums: __m512i, w: __m512i, x: __m512i) -> __m512i {{
            if VNNI {
                _mm512_dpbusd_epi32(sums, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), x)
            } else {
                // |w| · x with the sign of w; two products of up to 128 · 127 fit into 16 bits.
                let x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
                let pairs = _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(w), x), _mm512_set1_epi16(1));
                _mm512_add_epi32(sums, pairs)
            }
        }}
        fn signed_start(self, x: i32) -> __m512i { _mm512_set1_epi32(if VNNI { -128 * x } else { 0 }) }
        fn to_float(self, i: __m512i) -> __m512 { _mm512_cvtepi32_ps(i) }
    }
}

impl Bytes for Avx2 {
    type B = __m256i;
    type I = __m256i;

    pointer_methods! {
        fn load_bytes(self, from: *const u8) -> __m256i { _mm256_loadu_si256(from.cast()) }
        fn load_u8(self, from: *const u8) -> __m256 {
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast())))
        }
        fn load_i8(self, from: *const u8) -> __m256 {
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())))
        }
        fn load_f16(self, from: *const u8) -> __m256 { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    methods! {
        fn splat_bytes(self, four: i32) -> __m256i { _mm256_set1_epi32(four) }
        fn and(self, b: __m256i, mask: u8) -> __m256i { _mm256_and_si256(b, _mm256_set1_epi8(mask as i8)) }
        fn or(self, a: __m256i, b: __m256i) -> __m256i { _mm256_or_si256(a, b) }
        fn shift_left<const N: i32>(self, b: __m256i) -> __m256i { _mm256_slli_epi16::<N>(b) }
        fn shift_right<const N: i32>(self, b: __m256i) -> __m256i { _mm256_srli_epi16::<N>(b) }
        fn splat_int(self, x: i32) -> __m256i { _mm256_set1_epi32(x) }
        fn dot(self, sums: __m256i, w: __m256i, x: __m256i) -> __m256i {{
            let pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
            _mm256_add_epi32(sums, pairs)
        }}
        fn signed_dot(self, sums: __m256i, w: __m256i, x: __m256i) -> __m256i {
            // |w| · x with the sign of w; two products of up to 128 · 127 fit into 16 bits.
            Avx2(()).dot(sums, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
        }
        fn signed_start(self, _x: i32) -> __m256i { _mm256_setzero_si256() }
        fn to_float(self, i: __m256i) -> __m256 { _mm256_cvtepi32_ps(i) }
    }
}

/// The lower pair of every four lanes of both.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
unsafe fn unpack_low_512(a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller vouches for the instructions.
    unsafe { _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))) }
}

/// The upper pair of every four lanes of both.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
unsafe fn unpack_high_512(a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller vouches for the instructions.
    unsafe { _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))) }
}

/// 16 bf16 as f32.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
unsafe fn widen_512(v: __m256i) -> __m512 {
    // SAFETY: the caller vouches for the instructions.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(v))) }
}

/// 16 f32 rounded to bf16.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
unsafe fn narrow_512(v: __m512) -> __m256i {
    // SAFETY: the caller vouches for the instructions.
    unsafe { _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded_512(v))) }
}

/// 16 f32 rounded to bf16 in the upper halves, anything in the lower ones: half a unit less one is added, and one
/// more where the last kept bit is odd; a NaN keeps its upper bits and becomes quiet.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
unsafe fn rounded_512(v: __m512) -> __m512i {
    // SAFETY: the caller vouches for the instructions.
    unsafe {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000))
    }
}

/// 8 f32 rounded to bf16.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn narrow_256(v: __m256) -> __m128i {
    // SAFETY: the caller vouches for the instructions.
    unsafe {
        let rounded = _mm256_srli_epi32::<16>(rounded_256(v));
        _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256::<1>(rounded))
    }
}

/// 8 f32 rounded to bf16 in the upper halves, as [`rounded_512`] does.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn rounded_256(v: __m256) -> __m256i {
    // SAFETY: the caller vouches for the instructions.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        _mm256_blendv_epi8(rounded, quiet, nan)
    }
}

/// The mask of the lowest `n` of 8 lanes.
///
/// # Safety
/// The machine has AVX2, and n <= 8.
#[inline(always)]
unsafe fn mask_256(n: usize) -> __m256i {
    static STEPS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    debug_assert!(n <= 8);
    // SAFETY: the caller vouches for the instructions and for n <= 8, so 8 values follow.
    unsafe { _mm256_loadu_si256(STEPS.as_ptr().add(8 - n).cast()) }
}

/// 2ⁿ for −126 ≤ n ≤ 127.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn power_256(n: __m256i) -> __m256 {
    // SAFETY: the caller vouches for the instructions.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127)))) }
}
