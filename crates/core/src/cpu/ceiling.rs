//! What the machine can do, measured: multiply-adds on registers, and reading memory. Every figure of speed is given
//! as a share of one of these, measured in the same run.

use std::hint::black_box;
use std::time::Instant;

use super::{Cpu, Kernel, Simd, memory};

/// Seconds that one measurement takes, about.
const BUDGET: f64 = 0.12;
/// Bytes that each thread reads: far more than its caches hold.
const READ_BYTES: usize = 96 << 20;
/// Bytes that all threads together read at most: more than the last cache of any machine holds.
const MOST_BYTES: usize = 2 << 30;

/// The machine's ceilings with all threads of a [`Cpu`] at its level of instructions.
#[derive(Clone, Copy, Debug)]
pub struct Ceiling {
    /// f32 operations a second in multiply-adds on registers (a multiply-add is two).
    pub flops: f64,
    /// Bytes a second that a plain loop reads from memory.
    pub bandwidth: f64,
}

impl Ceiling {
    /// Measures both, in about a quarter of a second.
    pub fn measure(cpu: &Cpu) -> Ceiling {
        Ceiling { flops: flops(cpu), bandwidth: bandwidth(cpu) }
    }
}

/// f32 operations a second in multiply-adds on registers, on all threads.
pub fn flops(cpu: &Cpu) -> f64 {
    let steps = 20_000;
    let operations = 2 * steps * SUMS as u64 * cpu.isa.lanes() as u64 * cpu.pool.threads() as u64;
    let seconds = fastest(|| cpu.pool.run(cpu.pool.threads(), |_| cpu.isa.run(MultiplyAdds { steps })));
    operations as f64 / seconds
}

/// Bytes a second that a plain loop reads from memory, on all threads.
pub fn bandwidth(cpu: &Cpu) -> f64 {
    let len = (READ_BYTES * cpu.pool.threads()).min(MOST_BYTES) / 4;
    let mut numbers = Vec::<f32>::with_capacity(len);
    // As the memory of buffers.
    memory::prefer_large_pages(numbers.as_mut_ptr().cast(), 4 * len);
    numbers.resize(len, 1.0);
    read_rate(cpu, &numbers)
}

/// Bytes a second that a plain loop reads from these numbers, which may lie in a cache, on all threads.
pub fn read_rate(cpu: &Cpu, memory: &[f32]) -> f64 {
    let threads = cpu.pool.threads();
    let part = memory.len() / threads;
    let seconds = fastest(|| cpu.pool.run(threads, |i| cpu.isa.run(Read(&memory[i * part..(i + 1) * part]))));
    (part * threads * 4) as f64 / seconds
}

/// The fewest seconds that a call took.
fn fastest(f: impl Fn()) -> f64 {
    f();
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while begin.elapsed().as_secs_f64() < BUDGET {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// Independent sums: enough to hide the latency of a multiply-add, few enough for 16 registers.
const SUMS: usize = 12;

struct MultiplyAdds {
    steps: u64,
}

impl Kernel for MultiplyAdds {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (a, b) = (s.splat(black_box(0.999_9)), s.splat(black_box(1e-4)));
        let mut sums = [s.splat(1.0); SUMS];
        for _ in 0..self.steps {
            for sum in &mut sums {
                *sum = s.fma(*sum, a, b);
            }
        }
        for sum in sums {
            black_box(s.reduce_add(sum));
        }
    }
}

struct Read<'a>(&'a [f32]);

impl Kernel for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut sums = [s.zero(); 8];
        for block in self.0.chunks_exact(8 * S::LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the block holds eight vectors.
                *sum = s.add(*sum, unsafe { s.load(block.as_ptr().add(i * S::LANES)) });
            }
        }
        for sum in sums {
            black_box(s.reduce_add(sum));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_are_positive_numbers() {
        let cpu = Cpu::new(Some(1)).unwrap();
        let found = Ceiling::measure(&cpu);
        assert!(found.flops.is_finite() && found.flops > 1e8, "{found:?}");
        assert!(found.bandwidth.is_finite() && found.bandwidth > 1e7, "{found:?}");
    }
}
