//! Speed of the selective scan and the causal convolution at Mamba-130m shapes (1536 channels, 16 states), beside a
//! loop of nothing but exponentials.
//!
//! `cargo run --release -p hognose-core --example scan_speed [THREADS]`

use std::time::Instant;

use hognose_core::cpu::{Cpu, Kernel, Simd, math};
use hognose_core::graph::Recompute;
use hognose_core::ops::selective_scan::{Discretisation, SelectiveScan, selective_scan};
use hognose_core::rng::uniform;
use hognose_core::{DType, Device, Error, Graph, Pack, Slice, TensorId};

const CHANNELS: usize = 1536;
const D_STATE: usize = 16;
const RUNS: usize = 30;

fn main() -> Result<(), Error> {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(1);
    let device = Device::cpu(Some(threads))?;
    let Device::Cpu(cpu) = &device;
    let ceiling = exponentials(cpu);
    println!("{threads} threads, {}: {:.2} G exp/s in a plain loop", cpu.isa, ceiling / 1e9);
    for (segments, length) in [(1, 1), (64, 1), (1, 128), (1, 512), (1, 2048), (8, 256)] {
        for grad in [false, true] {
            if grad && length == 1 {
                continue;
            }
            let seconds = time(&device, segments, length, grad)?;
            let tokens = (segments * length) as f64;
            let rate = tokens * (CHANNELS * D_STATE) as f64 / seconds;
            println!(
                "selective_scan{} {segments} x {length}: {:.1} us, {:.0} tokens/s, {:.2} G exp/s = {:.0} % of the loop",
                if grad { " and its gradient" } else { "" },
                seconds * 1e6,
                tokens / seconds,
                rate / 1e9,
                100.0 * rate / ceiling,
            );
        }
    }
    Ok(())
}

/// Exponentials a second of a loop over values in the first-level cache, on all threads.
fn exponentials(cpu: &Cpu) -> f64 {
    struct Exp<'a>(&'a mut [f32]);
    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let data = self.0.as_mut_ptr();
            for i in (0..self.0.len() / S::LANES * S::LANES).step_by(S::LANES) {
                // SAFETY: a whole vector follows i.
                unsafe { s.store(data.add(i), s.neg(math::exp(s, s.load(data.add(i))))) }
            }
        }
    }
    let (tasks, repeats, len) = (16, 40, 4096);
    let run = || {
        cpu.pool.run(tasks, |_| {
            let mut values = vec![-1.0f32; len];
            for _ in 0..repeats {
                cpu.isa.run(Exp(&mut values));
            }
            assert!(values[0] < 0.0);
        });
    };
    (tasks * repeats * len) as f64 / best(run)
}

/// Seconds of the fastest of some runs: what the machine does when nobody else uses it.
fn best(mut run: impl FnMut()) -> f64 {
    run();
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn time(device: &Device, segments: usize, length: usize, grad: bool) -> Result<f64, Error> {
    let tokens = segments * length;
    let pack = Pack::from_lengths(vec![length; segments])?;
    let mut g = Graph::new();
    let mut inputs = Vec::new();
    let mut input = |g: &mut Graph, rows, cols, low: f32, high: f32| -> TensorId {
        inputs.push((low, high));
        g.external("", DType::F32, rows, cols)
    };
    let x = input(&mut g, tokens, CHANNELS, -1.0, 1.0);
    let dt = input(&mut g, tokens, CHANNELS, -6.0, -1.0);
    let a = input(&mut g, CHANNELS, D_STATE, -16.0, -1.0);
    let b = input(&mut g, tokens, D_STATE, -1.0, 1.0);
    let c = input(&mut g, tokens, D_STATE, -1.0, 1.0);
    let d = input(&mut g, 1, CHANNELS, 0.9, 1.1);
    let z = input(&mut g, tokens, CHANNELS, -1.0, 1.0);
    let dt_bias = input(&mut g, 1, CHANNELS, -0.1, 0.1);
    let state = input(&mut g, segments, D_STATE * CHANNELS, -0.1, 0.1);
    let dy = input(&mut g, tokens, CHANNELS, -1.0, 1.0);
    let segments = g.external("", DType::I32, 1, segments + 1);
    let scan = SelectiveScan {
        x,
        dt,
        a,
        b,
        c,
        d: Some(d),
        z: Some(z),
        dt_bias: Some(dt_bias),
        initial_state: if grad { None } else { Some(state) },
        segments,
        softplus: true,
        discretisation: Discretisation::Euler,
    };
    let scanned = selective_scan(&mut g, scan)?;
    g.output("y", scanned.y)?;
    if grad {
        let wrt = [x, dt, a, b, c, d, z, dt_bias];
        for gradient in g.backward(&[(scanned.y, dy)], &wrt, Recompute::Nothing)?.into_iter().flatten() {
            g.output("", gradient)?;
        }
    } else {
        g.store(scanned.final_state, state)?;
    }
    let plan = device.plan(g)?;
    let arena = device.arena(&plan)?;
    let mut buffers = Vec::new();
    for (i, external) in plan.graph().externals().iter().enumerate() {
        let bytes = plan.external_bytes(external.tensor);
        let buffer = device.alloc(bytes)?;
        if external.tensor == segments {
            buffer.write(0, pack.offsets());
        } else if let Some(&(low, high)) = inputs.get(i) {
            let values: Vec<f32> = (0..bytes / 4).map(|e| low + (high - low) * uniform(i as u32, e as u64)).collect();
            buffer.write(0, &values);
        }
        buffers.push(buffer);
    }
    let bindings: Vec<Slice<'_>> = buffers.iter().map(|b| b.slice()).collect();
    let repeats = (256 / tokens).clamp(1, 100);
    let run = || (0..repeats).for_each(|_| device.run(&plan, &arena, &bindings).expect("the bindings fit"));
    Ok(best(run) / repeats as f64)
}
