//! How near the matrix product comes to what the machine can do: GFLOP/s beside a loop of multiply-adds on registers,
//! and for one row GB/s of weights beside a loop that only reads.
//!
//! `cargo run --release -p hognose-core --example gemm_bench [-- THREADS…]`; `HOGNOSE_ISA` forces a level.

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use hognose_core::cpu::gemm::{MatMut, MatRef, PackedBuffer, Rhs, Start, gemm, gemm_serial};
use hognose_core::cpu::{Cpu, IsaError, ceiling};

/// The fewest seconds a call took, over about `budget` seconds.
fn fastest(budget: f64, mut f: impl FnMut()) -> f64 {
    f();
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while begin.elapsed().as_secs_f64() < budget {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1009) as f32 / 1009.0 - 0.5).collect()
}

fn products(cpu: &Cpu, peak: f64) {
    println!("{:>26} {:>14} {:>10} {:>9} {:>7}", "m × n × k", "B", "µs", "GFLOP/s", "peak");
    let shapes = [
        (512, 3072, 768),
        (512, 768, 3072),
        (2048, 3072, 768),
        (512, 8192, 2048),
        (2048, 768, 1536),
        (2048, 80, 1536),
        (2048, 1536, 48),
        (512, 80, 1536),
        (512, 1536, 48),
        (64, 3072, 768),
        (16, 3072, 768),
        (8, 3072, 768),
        (4, 3072, 768),
        (64, 64, 64),
        (256, 1, 16),
    ];
    let report = |m: usize, n: usize, k: usize, kind: &str, seconds: f64| {
        let rate = 2e-9 * (m * n * k) as f64 / seconds;
        let shape = format!("{m} × {n} × {k}");
        println!("{shape:>26} {kind:>14} {:>10.1} {rate:>9.1} {:>6.1}%", seconds * 1e6, 100.0 * rate / peak);
    };
    for (m, n, k) in shapes {
        let (a, w, mut c) = (values(m * k), values(n * k), vec![0.0; m * n]);
        let a = MatRef::new(&a, m, k);
        let (rows, columns) = (MatRef::new(&w, k, n), MatRef::new(&w, n, k).t());
        let packed = PackedBuffer::<f32>::pack(&cpu.pool, cpu.isa, columns);
        let narrow = PackedBuffer::<bf16>::pack(&cpu.pool, cpu.isa, columns);
        let mut time = |b: Rhs<'_>| fastest(0.2, || gemm(cpu, MatMut::new(&mut c, m, n), Start::Zero, a, b));
        report(m, n, k, "packed", time(packed.matrix().into()));
        report(m, n, k, "packed bf16", time(narrow.matrix().into()));
        report(m, n, k, "x · Wᵀ", time(columns.into()));
        report(m, n, k, "dy · W", time(rows.into()));
        report(m, n, k, "x · Wᵀ in bf16", time(Rhs::Rounded(columns)));
    }
    // dyᵀ · x: A transposed too.
    let (m, n, k) = (3072, 768, 512);
    let (a, b, mut c) = (values(m * k), values(n * k), vec![0.0; m * n]);
    let (a, b) = (MatRef::new(&a, k, m).t(), MatRef::new(&b, k, n));
    report(m, n, k, "dyᵀ · x", fastest(0.2, || gemm(cpu, MatMut::new(&mut c, m, n), Start::C, a, b)));
}

fn serial_products(cpu: &Cpu, peak: f64) {
    println!("\none thread, as inside an SSD chunk; A and B by rows (n) or transposed (t)");
    println!("{:>26} {:>4} {:>4} {:>10} {:>9} {:>7}", "m × n × k", "A", "B", "µs", "GFLOP/s", "peak");
    for (m, n, k) in [(64, 64, 64), (128, 64, 128), (128, 128, 64), (256, 64, 256), (256, 256, 128), (64, 128, 256)] {
        for (at, bt) in [(false, false), (false, true), (true, false), (true, true)] {
            let (a, b, mut c) = (values(m * k), values(n * k), vec![0.0; m * n]);
            let a = if at { MatRef::new(&a, k, m).t() } else { MatRef::new(&a, m, k) };
            let b = if bt { MatRef::new(&b, n, k).t() } else { MatRef::new(&b, k, n) };
            let seconds = fastest(0.05, || gemm_serial(cpu.isa, MatMut::new(&mut c, m, n), Start::Zero, a, b));
            let rate = 2e-9 * (m * n * k) as f64 / seconds;
            let name = |t| if t { "t" } else { "n" };
            println!(
                "{:>26} {:>4} {:>4} {:>10.2} {rate:>9.1} {:>6.1}%",
                format!("{m} × {n} × {k}"),
                name(at),
                name(bt),
                seconds * 1e6,
                100.0 * rate / peak
            );
        }
    }
}

fn streams(cpu: &Cpu) {
    println!("\none row against weights of 256 MB and of one layer, GB/s of weights read");
    for (n, k) in [(65_536, 1024), (3072, 768), (768, 1536)] {
        let memory = values(n * k);
        let bytes = (n * k * 4) as f64;
        let weights = PackedBuffer::<f32>::pack(&cpu.pool, cpu.isa, MatRef::new(&memory, n, k).t());
        let narrow = PackedBuffer::<bf16>::pack(&cpu.pool, cpu.isa, MatRef::new(&memory, n, k).t());
        let (wide, half) = (ceiling::read_rate(cpu, &memory), ceiling::read_rate(cpu, &memory[..memory.len() / 2]));
        print!("n {n:>6} k {k:>5}: read {:>6.1} (bf16's half: {:>6.1})", 1e-9 * wide, 1e-9 * half);
        for m in [1, 2, 4, 8] {
            let (a, mut c) = (values(m * k), vec![0.0; m * n]);
            let a = MatRef::new(&a, m, k);
            let wide = fastest(0.3, || gemm(cpu, MatMut::new(&mut c, m, n), Start::Zero, a, weights.matrix()));
            let half = fastest(0.3, || gemm(cpu, MatMut::new(&mut c, m, n), Start::Zero, a, narrow.matrix()));
            print!(" | m {m}: f32 {:>6.1}, bf16 {:>6.1}", 1e-9 * bytes / wide, 0.5e-9 * bytes / half);
        }
        println!();
    }
}

fn main() -> Result<(), IsaError> {
    let threads: Vec<usize> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    for threads in if threads.is_empty() { vec![1, 2] } else { threads } {
        let cpu = Cpu::new(Some(threads))?;
        let peak = 1e-9 * ceiling::flops(&cpu);
        println!("\n{}, {} threads: peak {peak:.1} GFLOP/s", cpu.isa, cpu.pool.threads());
        products(&cpu, peak);
        if threads == 1 {
            serial_products(&cpu, peak);
        }
        streams(&cpu);
        let empty = fastest(0.1, || cpu.pool.run(cpu.pool.threads() * 4, |task| _ = black_box(task)));
        println!("an empty region: {:.2} µs", empty * 1e6);
    }
    Ok(())
}
