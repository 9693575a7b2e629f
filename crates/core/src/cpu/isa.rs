//! Which vector instructions the kernels use, chosen when the program runs.
//!
//! A kernel is written once against [`Simd`] and given to [`Isa::run`], which compiles it once a level inside a
//! function that has the level's instructions enabled. Everything between that function and the intrinsics must be
//! `#[inline(always)]`, or the code falls out of the enabled region and becomes correct but slow.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
use super::simd::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Bytes, Portable, Simd};

/// The environment variable that forces a level.
pub const ISA_VARIABLE: &str = "HOGNOSE_ISA";

/// A level of vector instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// x86-64 with AMX for bf16 and int8: matrix products of bf16 by tiles, everything else as [`Isa::Avx512`].
    Amx,
    /// x86-64 with AVX-512 F, BW, DQ and VL (and AVX2, FMA and F16C): 16 lanes of f32, 32 registers, masks.
    Avx512,
    /// x86-64 with AVX2, FMA and F16C: 8 lanes of f32, 16 registers.
    Avx2,
    /// 64-bit ARM: 4 lanes of f32, 32 registers.
    Neon,
    /// Plain Rust over arrays of 8; multiplies and adds round separately.
    Portable,
}

/// Why a level of vector instructions could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// The name is none of the known levels.
    #[error(
        "{ISA_VARIABLE} names the instruction set `{found}`; expected amx, avx512, avx2, neon or portable, and this machine \
         has {available}"
    )]
    Unknown {
        /// The name as given.
        found: String,
        /// The levels of this machine, best first.
        available: String,
    },
    /// The level is known, but not one of this machine.
    #[error(
        "{ISA_VARIABLE} names the instruction set {found}, but this machine has only {available}; choose one of these or \
         unset it"
    )]
    Unavailable {
        /// The level asked for.
        found: Isa,
        /// The levels of this machine, best first.
        available: String,
    },
}

/// A piece of work written once for all instruction sets.
pub trait Kernel {
    /// What the work gives back.
    type Output;

    /// Does the work. Implementors mark this `#[inline(always)]`, so that it is compiled with the instructions of
    /// `S` enabled.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// A [`Kernel`] over vectors of bytes.
pub trait BytesKernel {
    /// Does the work; as [`Kernel::run`].
    fn run<S: Bytes>(self, simd: S);
}

impl Isa {
    const ALL: [Isa; 5] = [Isa::Amx, Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable];

    /// The best level this machine has.
    pub fn detect() -> Isa {
        Isa::ALL.into_iter().find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// All levels this machine has, best first; the last one is always [`Isa::Portable`].
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The level named by the environment variable `HOGNOSE_ISA`, or the best one where it is unset or empty.
    ///
    /// # Errors
    /// An unknown name, or a level that this machine does not have.
    pub fn from_env() -> Result<Isa, IsaError> {
        match std::env::var_os(ISA_VARIABLE) {
            Some(name) if !name.is_empty() => Isa::named(&name.to_string_lossy()),
            _ => Ok(Isa::detect()),
        }
    }

    /// The level of that name, if this machine has it.
    ///
    /// # Errors
    /// An unknown name, or a level that this machine does not have.
    pub fn named(name: &str) -> Result<Isa, IsaError> {
        let isa: Isa = name.parse()?;
        if isa.is_available() {
            Ok(isa)
        } else {
            Err(IsaError::Unavailable { found: isa, available: available_names() })
        }
    }

    /// Whether this machine has the level.
    pub fn is_available(self) -> bool {
        static AVAILABLE: OnceLock<u8> = OnceLock::new();
        AVAILABLE.get_or_init(probe) & self.bit() != 0
    }

    /// The number of f32 lanes in a vector of this level.
    pub fn lanes(self) -> usize {
        match self {
            Isa::Amx | Isa::Avx512 => 16,
            Isa::Avx2 | Isa::Portable => 8,
            Isa::Neon => 4,
        }
    }

    /// Runs a kernel with this level's instructions; with [`Portable`] where this machine does not have them.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx | Isa::Avx512 if self.is_available() => {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn enabled<K: Kernel>(kernel: K, simd: Avx512) -> K::Output {
                    kernel.run(simd)
                }
                // SAFETY: the machine has the instructions, as just asked.
                unsafe { enabled(kernel, Avx512::new_unchecked()) }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 if self.is_available() => {
                #[target_feature(enable = "avx2,fma")]
                fn enabled<K: Kernel>(kernel: K, simd: Avx2) -> K::Output {
                    kernel.run(simd)
                }
                // SAFETY: the machine has the instructions, as just asked.
                unsafe { enabled(kernel, Avx2::new_unchecked()) }
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon if self.is_available() => {
                #[target_feature(enable = "neon")]
                fn enabled<K: Kernel>(kernel: K, simd: Neon) -> K::Output {
                    kernel.run(simd)
                }
                // SAFETY: the machine has the instructions, as just asked.
                unsafe { enabled(kernel, Neon::new_unchecked()) }
            }
            _ => kernel.run(Portable),
        }
    }

    /// Runs a kernel over bytes with this level's instructions, as [`Isa::run`]; where the machine has VNNI, with those.
    pub fn run_bytes<K: BytesKernel>(self, kernel: K) {
        #[cfg(target_arch = "x86_64")]
        if matches!(self, Isa::Amx | Isa::Avx512)
            && self.is_available()
            && std::arch::is_x86_feature_detected!("avx512vnni")
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            fn enabled<K: BytesKernel>(kernel: K, simd: Avx512<true>) {
                kernel.run(simd)
            }
            // SAFETY: the machine has the instructions, as just asked.
            return unsafe { enabled(kernel, Avx512::new_unchecked()) };
        }
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx | Isa::Avx512 if self.is_available() => {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn enabled<K: BytesKernel>(kernel: K, simd: Avx512) {
                    kernel.run(simd)
                }
                // SAFETY: the machine has the instructions, as just asked.
                unsafe { enabled(kernel, Avx512::new_unchecked()) }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 if self.is_available() => {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn enabled<K: BytesKernel>(kernel: K, simd: Avx2) {
                    kernel.run(simd)
                }
                // SAFETY: the machine has the instructions, as just asked.
                unsafe { enabled(kernel, Avx2::new_unchecked()) }
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon if self.is_available() => {
                #[target_feature(enable = "neon")]
                fn enabled<K: BytesKernel>(kernel: K, simd: Neon) {
                    kernel.run(simd)
                }
                // SAFETY: the machine has the instructions, as just asked.
                unsafe { enabled(kernel, Neon::new_unchecked()) }
            }
            _ => kernel.run(Portable),
        }
    }

    fn bit(self) -> u8 {
        match self {
            Isa::Avx512 => 1,
            Isa::Avx2 => 2,
            Isa::Neon => 4,
            Isa::Portable => 8,
            Isa::Amx => 16,
        }
    }
}

/// The bits of the levels this machine has.
fn probe() -> u8 {
    #[allow(unused_mut, reason = "no level but the portable one on other architectures")]
    let mut bits = Isa::Portable.bit();
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") && has!("f16c") {
            bits |= Isa::Avx2.bit();
            if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                bits |= Isa::Avx512.bit();
                if super::amx::is_available() {
                    bits |= Isa::Amx.bit();
                }
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("neon") {
        bits |= Isa::Neon.bit();
    }
    bits
}

fn available_names() -> String {
    Isa::available().iter().map(Isa::to_string).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Amx => "amx",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        })
    }
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Isa, IsaError> {
        Isa::ALL
            .into_iter()
            .find(|isa| isa.to_string() == name)
            .ok_or_else(|| IsaError::Unknown { found: name.to_owned(), available: available_names() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse::<Isa>(), Ok(isa));
        }
    }

    #[test]
    fn the_best_level_is_the_first_available_one_and_the_portable_one_the_last() {
        let available = Isa::available();
        assert_eq!(available.first(), Some(&Isa::detect()));
        assert_eq!(available.last(), Some(&Isa::Portable));
    }

    #[test]
    fn unknown_and_unavailable_levels_list_what_there_is() {
        let error = Isa::named("sse9").unwrap_err().to_string();
        assert!(error.contains("`sse9`") && error.contains("portable"), "{error}");
        for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
            let error = Isa::named(&isa.to_string()).unwrap_err();
            assert!(matches!(error, IsaError::Unavailable { .. }), "{error}");
        }
    }

    #[test]
    fn every_level_runs_and_has_its_number_of_lanes() {
        struct Lanes;
        impl Kernel for Lanes {
            type Output = usize;
            #[inline(always)]
            fn run<S: Simd>(self, _: S) -> usize {
                S::LANES
            }
        }
        for isa in Isa::available() {
            assert_eq!(isa.run(Lanes), isa.lanes());
        }
        // A level of another architecture falls back instead of running what the machine does not have.
        for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
            assert_eq!(isa.run(Lanes), Isa::Portable.lanes());
        }
    }
}
