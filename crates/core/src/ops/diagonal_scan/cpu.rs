//! The forward kernel: a task walks through the segments of a group with a block of channels.
//!
//! Time is cut into the chunks at whose starts states are kept. In each, one vector of channels at a time, and of that
//! one state after another walks through all steps, after the decays of all of them: these depend on nothing before
//! them. Every step does the same operations in the same order wherever a chunk starts.

use std::ops::Range;

use super::numbers::{Number, Numbers};
use super::{A, A_IMAG, B, C, D, DT, DT_BIAS, Discretisation, Forward, SEGMENTS, X};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::graph::{Io, Mat};
use crate::ops::tasks::{ChannelBlocks, Scratch, SegmentGroups, Segments, run_with_slots, transpose_rows, vectors};
use crate::ops::vectors::{load, store};

/// Channels of a task, whole vectors at every level.
const BLOCK: usize = 64;

/// Values of scratch memory of a task: parameters with channels as lanes, and [`Tile`]'s.
fn scratch_len(forward: &Forward) -> usize {
    parameters_len(forward, BLOCK) + (3 + DISCRETE) * forward.chunk() * MAX_LANES
}

/// Values of A, B and C of a block of channels.
pub(super) fn parameters_len(forward: &Forward, block: usize) -> usize {
    3 * forward.width() * block
}

/// Vectors a step that [`discretise`] writes: decay and factor, with two parts each.
pub(super) const DISCRETE: usize = 4;

pub(super) fn workspace(forward: &Forward, channels: usize, segments: usize, cpu: &Cpu) -> usize {
    Scratch::bytes(cpu.pool.threads(), scratch_len(forward)) + Scratch::bytes(segments, forward.width() * channels)
}

pub(super) fn run(forward: &Forward, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(io);
    let (tokens, channels) = (inputs.x.rows, inputs.x.cols);
    let segments = Segments::new(io.segments(SEGMENTS), tokens);
    let mut memory = Scratch::new(io.workspace());
    let scratch = memory.take(cpu.pool.threads(), scratch_len(forward));
    let scan = Scan {
        forward,
        inputs,
        segments,
        initial: io.optional_input(Forward::INITIAL_STATE),
        y: io.optional_output(0),
        // Between chunks the states rest where the final ones go; in scratch memory, if nobody wants those.
        states: io.optional_output(1).unwrap_or_else(|| memory.take(segments.len(), forward.width() * channels)),
        chunk_states: io.optional_output(2),
    };
    let blocks = ChannelBlocks::new(channels, 1, BLOCK);
    let groups = SegmentGroups::new(segments.len(), blocks.count());
    run_with_slots(&cpu.pool, groups.count() * blocks.count(), |slot, task| {
        let (_, channels) = blocks.block(task % blocks.count());
        // SAFETY: no other task uses the slot's row meanwhile.
        let scratch = unsafe { scratch.row_mut::<f32>(slot) }.as_mut_ptr();
        let block = Block { forward, inputs, channels, parameters: scratch };
        cpu.isa.run(Walk { scan: &scan, block, segments: groups.segments(task / blocks.count()) });
    });
    if let Some(y) = scan.y {
        segments.clear_rest(y);
    }
}

/// The operands that the forward pass and its repetition in the gradient read.
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    pub x: Mat,
    a: [Option<Mat>; 2],
    b: Mat,
    c: Mat,
    dt: Option<Mat>,
    dt_bias: Option<Mat>,
    pub d: Option<Mat>,
}

impl Inputs {
    pub fn new(io: &Io<'_>) -> Inputs {
        Inputs {
            x: io.input(X),
            a: [Some(io.input(A)), io.optional_input(A_IMAG)],
            b: io.input(B),
            c: io.input(C),
            dt: io.optional_input(DT),
            dt_bias: io.optional_input(DT_BIAS),
            d: io.optional_input(D),
        }
    }
}

/// The channels of a task, and their parameters.
#[derive(Clone)]
pub(super) struct Block<'a> {
    pub forward: &'a Forward,
    pub inputs: Inputs,
    pub channels: Range<usize>,
    /// A, then B and C where they are fixed: for each vector of channels a vector a state and part.
    pub parameters: *mut f32,
}

impl Block<'_> {
    /// The first channel and the number of channels of vector `v`.
    #[inline(always)]
    pub fn vector<S: Simd>(&self, v: usize) -> (usize, usize) {
        let first = self.channels.start + v * S::LANES;
        (first, S::LANES.min(self.channels.end - first))
    }

    #[inline(always)]
    pub fn vectors<S: Simd>(&self) -> usize {
        vectors::<S>(self.channels.len())
    }

    /// Where parameter `which` (A, B, C) of vector `v` lies.
    #[inline(always)]
    fn parameter<S: Simd>(&self, v: usize, which: usize) -> *mut f32 {
        self.parameters.wrapping_add((3 * v + which) * self.forward.width() * S::LANES)
    }

    /// Brings the parameters into their places.
    ///
    /// # Safety
    /// There is room for [`parameters_len`] values, which no other task uses.
    #[inline(always)]
    pub unsafe fn load_parameters<S: Simd>(&self, s: S) {
        for v in 0..self.vectors::<S>() {
            let (channel, lanes) = self.vector::<S>(v);
            let mut sources = [(None, std::ptr::null_mut()); 4];
            for (part, a) in self.inputs.a.into_iter().enumerate() {
                sources[part] = (a, self.parameter::<S>(v, 0).wrapping_add(part * self.forward.states * S::LANES));
            }
            for (i, m) in [self.inputs.b, self.inputs.c].into_iter().enumerate() {
                sources[2 + i] = (Some(m).filter(|_| self.forward.fixed[i]), self.parameter::<S>(v, 1 + i));
            }
            for (m, to) in sources {
                if let Some(m) = m {
                    // SAFETY: the channels are rows of it; as the caller says.
                    unsafe { transpose_rows(s, m, channel, lanes, to) }
                }
            }
        }
    }

    /// A of state `n`.
    ///
    /// # Safety
    /// The parameters are loaded.
    #[inline(always)]
    pub unsafe fn a<S: Simd, const COMPLEX: bool>(&self, f: Numbers<S, COMPLEX>, v: usize, n: usize) -> Number<S::V> {
        // SAFETY: as the caller says.
        unsafe { f.load(self.parameter::<S>(v, 0).add(n * S::LANES), self.forward.states * S::LANES) }
    }

    /// B (`which` 0) or C (1) of state `n`, where it is fixed; zero elsewhere.
    ///
    /// # Safety
    /// The parameters are loaded.
    #[inline(always)]
    pub unsafe fn fixed<S: Simd, const COMPLEX: bool>(
        &self,
        f: Numbers<S, COMPLEX>,
        v: usize,
        n: usize,
        which: usize,
    ) -> Number<S::V> {
        if !self.forward.fixed[which] {
            return f.zero();
        }
        // SAFETY: as the caller says.
        unsafe { f.load(self.parameter::<S>(v, 1 + which).add(n * S::LANES), self.forward.states * S::LANES) }
    }

    /// B (`which` 0) or C (1) of state `n` at row `t`, for all channels, where it is the input's; else `fixed`.
    ///
    /// # Safety
    /// The row lies in the operand.
    #[inline(always)]
    pub unsafe fn at_step<S: Simd, const COMPLEX: bool>(
        &self,
        f: Numbers<S, COMPLEX>,
        fixed: Number<S::V>,
        (t, n): (usize, usize),
        which: usize,
    ) -> Number<S::V> {
        if self.forward.fixed[which] {
            return fixed;
        }
        let m = if which == 0 { self.inputs.b } else { self.inputs.c };
        // SAFETY: as the caller says; the builder checked the columns.
        f.of(|part| f.0.splat(unsafe { *m.at::<f32>(t, part * self.forward.states + n) }))
    }

    /// One value per channel of vector `v`, zero where the operand is not given.
    ///
    /// # Safety
    /// The operand has a row 0.
    #[inline(always)]
    pub unsafe fn per_channel<S: Simd>(&self, s: S, m: Option<Mat>, v: usize) -> S::V {
        let (channel, lanes) = self.vector::<S>(v);
        // SAFETY: the channels are columns of it.
        m.map_or(s.zero(), |m| unsafe { load(s, m.at::<f32>(0, channel), lanes) })
    }

    /// Writes x and Δ of `steps` steps from row `first` on, a vector a step.
    ///
    /// # Safety
    /// The rows exist; there is room.
    #[inline(always)]
    pub unsafe fn load_steps<S: Simd>(&self, s: S, v: usize, first: usize, steps: usize, x: *mut f32, delta: *mut f32) {
        let (channel, lanes) = self.vector::<S>(v);
        // SAFETY: as the caller says.
        unsafe {
            let bias = self.per_channel(s, self.inputs.dt_bias, v);
            for t in 0..steps {
                let at = |m: Mat| load(s, m.at::<f32>(first + t, channel), lanes);
                s.store(x.add(t * S::LANES), at(self.inputs.x));
                if let Some(dt) = self.inputs.dt {
                    s.store(delta.add(t * S::LANES), math::softplus(s, s.add(at(dt), bias)));
                }
            }
            if self.inputs.dt.is_none() {
                let fixed = math::softplus(s, bias);
                (0..steps).for_each(|t| s.store(delta.add(t * S::LANES), fixed));
            }
        }
    }

    /// Steps whose decays differ: one where Δ is fixed.
    #[inline(always)]
    pub fn discrete_steps(&self, steps: usize) -> usize {
        if self.inputs.dt.is_some() { steps } else { steps.min(1) }
    }

    /// Writes the decay exp(ΔA) and the factor F of the steps that differ: [`DISCRETE`] vectors each.
    ///
    /// # Safety
    /// Δ has a vector a step, and there is room.
    #[inline(always)]
    pub unsafe fn discretise<S: Simd, const COMPLEX: bool>(
        &self,
        f: Numbers<S, COMPLEX>,
        a: Number<S::V>,
        steps: usize,
        delta: *const f32,
        to: *mut f32,
    ) {
        let zoh = self.forward.discretisation == Discretisation::Zoh;
        for t in 0..self.discrete_steps(steps) {
            // SAFETY: as the caller says.
            unsafe {
                let delta = f.0.load(delta.add(t * S::LANES));
                let to = to.add(t * DISCRETE * S::LANES);
                let z = f.scale(a, delta);
                let decay = f.exp(z);
                f.store(to, S::LANES, decay);
                let factor = if zoh { f.scale(f.phi(z, decay), delta) } else { f.real(delta) };
                f.store(to.add(2 * S::LANES), S::LANES, factor);
            }
        }
    }

    /// What [`Block::discretise`] wrote for a step: decay and factor.
    ///
    /// # Safety
    /// It was called for this step.
    #[inline(always)]
    pub unsafe fn discrete<S: Simd, const COMPLEX: bool>(
        &self,
        f: Numbers<S, COMPLEX>,
        from: *const f32,
        t: usize,
    ) -> (Number<S::V>, Number<S::V>) {
        let t = if self.inputs.dt.is_some() { t } else { 0 };
        // SAFETY: as the caller says.
        unsafe {
            let from = from.add(t * DISCRETE * S::LANES);
            (f.load(from, S::LANES), f.load(from.add(2 * S::LANES), S::LANES))
        }
    }

    /// Reads state `n` of vector `v` from a row of states.
    ///
    /// # Safety
    /// The row exists.
    #[inline(always)]
    pub unsafe fn load_state<S: Simd, const COMPLEX: bool>(
        &self,
        f: Numbers<S, COMPLEX>,
        m: Mat,
        row: usize,
        v: usize,
        n: usize,
    ) -> Number<S::V> {
        let (channel, lanes) = self.vector::<S>(v);
        let col = |part| (part * self.forward.states + n) * self.inputs.x.cols + channel;
        // SAFETY: as the caller says; the builder checked the columns.
        f.of(|part| unsafe { load(f.0, m.at::<f32>(row, col(part)), lanes) })
    }

    /// Writes it.
    ///
    /// # Safety
    /// The row exists; no other task uses these channels of it.
    #[inline(always)]
    pub unsafe fn store_state<S: Simd, const COMPLEX: bool>(
        &self,
        f: Numbers<S, COMPLEX>,
        m: Mat,
        row: usize,
        (v, n): (usize, usize),
        h: Number<S::V>,
    ) {
        let (channel, lanes) = self.vector::<S>(v);
        let col = |part| (part * self.forward.states + n) * self.inputs.x.cols + channel;
        // SAFETY: as the caller says; the builder checked the columns.
        unsafe {
            store(f.0, m.at::<f32>(row, col(0)), h.re, lanes);
            if COMPLEX {
                store(f.0, m.at::<f32>(row, col(1)), h.im, lanes);
            }
        }
    }
}

/// What all tasks of the forward kernel share.
struct Scan<'a> {
    forward: &'a Forward,
    inputs: Inputs,
    segments: Segments<'a>,
    initial: Option<Mat>,
    y: Option<Mat>,
    states: Mat,
    chunk_states: Option<Mat>,
}

struct Walk<'a> {
    scan: &'a Scan<'a>,
    block: Block<'a>,
    segments: Range<usize>,
}

impl Kernel for Walk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: the scratch memory is this task's, and so are these channels of the outputs in these segments.
        unsafe {
            self.block.load_parameters(s);
            for segment in self.segments.clone() {
                for v in 0..self.block.vectors::<S>() {
                    if self.scan.forward.is_complex() {
                        self.walk(Numbers::<S, true>(s), segment, v);
                    } else {
                        self.walk(Numbers::<S, false>(s), segment, v);
                    }
                }
            }
        }
    }
}

impl Walk<'_> {
    /// Walks through a segment with a vector of channels.
    ///
    /// # Safety
    /// Parameters are loaded; the scratch memory and these channels of the outputs are this task's.
    #[inline(always)]
    unsafe fn walk<S: Simd, const COMPLEX: bool>(&self, f: Numbers<S, COMPLEX>, segment: usize, v: usize) {
        let (s, scan, block, forward) = (f.0, self.scan, &self.block, self.scan.forward);
        let rows = scan.segments.rows(segment);
        let chunk = forward.chunk();
        let x = block.parameters.wrapping_add(parameters_len(forward, BLOCK));
        let [delta, y, discrete] = [1, 2, 3].map(|i| x.wrapping_add(i * chunk * MAX_LANES));
        let (channel, lanes) = block.vector::<S>(v);
        // An empty segment has one chunk without steps, which passes the states on.
        for i in 0..rows.len().div_ceil(chunk).max(1) {
            let first = rows.start + i * chunk;
            let steps = chunk.min(rows.end - first);
            let from = if i == 0 { scan.initial } else { Some(scan.states) };
            // SAFETY: rows, states and channels lie inside the operands, whose shapes the builder checked.
            unsafe {
                block.load_steps(s, v, first, steps, x, delta);
                let skip = block.per_channel(s, scan.inputs.d, v);
                for t in 0..steps {
                    s.store(y.add(t * S::LANES), s.mul(skip, s.load(x.add(t * S::LANES))));
                }
                for n in 0..forward.states {
                    let mut h = from.map_or(f.zero(), |from| block.load_state(f, from, segment, v, n));
                    if let Some(keep) = scan.chunk_states.filter(|_| steps > 0) {
                        block.store_state(f, keep, forward.chunk_row(segment, rows.start, i), (v, n), h);
                    }
                    block.discretise(f, block.a(f, v, n), steps, delta, discrete);
                    let fixed = [0, 1].map(|which| block.fixed(f, v, n, which));
                    for t in 0..steps {
                        let (decay, factor) = block.discrete(f, discrete, t);
                        let b = block.at_step(f, fixed[0], (first + t, n), 0);
                        let c = block.at_step(f, fixed[1], (first + t, n), 1);
                        let input = f.scale(f.mul(factor, b), s.load(x.add(t * S::LANES)));
                        h = f.fma(decay, h, input);
                        let to = y.add(t * S::LANES);
                        s.store(to, add_output(f, c, h, s.load(to)));
                    }
                    block.store_state(f, scan.states, segment, (v, n), h);
                }
                if let Some(out) = scan.y {
                    for t in 0..steps {
                        store(s, out.at::<f32>(first + t, channel), s.load(y.add(t * S::LANES)), lanes);
                    }
                }
            }
        }
    }
}

/// y + κ Re(c · h).
#[inline(always)]
fn add_output<S: Simd, const COMPLEX: bool>(f: Numbers<S, COMPLEX>, c: Number<S::V>, h: Number<S::V>, y: S::V) -> S::V {
    let s = f.0;
    if !COMPLEX {
        return s.fma(c.re, h.re, y);
    }
    let real = s.fma(c.re, h.re, s.neg(s.mul(c.im, h.im)));
    s.fma(s.splat(2.0), real, y)
}
