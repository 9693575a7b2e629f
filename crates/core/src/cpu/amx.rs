//! Intel AMX: eight registers of 16 rows of 64 bytes ("tiles"), and products of tiles of bf16 with sums in f32.
//!
//! Rust's intrinsics for tiles are not stable, so this is inline assembly. Linux hands out the state of the tiles on
//! request only ([`is_available`] asks for it, once for the process). A thread holds a configuration only for the
//! life of a [`Tiles`]: nothing is left behind in threads that are the caller's.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::marker::PhantomData;

/// Rows of a tile; also its columns of f32 and its pairs of bf16.
const TILE: usize = 16;

/// Whether the machine multiplies tiles of bf16 and of int8, and the system lets this process use them.
pub(super) fn is_available() -> bool {
    /// AMX-BF16, AMX-TILE and AMX-INT8 in EDX of leaf 7.
    const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    /// The tiles' configuration and data in XCR0.
    const STATES: u64 = 1 << 17 | 1 << 18;

    #[target_feature(enable = "xsave")]
    fn states() -> u64 {
        // SAFETY: the function has XSAVE enabled, and XCR0 always exists then.
        unsafe { _xgetbv(0) }
    }
    let has = std::arch::is_x86_feature_detected!("xsave") && std::arch::is_x86_feature_detected!("avx512bf16");
    if !has || __cpuid_count(7, 0).edx & FEATURES != FEATURES {
        return false;
    }
    // SAFETY: the machine has XSAVE, and the system has enabled it: AVX-512 counts as detected only then.
    unsafe { states() & STATES == STATES && permission() }
}

/// Asks the system for the tiles' state, for all threads of the process.
fn permission() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_PRCTL: i64 = 158;
        const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
        const XFEATURE_XTILEDATA: u64 = 18;
        let result: i64;
        // SAFETY: the call changes nothing but which states this process may use.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        result == 0
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// What LDTILECFG reads: bytes a row and rows of each tile.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The calling thread's tiles, configured: all of 16 rows of 64 bytes. Dropping it gives them back.
pub(super) struct Tiles(PhantomData<*mut ()>);

impl Tiles {
    /// Configures the tiles.
    ///
    /// # Safety
    /// [`is_available`], and no other `Tiles` lives in this thread.
    #[inline(always)]
    pub unsafe fn configure() -> Tiles {
        let mut all = Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        all.row_bytes[..8].fill(64);
        all.rows[..8].fill(TILE as u8);
        // SAFETY: the caller vouches for the instructions; the configuration is a valid one.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const all, options(nostack, readonly)) };
        Tiles(PhantomData)
    }

    /// C[16·M, 16·N] += A · B over `steps` tiles of 32 values of k, or C = A · B with `zero`; M and N are 1 or 2.
    ///
    /// A tile of A is `[16 rows][32 values of k]`, one of B `[16 pairs of k][16 columns][2]`, bf16 without gaps; tiles
    /// over k follow each other. The second rows of A's tiles begin `a_next` elements after the first, the second
    /// columns of B's `b_next`.
    ///
    /// # Safety
    /// All tiles are valid for reading, C for reading and writing; strides count elements.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "two operands and a result with their strides")]
    pub unsafe fn multiply<const M: usize, const N: usize>(
        &self,
        steps: usize,
        a: *const u16,
        a_next: usize,
        b: *const u16,
        b_next: usize,
        c: *mut f32,
        c_stride: usize,
        zero: bool,
    ) {
        /// A program over tiles: C in 0 to 3, A in 4 and 5, B in 6 and 7.
        macro_rules! program {
            ($zero:literal, $load:literal, $step:literal, $store:literal) => {
                asm!(
                    "test r12, r12",
                    "jz 3f",
                    $zero,
                    "jmp 2f",
                    "3:",
                    $load,
                    "2:",
                    $step,
                    "add rsi, 1024",
                    "add rdi, 1024",
                    "add rdx, 1024",
                    "add r8, 1024",
                    "dec rcx",
                    "jnz 2b",
                    $store,
                    inout("rsi") a => _,
                    inout("rdi") a.wrapping_add(a_next) => _,
                    inout("rdx") b => _,
                    inout("r8") b.wrapping_add(b_next) => _,
                    in("r9") c,
                    in("r10") c.wrapping_add(TILE * c_stride),
                    in("r11") 4 * c_stride,
                    in("rax") 64usize,
                    inout("rcx") steps => _,
                    in("r12") usize::from(zero),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            };
        }
        debug_assert!(steps > 0);
        // SAFETY: the tiles are configured; the caller vouches for the memory.
        unsafe {
            match (M, N) {
                (1, 1) => program!(
                    "tilezero tmm0",
                    "tileloadd tmm0, [r9 + r11]",
                    "tileloadd tmm4, [rsi + rax]
                     tileloadd tmm6, [rdx + rax]
                     tdpbf16ps tmm0, tmm4, tmm6",
                    "tilestored [r9 + r11], tmm0"
                ),
                (1, 2) => program!(
                    "tilezero tmm0
                     tilezero tmm1",
                    "tileloadd tmm0, [r9 + r11]
                     tileloadd tmm1, [r9 + r11 + 64]",
                    "tileloadd tmm4, [rsi + rax]
                     tileloadd tmm6, [rdx + rax]
                     tdpbf16ps tmm0, tmm4, tmm6
                     tileloadd tmm7, [r8 + rax]
                     tdpbf16ps tmm1, tmm4, tmm7",
                    "tilestored [r9 + r11], tmm0
                     tilestored [r9 + r11 + 64], tmm1"
                ),
                (2, 1) => program!(
                    "tilezero tmm0
                     tilezero tmm2",
                    "tileloadd tmm0, [r9 + r11]
                     tileloadd tmm2, [r10 + r11]",
                    "tileloadd tmm6, [rdx + rax]
                     tileloadd tmm4, [rsi + rax]
                     tdpbf16ps tmm0, tmm4, tmm6
                     tileloadd tmm5, [rdi + rax]
                     tdpbf16ps tmm2, tmm5, tmm6",
                    "tilestored [r9 + r11], tmm0
                     tilestored [r10 + r11], tmm2"
                ),
                (2, 2) => program!(
                    "tilezero tmm0
                     tilezero tmm1
                     tilezero tmm2
                     tilezero tmm3",
                    "tileloadd tmm0, [r9 + r11]
                     tileloadd tmm1, [r9 + r11 + 64]
                     tileloadd tmm2, [r10 + r11]
                     tileloadd tmm3, [r10 + r11 + 64]",
                    "tileloadd tmm6, [rdx + rax]
                     tileloadd tmm4, [rsi + rax]
                     tdpbf16ps tmm0, tmm4, tmm6
                     tileloadd tmm7, [r8 + rax]
                     tdpbf16ps tmm1, tmm4, tmm7
                     tileloadd tmm5, [rdi + rax]
                     tdpbf16ps tmm2, tmm5, tmm6
                     tdpbf16ps tmm3, tmm5, tmm7",
                    "tilestored [r9 + r11], tmm0
                     tilestored [r9 + r11 + 64], tmm1
                     tilestored [r10 + r11], tmm2
                     tilestored [r10 + r11 + 64], tmm3"
                ),
                _ => unreachable!("one or two tiles either way"),
            }
        }
    }
}

impl Drop for Tiles {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the machine has the instruction, since there was a configuration.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}
