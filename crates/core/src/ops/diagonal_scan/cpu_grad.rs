//! The gradient kernel: a task walks backwards through the segments of a group with a block of channels.
//!
//! Per chunk and state it computes the states again from the one kept at the chunk's start, then walks back with
//! g = ∂L/∂h. The gradient of a complex number means ∂L/∂Re + i ∂L/∂Im; a line over a number is its conjugate:
//!
//! ```text
//! g[t]  = κ C̄[t] dy[t] + conj(decay[t+1]) g[t+1]
//! dB[t] = Σ_d g F̄ x            dC[t] = Σ_d κ h̄[t] dy          dx[t] = D dy + Re Σ_n g conj(F B)
//! dz    = g conj(decay h[t−1])            of z = ΔA
//! dF    = g B̄ x
//! dA    = Σ_t Δ dz + dF conj(∂F/∂A)       dΔ[t] = Re Σ_n (dz Ā + dF conj(∂F/∂Δ))
//! ```
//!
//! with ∂F/∂Δ = 1 and ∂F/∂A = 0 (Euler), or exp(z) and Δ² φ′(z) (zero-order hold). Sums over channels are kept per block
//! of channels, which are wide enough that all of them take at most T·D values; sums over time are kept per group of
//! segments. Both are added up in a fixed order at the end.

use super::cpu::{Block, DISCRETE, Inputs, parameters_len};
use super::numbers::{Number, Numbers};
use super::{A, A_IMAG, B, C, D, DT, DT_BIAS, Discretisation, Forward, Gradient, SEGMENTS, X};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::graph::{Io, Mat};
use crate::ops::tasks::{ChannelBlocks, Scratch, SegmentGroups, Segments, run_with_slots};
use crate::ops::vectors::{load, store};

/// The fewest channels of a task, whole vectors at every level.
const BLOCK: usize = 64;
/// Vectors a step and vector of channels: x, Δ, dy, dx, dΔ.
const STEP: usize = 5;
/// Rows and channels of a task of the final sums.
const SUM_ROWS: usize = 64;
const SUM_CHANNELS: usize = 64;

/// How the work and the scratch memory are cut.
pub(super) struct Layout {
    block: usize,
    blocks: ChannelBlocks,
    segment_groups: SegmentGroups,
    tokens: usize,
    channels: usize,
    segments: usize,
    width: usize,
    row_sums: bool,
    slots: usize,
    slot_len: usize,
}

impl Layout {
    pub fn new(forward: &Forward, tokens: usize, channels: usize, segments: usize, cpu: &Cpu) -> Layout {
        let width = forward.width();
        let block = BLOCK.max(2 * width).next_multiple_of(MAX_LANES);
        let blocks = ChannelBlocks::new(channels, 1, block);
        let chunk = forward.chunk();
        // Of one state: the discrete model, the states with the one before the first step, and the sums of dB and dC.
        let of_a_state = (DISCRETE * chunk + 2 * (chunk + 1) + 4 * chunk) * MAX_LANES;
        Layout {
            block,
            blocks,
            segment_groups: SegmentGroups::new(segments, blocks.count()),
            tokens,
            channels,
            segments,
            width,
            row_sums: forward.fixed != [true; 2],
            slots: cpu.pool.threads(),
            slot_len: parameters_len(forward, block) + STEP * chunk * block + of_a_state,
        }
    }

    /// Rows and columns of the sums over channels, dB then dC: T rows a block.
    fn row_sums(&self) -> (usize, usize) {
        if self.row_sums { (self.blocks.count() * self.tokens, 2 * self.width) } else { (0, 0) }
    }

    /// Values of the sums over time of a group of segments: dA, dB and dC by states, dD, the bias.
    fn time_sums(&self) -> usize {
        (3 * self.width + 2) * self.channels
    }

    pub fn bytes(&self) -> usize {
        let (rows, cols) = self.row_sums();
        Scratch::bytes(self.slots, self.slot_len)
            + Scratch::bytes(self.segment_groups.count(), self.time_sums())
            + Scratch::bytes(rows, cols)
            + Scratch::bytes(self.segments, self.width * self.channels)
    }
}

pub(super) fn run(gradient: &Gradient, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(io);
    let (tokens, channels) = (inputs.x.rows, inputs.x.cols);
    let segments = Segments::new(io.segments(SEGMENTS), tokens);
    let layout = Layout::new(&gradient.forward, tokens, channels, segments.len(), cpu);
    let mut memory = Scratch::new(io.workspace());
    let scratch = memory.take(layout.slots, layout.slot_len);
    let time_sums = memory.take(layout.segment_groups.count(), layout.time_sums());
    let (rows, cols) = layout.row_sums();
    let task = Task {
        forward: &gradient.forward,
        layout: &layout,
        inputs,
        segments,
        dy: io.optional_input(Gradient::DY),
        d_final: io.optional_input(Gradient::D_FINAL),
        chunk_states: io.input(Gradient::CHUNK_STATES),
        dx: io.optional_output(X),
        d_dt: io.optional_output(DT),
        time_sums,
        row_sums: memory.take(rows, cols),
        // Between chunks g rests where the initial states' gradient goes; in scratch memory, if nobody wants that.
        g: io
            .optional_output(Forward::INITIAL_STATE)
            .unwrap_or_else(|| memory.take(segments.len(), layout.width * channels)),
    };
    let blocks = layout.blocks.count();
    run_with_slots(&cpu.pool, layout.segment_groups.count() * blocks, |slot, i| {
        // SAFETY: no other task uses the slot's row meanwhile.
        let scratch = unsafe { scratch.row_mut::<f32>(slot) }.as_mut_ptr();
        let (_, channels) = layout.blocks.block(i % blocks);
        let block = Block { forward: &gradient.forward, inputs, channels, parameters: scratch };
        cpu.isa.run(Walk { task: &task, block, number: i % blocks, segment_group: i / blocks });
    });
    let sums_of = |i: usize| io.optional_output([B, C][i]).filter(|_| !gradient.forward.fixed[i]);
    for (i, out) in [0, 1].into_iter().filter_map(|i| Some((i, sums_of(i)?))) {
        task.add_up_rows(i, out, cpu);
    }
    add_up_time(gradient, io, &layout, time_sums, cpu);
    for rows in [task.dx, task.d_dt, sums_of(0), sums_of(1)].into_iter().flatten() {
        segments.clear_rest(rows);
    }
}

struct Task<'a> {
    forward: &'a Forward,
    layout: &'a Layout,
    inputs: Inputs,
    segments: Segments<'a>,
    dy: Option<Mat>,
    d_final: Option<Mat>,
    chunk_states: Mat,
    dx: Option<Mat>,
    d_dt: Option<Mat>,
    time_sums: Mat,
    row_sums: Mat,
    g: Mat,
}

impl Task<'_> {
    /// Adds up dB (`which` 0) or dC (1) over the blocks. Rows in no segment hold garbage still.
    fn add_up_rows(&self, which: usize, out: Mat, cpu: &Cpu) {
        let (tokens, width) = (self.layout.tokens, self.layout.width);
        cpu.pool.chunks(tokens, SUM_ROWS, |rows| {
            for row in rows {
                // SAFETY: this task alone writes the row; those that wrote the sums are done.
                unsafe {
                    let out = out.row_mut::<f32>(row);
                    for block in 0..self.layout.blocks.count() {
                        let part = &self.row_sums.row::<f32>(block * tokens + row)[which * width..][..width];
                        if block == 0 {
                            out.copy_from_slice(part);
                        } else {
                            out.iter_mut().zip(part).for_each(|(o, p)| *o += p);
                        }
                    }
                }
            }
        });
    }
}

/// Adds up the sums over time of all groups of segments and writes the gradients of what does not depend on time.
fn add_up_time(gradient: &Gradient, io: &Io<'_>, layout: &Layout, sums: Mat, cpu: &Cpu) {
    let (forward, channels, width) = (&gradient.forward, layout.channels, layout.width);
    let fixed = |i: usize| io.optional_output([B, C][i]).filter(|_| forward.fixed[i]);
    // Outputs with a row a channel, with the first row of their sums.
    let matrices = [
        (io.optional_output(A), 0),
        (io.optional_output(A_IMAG), forward.states),
        (fixed(0), width),
        (fixed(1), 2 * width),
    ];
    let vectors = [(io.optional_output(D), 3 * width), (io.optional_output(DT_BIAS), 3 * width + 1)];
    let total = |row: usize, channel: usize| {
        let col = row * channels + channel;
        // SAFETY: the tasks that wrote the sums are done.
        (0..sums.rows).fold(0.0f32, |sum, group| sum + unsafe { *sums.at::<f32>(group, col) })
    };
    cpu.pool.chunks(channels, SUM_CHANNELS, |block| {
        for channel in block {
            // SAFETY: this task alone writes what belongs to its channels.
            unsafe {
                for (out, first) in matrices.iter().filter_map(|(out, first)| Some((out.as_ref()?, first))) {
                    for (n, to) in out.row_mut::<f32>(channel).iter_mut().enumerate() {
                        *to = total(first + n, channel);
                    }
                }
                for (out, row) in vectors.iter().filter_map(|(out, row)| Some((out.as_ref()?, row))) {
                    *out.at::<f32>(0, channel) = total(*row, channel);
                }
            }
        }
    });
}

struct Walk<'a> {
    task: &'a Task<'a>,
    block: Block<'a>,
    /// The block's number.
    number: usize,
    segment_group: usize,
}

impl Kernel for Walk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (task, block) = (self.task, &self.block);
        // SAFETY: the scratch memory is this task's, and so are these channels of the outputs and of the sums.
        unsafe {
            block.load_parameters(s);
            for row in 0..3 * task.layout.width + 2 {
                let col = row * task.layout.channels + block.channels.start;
                task.time_sums.row_mut::<f32>(self.segment_group)[col..][..block.channels.len()].fill(0.0);
            }
            for segment in task.layout.segment_groups.segments(self.segment_group) {
                if task.forward.is_complex() {
                    self.walk(Numbers::<S, true>(s), segment);
                } else {
                    self.walk(Numbers::<S, false>(s), segment);
                }
            }
        }
    }
}

/// A chunk of a segment.
#[derive(Clone, Copy)]
struct Chunk {
    segment: usize,
    first: usize,
    steps: usize,
    kept_row: usize,
    is_last: bool,
}

impl Walk<'_> {
    /// Walks back through a segment.
    ///
    /// # Safety
    /// Parameters are loaded; the scratch memory and these channels of outputs and sums are this task's.
    #[inline(always)]
    unsafe fn walk<S: Simd, const COMPLEX: bool>(&self, f: Numbers<S, COMPLEX>, segment: usize) {
        let (task, block) = (self.task, &self.block);
        let rows = task.segments.rows(segment);
        let chunk = task.forward.chunk();
        if rows.is_empty() {
            // The final states are the initial ones.
            for (v, n) in (0..block.vectors::<S>()).flat_map(|v| (0..task.forward.states).map(move |n| (v, n))) {
                // SAFETY: as the caller says.
                unsafe {
                    let g = task.d_final.map_or(f.zero(), |d| block.load_state(f, d, segment, v, n));
                    block.store_state(f, task.g, segment, (v, n), g);
                }
            }
        }
        for i in (0..rows.len().div_ceil(chunk)).rev() {
            let first = rows.start + i * chunk;
            let steps = chunk.min(rows.end - first);
            let kept_row = task.forward.chunk_row(segment, rows.start, i);
            let chunk = Chunk { segment, first, steps, kept_row, is_last: first + steps == rows.end };
            // SAFETY: as the caller says.
            unsafe {
                self.begin(f.0, chunk);
                for n in 0..task.forward.states {
                    self.state(f, chunk, n);
                }
                self.end(f.0, chunk);
            }
        }
    }

    /// Where value `which` of a step and a vector of channels lies: x, Δ, dy, dx, dΔ.
    #[inline(always)]
    fn step_values<S: Simd>(&self, v: usize, which: usize) -> *mut f32 {
        let start = self.block.parameters.wrapping_add(parameters_len(self.task.forward, self.task.layout.block));
        start.wrapping_add((STEP * v + which) * self.task.forward.chunk() * S::LANES)
    }

    /// Where what belongs to one state lies: the discrete model, the states, the sums of dB and dC.
    #[inline(always)]
    fn state_values<S: Simd>(&self) -> [*mut f32; 3] {
        let (forward, block) = (self.task.forward, self.task.layout.block);
        let chunk = forward.chunk();
        let start = self.block.parameters.wrapping_add(parameters_len(forward, block) + STEP * chunk * block);
        let states = start.wrapping_add(DISCRETE * chunk * S::LANES);
        [start, states, states.wrapping_add(2 * (chunk + 1) * S::LANES)]
    }

    /// Loads a chunk; dx = D dy and dΔ = 0.
    ///
    /// # Safety
    /// As [`Walk::walk`].
    #[inline(always)]
    unsafe fn begin<S: Simd>(&self, s: S, chunk: Chunk) {
        let (task, block) = (self.task, &self.block);
        for v in 0..block.vectors::<S>() {
            let (channel, lanes) = block.vector::<S>(v);
            let [x, delta, dy, dx, d_delta] = [0, 1, 2, 3, 4].map(|i| self.step_values::<S>(v, i));
            // SAFETY: as the caller says.
            unsafe {
                block.load_steps(s, v, chunk.first, chunk.steps, x, delta);
                let skip = block.per_channel(s, task.inputs.d, v);
                for t in 0..chunk.steps {
                    let at = |m: Mat| load(s, m.at::<f32>(chunk.first + t, channel), lanes);
                    let value = task.dy.map_or(s.zero(), at);
                    s.store(dy.add(t * S::LANES), value);
                    s.store(dx.add(t * S::LANES), s.mul(skip, value));
                    s.store(d_delta.add(t * S::LANES), s.zero());
                }
            }
        }
    }

    /// Adds to the sums over time of vector `v`, in row `row` of them.
    ///
    /// # Safety
    /// As [`Walk::walk`].
    #[inline(always)]
    unsafe fn add_sum<S: Simd>(&self, s: S, v: usize, row: usize, value: S::V) {
        let (channel, lanes) = self.block.vector::<S>(v);
        // SAFETY: as the caller says.
        unsafe {
            let at = self.task.time_sums.at::<f32>(self.segment_group, row * self.task.layout.channels + channel);
            store(s, at, s.add(load(s, at, lanes), value), lanes);
        }
    }

    /// Walks back through a chunk with one state of all channels.
    ///
    /// # Safety
    /// As [`Walk::walk`]; the chunk is loaded.
    #[inline(always)]
    unsafe fn state<S: Simd, const COMPLEX: bool>(&self, f: Numbers<S, COMPLEX>, chunk: Chunk, n: usize) {
        let (s, task, block) = (f.0, self.task, &self.block);
        let (states, width) = (task.forward.states, task.layout.width);
        let [discrete, kept, sums] = self.state_values::<S>();
        // SAFETY: as the caller says; the builder checked the shapes, and rows and channels lie inside them.
        unsafe {
            for v in 0..block.vectors::<S>() {
                let found = self.state_of_vector(f, chunk, n, v, [discrete, kept, sums]);
                for (i, sum) in found.into_iter().enumerate() {
                    self.add_sum(s, v, i * width + n, sum.re);
                    if COMPLEX {
                        self.add_sum(s, v, i * width + states + n, sum.im);
                    }
                }
            }
            for which in (0..2).filter(|&which| !task.forward.fixed[which]) {
                for t in 0..chunk.steps {
                    let row = self.number * task.layout.tokens + chunk.first + t;
                    for part in 0..task.forward.planes {
                        let sum = s.load(sums.add((4 * t + 2 * which + part) * S::LANES));
                        *task.row_sums.at::<f32>(row, which * width + part * states + n) = s.reduce_add(sum);
                    }
                }
            }
        }
    }

    /// The same with one vector of channels, in whose place 0 the sums over channels begin anew. Returns what it adds to
    /// dA and, where they are fixed, to dB and dC.
    ///
    /// # Safety
    /// As [`Walk::state`].
    #[inline(always)]
    unsafe fn state_of_vector<S: Simd, const COMPLEX: bool>(
        &self,
        f: Numbers<S, COMPLEX>,
        chunk: Chunk,
        n: usize,
        v: usize,
        [discrete, kept, sums]: [*mut f32; 3],
    ) -> [Number<S::V>; 3] {
        let (s, task, block) = (f.0, self.task, &self.block);
        let zoh = task.forward.discretisation == Discretisation::Zoh;
        let [x, delta, dy, dx, d_delta] = [0, 1, 2, 3, 4].map(|i| self.step_values::<S>(v, i));
        // SAFETY: as the caller says.
        unsafe {
            let a = block.a(f, v, n);
            let fixed = [0, 1].map(|which| block.fixed(f, v, n, which));
            block.discretise(f, a, chunk.steps, delta, discrete);
            // The states again; state t of them is the one before step t.
            let mut h = block.load_state(f, task.chunk_states, chunk.kept_row, v, n);
            f.store(kept, S::LANES, h);
            for t in 0..chunk.steps {
                let (decay, factor) = block.discrete(f, discrete, t);
                let b = block.at_step(f, fixed[0], (chunk.first + t, n), 0);
                let input = f.scale(f.mul(factor, b), s.load(x.add(t * S::LANES)));
                h = f.fma(decay, h, input);
                f.store(kept.add(2 * (t + 1) * S::LANES), S::LANES, h);
            }
            let mut g = if chunk.is_last {
                task.d_final.map_or(f.zero(), |d| block.load_state(f, d, chunk.segment, v, n))
            } else {
                block.load_state(f, task.g, chunk.segment, v, n)
            };
            let kappa = s.splat(task.forward.planes as f32);
            let mut totals = [f.zero(); 3];
            for t in (0..chunk.steps).rev() {
                let lane = t * S::LANES;
                let (decay, factor) = block.discrete(f, discrete, t);
                let b = block.at_step(f, fixed[0], (chunk.first + t, n), 0);
                let c = block.at_step(f, fixed[1], (chunk.first + t, n), 1);
                let (x, delta) = (s.load(x.add(lane)), s.load(delta.add(lane)));
                let dy = s.mul(kappa, s.load(dy.add(lane)));
                let before = f.load(kept.add(2 * lane), S::LANES);
                let after = f.load(kept.add(2 * lane + 2 * S::LANES), S::LANES);
                g = f.add(g, f.scale(f.conj(c), dy));
                let dc = f.scale(f.conj(after), dy);
                let to = dx.add(lane);
                s.store(to, s.add(s.load(to), f.mul(g, f.conj(f.mul(factor, b))).re));
                let gx = f.scale(g, x);
                let db = f.mul(gx, f.conj(factor));
                let d_factor = f.mul(gx, f.conj(b));
                let dz = f.mul(g, f.conj(f.mul(decay, before)));
                totals[0] = f.add(totals[0], f.scale(dz, delta));
                let mut step = f.mul(dz, f.conj(a)).re;
                if zoh {
                    let slope = f.scale(f.phi_slope(f.scale(a, delta), decay), s.mul(delta, delta));
                    totals[0] = f.fma(d_factor, f.conj(slope), totals[0]);
                    step = s.add(step, f.mul(d_factor, f.conj(decay)).re);
                } else {
                    step = s.add(step, d_factor.re);
                }
                let to = d_delta.add(lane);
                s.store(to, s.add(s.load(to), step));
                for (i, value) in [db, dc].into_iter().enumerate() {
                    if task.forward.fixed[i] {
                        totals[1 + i] = f.add(totals[1 + i], value);
                    } else {
                        let to = sums.add((4 * t + 2 * i) * S::LANES);
                        let sum = if v == 0 { value } else { f.add(f.load(to, S::LANES), value) };
                        f.store(to, S::LANES, sum);
                    }
                }
                g = f.mul(g, f.conj(decay));
            }
            block.store_state(f, task.g, chunk.segment, (v, n), g);
            totals
        }
    }

    /// Writes dx and d dt of a chunk, and adds to dD and to the bias's gradient.
    ///
    /// # Safety
    /// As [`Walk::walk`].
    #[inline(always)]
    unsafe fn end<S: Simd>(&self, s: S, chunk: Chunk) {
        let (task, block) = (self.task, &self.block);
        for v in 0..block.vectors::<S>() {
            let (channel, lanes) = block.vector::<S>(v);
            let values = [0, 1, 2, 3, 4].map(|i| self.step_values::<S>(v, i));
            let (mut dd, mut d_bias) = (s.zero(), s.zero());
            for t in (0..chunk.steps).rev() {
                // SAFETY: as the caller says.
                unsafe {
                    let [x, delta, dy, dx, d_delta] = values.map(|at| s.load(at.add(t * S::LANES)));
                    dd = s.fma(x, dy, dd);
                    // The slope of softplus is the logistic function, 1 − exp(−softplus).
                    let d_dt = s.mul(d_delta, s.neg(math::exp_m1(s, s.neg(delta))));
                    d_bias = s.add(d_bias, d_dt);
                    for (out, value) in [(task.dx, dx), (task.d_dt, d_dt)] {
                        if let Some(out) = out {
                            store(s, out.at::<f32>(chunk.first + t, channel), value, lanes);
                        }
                    }
                }
            }
            // SAFETY: as the caller says.
            unsafe {
                self.add_sum(s, v, 3 * task.layout.width, dd);
                self.add_sum(s, v, 3 * task.layout.width + 1, d_bias);
            }
        }
    }
}
