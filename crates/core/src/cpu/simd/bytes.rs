//! Vectors of bytes, for products of numbers of few bits: sums of four neighbouring products a lane, exactly.

use super::Simd;

/// Vectors of 4 · `LANES` bytes and of `LANES` whole numbers at one level of instructions. All results are exact, so they
/// are the same at every level.
pub trait Bytes: Simd {
    /// A vector of 4 · `LANES` bytes: four neighbours belong to a lane.
    type B: Copy;
    /// A vector of `LANES` i32.
    type I: Copy;

    /// Reads 4 · `LANES` bytes; no alignment needed.
    ///
    /// # Safety
    /// `from` is valid for reading 4 · `LANES` bytes.
    unsafe fn load_bytes(self, from: *const u8) -> Self::B;

    /// The same four bytes in all lanes, the lowest first.
    fn splat_bytes(self, four: i32) -> Self::B;

    /// The bits of `mask` of every byte.
    fn and(self, b: Self::B, mask: u8) -> Self::B;

    /// The bits of both.
    fn or(self, a: Self::B, b: Self::B) -> Self::B;

    /// Bytes shifted left by 1 to 7. Bits that leave a byte may turn up in its neighbour: mask them away.
    fn shift_left<const N: i32>(self, b: Self::B) -> Self::B;

    /// Bytes shifted right by 1 to 7, as [`Bytes::shift_left`].
    fn shift_right<const N: i32>(self, b: Self::B) -> Self::B;

    /// All lanes `x`.
    fn splat_int(self, x: i32) -> Self::I;

    /// Adds to each lane the products of its four bytes: of `w`, from 0 to 127, and `x`, from −127 to 127.
    fn dot(self, sums: Self::I, w: Self::B, x: Self::B) -> Self::I;

    /// As [`Bytes::dot`] with any signed bytes in `w`, for sums that begin with [`Bytes::signed_start`].
    fn signed_dot(self, sums: Self::I, w: Self::B, x: Self::B) -> Self::I;

    /// What sums of [`Bytes::signed_dot`] begin with to begin at 0, where `x` is the sum of the bytes of x that they will
    /// take: some machines multiply by w + 128.
    fn signed_start(self, x: i32) -> Self::I;

    /// As f32, to nearest.
    fn to_float(self, i: Self::I) -> Self::V;

    /// Reads `LANES` unsigned bytes.
    ///
    /// # Safety
    /// `from` is valid for reading `LANES` bytes.
    unsafe fn load_u8(self, from: *const u8) -> Self::V;

    /// Reads `LANES` signed bytes.
    ///
    /// # Safety
    /// `from` is valid for reading `LANES` bytes.
    unsafe fn load_i8(self, from: *const u8) -> Self::V;

    /// Reads `LANES` f16, widened exactly.
    ///
    /// # Safety
    /// `from` is valid for reading 2 · `LANES` bytes.
    unsafe fn load_f16(self, from: *const u8) -> Self::V;
}
