//! Speed of the selective scan and the causal convolution at Mamba-130m shapes (1536 channels, 16 states, 4 taps),
//! beside a loop of nothing but exponentials.
//!
//! `cargo run --release -p hognose-core --example scan_speed [THREADS]`

use std::time::Instant;

use hognose_core::cpu::{Cpu, Kernel, Simd, math};
use hognose_core::graph::Recompute;
use hognose_core::ops::causal_conv1d::{CausalConv1d, causal_conv1d};
use hognose_core::ops::selective_scan::{Discretisation, SelectiveScan, selective_scan};
use hognose_core::rng::uniform;
use hognose_core::{DType, Device, Error, Graph, Pack, Slice, TensorId};

const CHANNELS: usize = 1536;
const D_STATE: usize = 16;
const TAPS: usize = 4;
const RUNS: usize = 30;

fn main() -> Result<(), Error> {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(1);
    let device = Device::cpu(Some(threads))?;
    let Device::Cpu(cpu) = &device else { return Ok(()) };
    let ceiling = exponentials(cpu);
    println!("{threads} threads, {}: {:.2} G exp/s in a plain loop", cpu.isa, ceiling / 1e9);
    for (segments, length) in [(1, 1), (64, 1), (1, 128), (1, 512), (1, 2048), (8, 256)] {
        for grad in [false, true] {
            let what = if grad { " and its gradient" } else { "" };
            let tokens = (segments * length) as f64;
            let seconds = Bench::new(segments, length)?.scan(grad)?.seconds(&device)?;
            let rate = tokens * (CHANNELS * D_STATE) as f64 / seconds;
            println!(
                "selective_scan{what} {segments} x {length}: {:.1} us, {:.0} tokens/s, {:.2} G exp/s = {:.0} %",
                seconds * 1e6,
                tokens / seconds,
                rate / 1e9,
                100.0 * rate / ceiling,
            );
            let seconds = Bench::new(segments, length)?.convolution(grad)?.seconds(&device)?;
            let speed = tokens / seconds;
            println!("causal_conv1d{what} {segments} x {length}: {:.1} us, {speed:.0} tokens/s", seconds * 1e6);
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
    (tasks * repeats * len) as f64 / fastest(run)
}

/// Seconds of the fastest of some runs: what the machine does when nobody else uses it.
fn fastest(mut run: impl FnMut()) -> f64 {
    run();
    let mut fastest = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        run();
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    fastest
}

/// A graph of one op with random inputs.
struct Bench {
    graph: Graph,
    pack: Pack,
    segments: TensorId,
    /// External inputs with the range of their values.
    inputs: Vec<(TensorId, f32, f32)>,
}

impl Bench {
    fn new(segments: usize, length: usize) -> Result<Bench, Error> {
        let mut graph = Graph::new();
        let offsets = graph.external("segments", DType::I32, 1, segments + 1);
        let pack = Pack::from_lengths(vec![length; segments])?;
        Ok(Bench { graph, pack, segments: offsets, inputs: Vec::new() })
    }

    fn input(&mut self, rows: usize, cols: usize, low: f32, high: f32) -> TensorId {
        let t = self.graph.external("input", DType::F32, rows, cols);
        self.inputs.push((t, low, high));
        t
    }

    fn scan(mut self, grad: bool) -> Result<Bench, Error> {
        let tokens = self.pack.tokens();
        let x = self.input(tokens, CHANNELS, -1.0, 1.0);
        let dt = self.input(tokens, CHANNELS, -6.0, -1.0);
        let a = self.input(CHANNELS, D_STATE, -16.0, -1.0);
        let b = self.input(tokens, D_STATE, -1.0, 1.0);
        let c = self.input(tokens, D_STATE, -1.0, 1.0);
        let d = self.input(1, CHANNELS, 0.9, 1.1);
        let z = self.input(tokens, CHANNELS, -1.0, 1.0);
        let dt_bias = self.input(1, CHANNELS, -0.1, 0.1);
        let state = self.input(self.pack.segments(), D_STATE * CHANNELS, -0.1, 0.1);
        let scan = SelectiveScan {
            x,
            dt,
            a,
            b,
            c,
            d: Some(d),
            z: Some(z),
            dt_bias: Some(dt_bias),
            initial_state: Some(state),
            segments: self.segments,
            softplus: true,
            discretisation: Discretisation::Euler,
        };
        let scanned = selective_scan(&mut self.graph, scan)?;
        let wrt = [x, dt, a, b, c, d, z, dt_bias];
        self.finish(scanned.y, scanned.final_state, state, grad.then_some(&wrt))
    }

    fn convolution(mut self, grad: bool) -> Result<Bench, Error> {
        let x = self.input(self.pack.tokens(), CHANNELS, -1.0, 1.0);
        let weight = self.input(CHANNELS, TAPS, -0.5, 0.5);
        let bias = self.input(1, CHANNELS, -0.5, 0.5);
        let state = self.input(self.pack.segments(), (TAPS - 1) * CHANNELS, -1.0, 1.0);
        let (segments, initial_state) = (self.segments, Some(state));
        let conv = CausalConv1d { x, weight, bias: Some(bias), initial_state, segments, silu: true };
        let convolved = causal_conv1d(&mut self.graph, conv)?;
        let wrt = [x, weight, bias];
        self.finish(convolved.y, convolved.final_state, state, grad.then_some(&wrt))
    }

    /// Stores the final state over the initial one, or asks for the gradients.
    fn finish(
        mut self,
        y: TensorId,
        last: TensorId,
        state: TensorId,
        wrt: Option<&[TensorId]>,
    ) -> Result<Bench, Error> {
        self.graph.output("y", y)?;
        match wrt {
            None => {
                self.graph.store(last, state)?;
            }
            Some(wrt) => {
                let dy = self.input(self.pack.tokens(), CHANNELS, -1.0, 1.0);
                for gradient in self.graph.backward(&[(y, dy)], wrt, Recompute::Nothing)?.into_iter().flatten() {
                    self.graph.output("gradient", gradient)?;
                }
            }
        }
        Ok(self)
    }

    fn seconds(self, device: &Device) -> Result<f64, Error> {
        let plan = device.plan(self.graph)?;
        let arena = device.arena(&plan)?;
        let mut buffers = Vec::new();
        for external in plan.graph().externals() {
            let bytes = device.external_bytes(&plan, external.tensor);
            let buffer = device.alloc(bytes)?;
            if external.tensor == self.segments {
                buffer.write(0, self.pack.offsets());
            }
            if let Some((seed, &(_, low, high))) =
                self.inputs.iter().enumerate().find(|(_, (t, ..))| *t == external.tensor)
            {
                let draw = |i| low + (high - low) * uniform(seed as u32, i);
                buffer.write(0, &(0..bytes as u64 / 4).map(draw).collect::<Vec<f32>>());
            }
            buffers.push(buffer);
        }
        let bindings: Vec<Slice<'_>> = buffers.iter().map(|b| b.slice()).collect();
        let repeats = (256 / self.pack.tokens()).clamp(1, 100);
        let run = || (0..repeats).for_each(|_| device.run(&plan, &arena, &bindings).expect("the bindings fit"));
        Ok(fastest(run) / repeats as f64)
    }
}
