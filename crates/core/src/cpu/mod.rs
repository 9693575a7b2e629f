//! The layer under every CPU kernel: instruction sets, vectors, functions of them, threads and the matrix product.
//!
//! - `amx`: tiles of bf16, where the machine has them;
//! - [`ceiling`]: what the machine can do, measured;
//! - [`isa`]: which vector instructions the machine has, and how a kernel written once runs at each level;
//! - [`simd`]: the vector trait that kernels are generic over;
//! - [`math`]: exp, ln, sigmoid, softplus and their kin over vectors, with stated error bounds;
//! - `memory`: large pages;
//! - [`pool`]: threads for regions of a few microseconds;
//! - [`gemm`]: the matrix product, blocked, packed and threaded.
//!
//! Nothing here knows of tensors, graphs or models. Results depend on the level of instructions, never on the number
//! of threads or on how work is cut into tasks.

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod ceiling;
pub mod gemm;
pub mod isa;
pub mod math;
pub(crate) mod memory;
pub mod pool;
pub mod simd;

pub use isa::{Isa, IsaError, Kernel};
pub use pool::Pool;
pub use simd::{Element, MAX_LANES, Simd};

/// The CPU as kernels see it: threads and an instruction set.
#[derive(Debug)]
pub struct Cpu {
    /// The threads.
    pub pool: Pool,
    /// The instruction set, best of the machine or forced by `HOGNOSE_ISA`.
    pub isa: Isa,
}

impl Cpu {
    /// Starts `threads` threads, or as many as the machine offers; 0 counts as 1. The instruction set is the
    /// machine's best, or what the environment variable `HOGNOSE_ISA` names.
    ///
    /// # Errors
    /// `HOGNOSE_ISA` names an unknown level, or one this machine does not have.
    pub fn new(threads: Option<usize>) -> Result<Cpu, IsaError> {
        let isa = Isa::from_env()?;
        let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
        Ok(Cpu { pool: Pool::new(threads), isa })
    }
}
