//! What the GPU can do, measured: a large product in bf16 and a large copy.

use std::time::Instant;

use cudarc::driver::sys;

use super::blas::Product;
use super::{Cuda, Launcher, check};
use crate::cpu::ceiling::Ceiling;
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Layout, Mat};
use crate::rng;

/// Edge of the matrices.
const EDGE: usize = 8192;
/// Times that each measurement repeats.
const REPEATS: usize = 10;

impl Cuda {
    /// Operations a second of a bf16 product of random numbers, and bytes a second (read and written) of a copy.
    /// Zeros where there is no memory to measure in.
    pub fn measure_ceiling(&self) -> Ceiling {
        self.measure().unwrap_or(Ceiling { flops: 0.0, bandwidth: 0.0 })
    }

    fn measure(&self) -> Result<Ceiling, Error> {
        let bytes = EDGE * EDGE * DType::BF16.size();
        let memory = self.alloc(8 * bytes)?;
        let result = self.measure_in(memory, bytes);
        self.free(memory);
        result
    }

    fn measure_in(&self, memory: u64, bytes: usize) -> Result<Ceiling, Error> {
        // Random numbers: a product of zeros runs faster than one of data.
        let row: Vec<half::bf16> =
            (0..bytes as u64 / 64).map(|i| half::bf16::from_f32(rng::uniform(7, i) - 0.5)).collect();
        // SAFETY: a bf16 is plain bytes, and every range lies inside the memory.
        unsafe {
            let row = std::slice::from_raw_parts(row.as_ptr().cast::<u8>(), size_of_val(row.as_slice()));
            for start in (0..2 * bytes).step_by(row.len()) {
                self.write(memory + start as u64, row);
            }
        }
        let mat = |i: usize| Mat {
            ptr: (memory + (i * bytes) as u64) as *mut u8,
            rows: EDGE,
            cols: EDGE,
            stride: EDGE,
            dtype: DType::BF16,
            layout: Layout::Rows,
        };
        let (out, a, b) = (mat(2), mat(0), mat(1));
        let product = Product::new(out, (a, false), (b, true));
        self.blas().prepare(self)?;
        let seconds = self.fastest(|cuda| Launcher::run(cuda).product(&product))?;
        let half = 4 * bytes;
        let copy = self.fastest(|cuda| {
            // SAFETY: both halves lie inside the memory.
            check("copying", unsafe { sys::cuMemcpyDtoDAsync_v2(memory + half as u64, memory, half, cuda.stream()) })
        })?;
        Ok(Ceiling { flops: 2.0 * (EDGE as f64).powi(3) / seconds, bandwidth: 2.0 * half as f64 / copy })
    }

    /// Seconds of one call, from several enqueued together after a first one.
    pub(crate) fn fastest(&self, call: impl Fn(&Cuda) -> Result<(), Error>) -> Result<f64, Error> {
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            call(self)?;
            self.synchronize()?;
            let start = Instant::now();
            for _ in 0..REPEATS {
                call(self)?;
            }
            self.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64() / REPEATS as f64);
        }
        Ok(best)
    }
}
