//! Launches of SSD's kernels.

use super::{Dims, SHORT, inputs};
use crate::cuda::{Arg, Kernel, Launcher, Program, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Io, Mat};
use crate::ops::elementwise::cuda::{Function, map, sum_parts};

static PROGRAM: Program = Program {
    name: "ssd",
    source: concat!(include_str!("../../cuda/tiles.cu"), include_str!("kernel_steps.cu"), include_str!("kernel.cu")),
};
static GRADIENT: Program = Program {
    name: "ssd_grad",
    source: concat!(
        include_str!("../../cuda/tiles.cu"),
        include_str!("kernel_steps.cu"),
        include_str!("kernel_grad.cu")
    ),
};
static RECURRENCE: Program = Program { name: "ssd_recurrence", source: include_str!("kernel_recurrence.cu") };

/// Threads of a block, but for the walks, where a warp takes 16 rows of a chunk.
const THREADS: usize = 256;
const RECURRENCE_THREADS: usize = 128;
/// Channels that a warp takes in the plain recurrence.
const RECURRENCE_ROWS: usize = 4;
/// The largest state size whose tiles fit registers and shared memory.
const MOST_STATES: usize = 256;
/// How a call is cut: sizes of tiles and of pieces of segments. Depends on shapes, types and the GPU alone.
#[derive(Clone, Copy, Debug)]
struct Cut {
    tokens: usize,
    segments: usize,
    dtype: DType,
    /// Rows of a chunk.
    chunk: usize,
    /// Channels of a tile.
    channels: usize,
    /// The state size, rounded up.
    states: usize,
    /// Buffers that rows and states are fetched into while others are worked on.
    stages: usize,
    /// Rows of a span; more than there are tokens if segments are not cut.
    span: usize,
}

/// Bytes of a tile in shared memory.
fn tile(planes: usize, rows: usize, cols: usize) -> usize {
    planes * rows * (cols + 8) * 2
}

impl Cut {
    fn new(dims: &Dims, tokens: usize, segments: usize, dtype: DType, gradient: bool, gpu: &Properties) -> Cut {
        let states = dims.d_state.next_power_of_two().max(16);
        let (chunk, stages) = if dtype == DType::BF16 { (64, 2) } else { (32, 1) };
        // A thread of a walk holds 64 numbers of the state.
        let channels = dims.headdim.next_power_of_two().clamp(16, 64).min(128 * chunk / states).max(16);
        let mut cut = Cut { tokens, segments, dtype, chunk, channels, states, stages, span: 0 };
        let too_large = |cut: &Cut| cut.shared(gradient) > gpu.shared as usize;
        if too_large(&cut) {
            cut.stages = 1;
        }
        while too_large(&cut) && cut.channels > 16 {
            cut.channels /= 2;
        }
        while too_large(&cut) && cut.chunk > 16 {
            cut.chunk /= 2;
        }
        cut.span = cut.best_span(dims, gpu);
        cut
    }

    /// Rows of a span: what takes least time, in steps of a multiprocessor from one chunk to the next. Two blocks share a
    /// multiprocessor; one alone waits and is less than twice as fast. More than one span a segment costs a walk for the
    /// states that they start from, and the traffic of those.
    fn best_span(&self, dims: &Dims, gpu: &Properties) -> usize {
        let (segments, sms) = (self.segments.max(1), gpu.sms as usize);
        let chunks = self.tokens.div_ceil(segments).div_ceil(self.chunk);
        let cost = |n: usize| {
            let blocks = segments * dims.heads * self.tiles(dims) * n;
            let last = match blocks % (2 * sms) {
                0 => 0.0,
                rest if rest <= sms => 1.4,
                _ => 2.0,
            };
            let walk = chunks.div_ceil(n) as f64 * ((blocks / (2 * sms) * 2) as f64 + last);
            if n > 1 { 1.4 * walk + 3.0 * blocks as f64 / sms as f64 } else { walk }
        };
        let spans = (1..=chunks.clamp(1, 64)).min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap_or(1);
        if spans == 1 { self.tokens + 1 } else { chunks.div_ceil(spans) * self.chunk }
    }

    /// Tiles of channels that a head has.
    fn tiles(&self, dims: &Dims) -> usize {
        dims.headdim.div_ceil(self.channels)
    }

    fn planes(&self) -> usize {
        if self.dtype == DType::BF16 { 1 } else { 3 }
    }

    fn walk_shared(&self) -> usize {
        let (p, q) = (self.planes(), self.chunk);
        let stage = tile(p, q, self.channels) + 2 * tile(p, q, self.states);
        tile(p, self.channels, self.states) + self.stages * stage
    }

    fn gradient_shared(&self) -> usize {
        let (p, q) = (self.planes(), self.chunk);
        let stage = 2 * tile(p, q, self.channels) + 2 * tile(p, self.channels, self.states);
        2 * tile(p, q, self.states) + tile(p, q, q) + self.stages * stage
    }

    /// The most shared memory that a kernel of the op needs, with what it declares itself.
    fn shared(&self, gradient: bool) -> usize {
        let walk = self.walk_shared() + 24 * self.chunk;
        if gradient { walk.max(self.gradient_shared() + 320 * self.chunk + 512) } else { walk }
    }

    fn is_cut(&self) -> bool {
        self.span <= self.tokens
    }

    fn chunk_slots(&self) -> usize {
        self.tokens / self.chunk + self.segments
    }

    fn span_slots(&self) -> usize {
        self.tokens / self.span + self.segments
    }

    /// Blocks that share the heads of a group in the gradient.
    fn splits(&self, dims: &Dims, gpu: &Properties) -> usize {
        let (blocks, full) = (self.tokens.div_ceil(self.chunk).max(1) * dims.groups, gpu.sms as usize);
        if blocks >= full { 1 } else { (2 * full).div_ceil(blocks).min(dims.heads_per_group()) }
    }

    fn sizes(&self, dims: &Dims) -> Arg {
        let per_channel = usize::from(dims.d_per_channel);
        let sizes =
            [self.tokens, self.segments, dims.heads, dims.headdim, dims.d_state, dims.heads_per_group(), self.span];
        Arg::Table(sizes.into_iter().chain([per_channel]).map(|v| v as u64).collect())
    }

    /// A kernel that walks over spans.
    fn walk(&self, entry: &'static str, vector: usize, gate: bool) -> Kernel {
        let threads = 2 * self.chunk;
        self.kernel(&PROGRAM, entry, vector, threads).define("STAGES", self.stages).define("GATE", i32::from(gate))
    }

    fn kernel(&self, program: &'static Program, entry: &'static str, vector: usize, threads: usize) -> Kernel {
        Kernel::new(program, entry)
            .define_type("T", self.dtype)
            .define("SPLIT", self.planes())
            .define("Q", self.chunk)
            .define("PT", self.channels)
            .define("NP", self.states)
            .define("V", vector)
            .define("THREADS", threads)
            .threads(threads as u32)
    }
}

/// Hands out scratch memory: counts bytes from any start.
struct Scratch(*mut u8);

impl Scratch {
    fn take(&mut self, bytes: usize) -> *mut u8 {
        let start = self.0;
        self.0 = start.wrapping_add(bytes.next_multiple_of(64));
        start
    }
}

/// Scratch memory of both passes.
struct Shared {
    delta: *mut u8,
    cum: *mut u8,
    rest: *mut u8,
    span_states: *mut u8,
    decays: *mut u8,
}

impl Shared {
    fn new(scratch: &mut Scratch, cut: &Cut, dims: &Dims) -> Shared {
        let steps = 4 * cut.chunk_slots() * dims.heads * cut.chunk;
        let spans = if cut.is_cut() { 4 * cut.span_slots() * dims.heads } else { 0 };
        Shared {
            delta: scratch.take(steps),
            cum: scratch.take(steps),
            rest: scratch.take(if cut.planes() > 1 { steps } else { 0 }),
            span_states: scratch.take(spans * dims.state()),
            decays: scratch.take(spans),
        }
    }
}

/// Scratch memory of the gradient alone.
struct Further {
    slope: *mut u8,
    chunk_states: *mut u8,
    chunk_gradients: *mut u8,
    /// The gradient of the sum before the gate.
    d_sum: *mut u8,
    split_b: *mut u8,
    split_c: *mut u8,
    part_a: *mut u8,
    part_bias: *mut u8,
    part_d: *mut u8,
}

impl Further {
    fn new(scratch: &mut Scratch, cut: &Cut, dims: &Dims, gate: bool, gpu: &Properties) -> Further {
        let (slots, channels, element) = (cut.chunk_slots(), dims.heads * dims.headdim, cut.dtype.size());
        let splits = cut.splits(dims, gpu);
        let keys = if splits > 1 { 4 * splits * cut.tokens * dims.groups * dims.d_state } else { 0 };
        Further {
            slope: scratch.take(4 * slots * dims.heads * cut.chunk),
            chunk_states: scratch.take(element * slots * dims.heads * dims.state()),
            chunk_gradients: scratch.take(element * slots * dims.heads * dims.state()),
            d_sum: scratch.take(if gate { element * cut.tokens * channels } else { 0 }),
            split_b: scratch.take(keys),
            split_c: scratch.take(keys),
            part_a: scratch.take(4 * slots * dims.heads),
            part_bias: scratch.take(4 * slots * dims.heads),
            part_d: scratch.take(4 * slots * if dims.d_per_channel { channels } else { dims.heads }),
        }
    }
}

/// Elements that one access of a row takes: a power of two up to 16 bytes that every operand's rows, the heads' channels
/// and their states allow.
fn vector(dims: &Dims, dtype: DType, mats: &[Option<Mat>]) -> usize {
    let fits = |v: usize| {
        dims.headdim.is_multiple_of(v)
            && dims.d_state.is_multiple_of(v)
            && mats.iter().flatten().all(|m| {
                let bytes = (v * m.dtype.size()).min(16);
                m.address().is_multiple_of(bytes as u64)
                    && (m.rows <= 1 || (m.stride * m.dtype.size()).is_multiple_of(bytes))
            })
    };
    let widest = 16 / dtype.size();
    [widest, 4, 2].into_iter().find(|&v| fits(v)).unwrap_or(1)
}

fn address(m: Option<Mat>) -> Arg {
    Arg::Ptr(m.map_or(0, |m| m.address()))
}

fn pointer(wanted: bool, p: *mut u8) -> Arg {
    if wanted { p.into() } else { Arg::Ptr(0) }
}

/// Whether segments are so short that the plain recurrence is cheapest.
fn is_short(tokens: usize, segments: usize) -> bool {
    tokens <= SHORT * segments && segments <= 65_535
}

fn check(dims: &Dims) -> Result<(), Error> {
    if dims.d_state > MOST_STATES {
        let message = format!("on a GPU d_state can be at most {MOST_STATES}, but is {}", dims.d_state);
        return Err(Error::Unsupported { op: super::NAME, message });
    }
    Ok(())
}

pub(super) fn workspace(dims: &Dims, tokens: usize, segments: usize, dtype: DType, gpu: &Properties) -> usize {
    if is_short(tokens, segments) {
        return 0;
    }
    let cut = Cut::new(dims, tokens, segments, dtype, false, gpu);
    let mut scratch = Scratch(std::ptr::null_mut());
    Shared::new(&mut scratch, &cut, dims);
    scratch.0 as usize
}

pub(super) fn gradient_workspace(
    dims: &Dims,
    tokens: usize,
    segments: usize,
    dtype: DType,
    gate: bool,
    gpu: &Properties,
) -> usize {
    let cut = Cut::new(dims, tokens, segments, dtype, true, gpu);
    let mut scratch = Scratch(std::ptr::null_mut());
    Shared::new(&mut scratch, &cut, dims);
    Further::new(&mut scratch, &cut, dims, gate, gpu);
    scratch.0 as usize
}

/// A call with what its launches share.
struct Call<'a, 'b> {
    dims: &'a Dims,
    io: &'a Io<'a>,
    launcher: &'a mut Launcher<'b>,
    cut: Cut,
    vector: usize,
    offsets: Arg,
    scratch: Shared,
}

impl Call<'_, '_> {
    fn kernel(&self, entry: &'static str) -> Kernel {
        self.cut.walk(entry, self.vector, self.io.optional_input(inputs::Z).is_some())
    }

    fn steps(&mut self, slope: Option<*mut u8>) -> Result<(), Error> {
        let (dims, io, scratch) = (self.dims, self.io, &self.scratch);
        let kernel = self
            .kernel("steps")
            .grid(self.cut.chunk_slots(), dims.heads.div_ceil(2 * self.cut.chunk / 32), 1)
            .args([io.input(inputs::DT).into(), address(Some(io.input(inputs::A)))])
            .args([address(io.optional_input(inputs::DT_BIAS)), self.offsets.clone()])
            .args([scratch.delta.into(), scratch.cum.into(), scratch.rest.into()])
            .args([pointer(slope.is_some(), slope.unwrap_or(scratch.delta)), i32::from(dims.softplus).into()])
            .args([dims.dt_limit.0.into(), dims.dt_limit.1.into(), self.cut.sizes(dims)]);
        self.launcher.launch(kernel)
    }

    /// A walk over spans: x times b, from the states `incoming` to `outgoing`.
    fn walk_states(
        &mut self,
        [x, b]: [Option<Mat>; 2],
        [incoming, outgoing]: [Arg; 2],
        [decays, chunk_states]: [Arg; 2],
        backward: bool,
    ) -> Result<(), Error> {
        let (dims, scratch, cut) = (self.dims, &self.scratch, &self.cut);
        let (p, q) = (cut.planes(), cut.chunk);
        let kernel = self
            .kernel("states")
            .grid(cut.span_slots(), dims.heads * cut.tiles(dims), 1)
            .shared(2 * (tile(p, q, cut.channels) + tile(p, q, cut.states)))
            .args([x.into(), b.into(), self.offsets.clone(), scratch.delta.into(), scratch.cum.into()])
            .args([scratch.rest.into(), incoming, outgoing, decays, chunk_states])
            .args([i32::from(backward).into(), cut.sizes(dims)]);
        self.launcher.launch(kernel)
    }

    /// The states that spans start from, by span, in the direction of the walk: what is bound as `incoming` later. Where
    /// segments are cut, `last` gets the states after them.
    fn span_states(
        &mut self,
        [x, b]: [Option<Mat>; 2],
        initial: Option<Mat>,
        last: Option<Mat>,
        backward: bool,
    ) -> Result<Arg, Error> {
        if !self.cut.is_cut() {
            return Ok(initial.into());
        }
        let state = self.dims.heads * self.dims.state();
        let states = Arg::Mat(self.scratch.span_states as u64, state as i64);
        let none = || Arg::Mat(0, 0);
        let decays = self.scratch.decays.into();
        self.walk_states([x, b], [none(), states.clone()], [decays, Arg::Ptr(0)], backward)?;
        let kernel = self
            .kernel("scan_spans")
            .grid(self.cut.segments, state.div_ceil(2 * self.cut.chunk * self.vector.min(4)), 1)
            .args([self.offsets.clone(), self.scratch.decays.into(), states.clone(), initial.into(), last.into()])
            .args([i32::from(backward).into(), self.cut.sizes(self.dims)]);
        self.launcher.launch(kernel)?;
        Ok(states)
    }

    /// y, or, for the gradient of the gate, dz and the gradient of the sum before it.
    fn outputs(
        &mut self,
        incoming: Arg,
        outgoing: Option<Mat>,
        [y, dy, dz, d_sum]: [Option<Mat>; 4],
    ) -> Result<(), Error> {
        let (dims, io, scratch, cut) = (self.dims, self.io, &self.scratch, &self.cut);
        let kernel = self
            .kernel("walk")
            .grid(cut.span_slots().max(1), dims.heads * cut.tiles(dims), 1)
            .shared(cut.walk_shared())
            .args([io.input(inputs::X).into(), io.input(inputs::B).into(), io.input(inputs::C).into()])
            .args([address(io.optional_input(inputs::D)), io.optional_input(inputs::Z).into(), self.offsets.clone()])
            .args([scratch.delta.into(), scratch.cum.into(), scratch.rest.into(), incoming, outgoing.into()])
            .args([y.into(), dy.into(), dz.into(), d_sum.into(), cut.sizes(dims)]);
        self.launcher.launch(kernel)
    }
}

pub(super) fn run(dims: &Dims, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    check(dims)?;
    let (x, b, c, offsets) =
        (io.input(inputs::X), io.input(inputs::B), io.input(inputs::C), io.input(inputs::SEGMENTS));
    let (y, last) = (io.optional_output(0), io.optional_output(1));
    let (initial, segments) = (io.optional_input(inputs::INITIAL_STATE), offsets.cols - 1);
    let mats = [Some(x), Some(b), Some(c), io.optional_input(inputs::Z), y, initial, last];
    let vector = vector(dims, x.dtype, &mats);
    if is_short(x.rows, segments) && segments > 0 {
        return recurrence(dims, io, launcher, vector.min(4));
    }
    let cut = Cut::new(dims, x.rows, segments, x.dtype, false, launcher.properties());
    let scratch = Shared::new(&mut Scratch(io.workspace().0), &cut, dims);
    let mut call = Call { dims, io, launcher, cut, vector, offsets: address(Some(offsets)), scratch };
    call.steps(None)?;
    let incoming = call.span_states([Some(x), Some(b)], initial, last, false)?;
    let outgoing = last.filter(|_| !cut.is_cut());
    match (y, outgoing) {
        (Some(_), _) => call.outputs(incoming, outgoing, [y, None, None, None]),
        (None, Some(last)) => {
            let nowhere = || Arg::Ptr(0);
            call.walk_states([Some(x), Some(b)], [incoming, last.into()], [nowhere(), nowhere()], false)
        }
        (None, None) => Ok(()),
    }
}

fn recurrence(dims: &Dims, io: &Io<'_>, launcher: &mut Launcher<'_>, vector: usize) -> Result<(), Error> {
    let (x, offsets) = (io.input(inputs::X), io.input(inputs::SEGMENTS));
    let channels = dims.heads * dims.headdim;
    launcher.launch(
        Kernel::new(&RECURRENCE, "recurrence")
            .define_type("T", x.dtype)
            .define("V", vector)
            .define("VECTORS", dims.d_state.div_ceil(32 * vector))
            .define("ROWS", RECURRENCE_ROWS)
            .threads(RECURRENCE_THREADS as u32)
            .grid(channels.div_ceil(RECURRENCE_THREADS / 32 * RECURRENCE_ROWS), offsets.cols - 1, 1)
            .args([x.into(), io.input(inputs::DT).into(), address(Some(io.input(inputs::A)))])
            .args([io.input(inputs::B).into(), io.input(inputs::C).into(), address(io.optional_input(inputs::D))])
            .args([io.optional_input(inputs::Z).into(), address(io.optional_input(inputs::DT_BIAS))])
            .args([io.optional_input(inputs::INITIAL_STATE).into(), address(Some(offsets))])
            .args([io.optional_output(0).into(), io.optional_output(1).into(), x.rows.into(), dims.heads.into()])
            .args([dims.headdim.into(), dims.d_state.into(), dims.heads_per_group().into()])
            .args([i32::from(dims.d_per_channel).into(), i32::from(dims.softplus).into()])
            .args([dims.dt_limit.0.into(), dims.dt_limit.1.into()]),
    )
}

pub(super) fn run_grad(dims: &Dims, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    check(dims)?;
    let (x, b, c, offsets) =
        (io.input(inputs::X), io.input(inputs::B), io.input(inputs::C), io.input(inputs::SEGMENTS));
    let (z, initial) = (io.optional_input(inputs::Z), io.optional_input(inputs::INITIAL_STATE));
    let (dy, d_last) = (io.optional_input(inputs::D_Y), io.optional_input(inputs::D_FINAL_STATE));
    let out = |i| io.optional_output(i);
    let (dx, ddt, db, dc, dz) = (out(inputs::X), out(inputs::DT), out(inputs::B), out(inputs::C), out(inputs::Z));
    let d_initial = out(inputs::INITIAL_STATE);
    let sums = [out(inputs::A), out(inputs::DT_BIAS), out(inputs::D)];
    let mats = [Some(x), Some(b), Some(c), z, dy, dx, db, dc, dz, initial, d_last, d_initial];
    let vector = vector(dims, x.dtype, &mats);
    let gpu = launcher.properties();
    let cut = Cut::new(dims, x.rows, offsets.cols - 1, x.dtype, true, gpu);
    let mut memory = Scratch(io.workspace().0);
    let scratch = Shared::new(&mut memory, &cut, dims);
    let further = Further::new(&mut memory, &cut, dims, z.is_some(), gpu);
    let offsets = address(Some(offsets));
    let mut call = Call { dims, io, launcher, cut, vector, offsets: offsets.clone(), scratch };
    call.steps(Some(further.slope))?;

    // States that chunks start from.
    let (none, nowhere) = (|| Arg::Mat(0, 0), || Arg::Ptr(0));
    let incoming = call.span_states([Some(x), Some(b)], initial, None, false)?;
    let states = [nowhere(), further.chunk_states.into()];
    call.walk_states([Some(x), Some(b)], [incoming.clone(), none()], states, false)?;
    let dy = match (z, dy) {
        (Some(_), Some(dy)) => {
            let d_sum = Mat { ptr: further.d_sum, stride: x.cols, ..dy };
            call.outputs(incoming, None, [None, Some(dy), dz, Some(d_sum)])?;
            Some(d_sum)
        }
        (Some(_), None) => {
            if let Some(dz) = dz {
                map(call.launcher, Function::Fill, None, None, None, dz, 0.0)?;
            }
            None
        }
        (None, dy) => dy,
    };

    // Gradients of the states after chunks.
    let incoming = call.span_states([dy, Some(c)], d_last, d_initial, true)?;
    let outgoing = d_initial.filter(|_| !cut.is_cut());
    call.walk_states([dy, Some(c)], [incoming, outgoing.into()], [nowhere(), further.chunk_gradients.into()], true)?;

    let splits = cut.splits(dims, gpu);
    let Shared { delta, cum, rest, .. } = call.scratch;
    let launcher = call.launcher;
    launcher.launch(
        cut.kernel(&GRADIENT, "gradients", vector, THREADS)
            .define("STAGES", cut.stages)
            .grid(cut.chunk_slots().max(1), dims.groups * splits, 1)
            .shared(cut.gradient_shared())
            .args([x.into(), b.into(), c.into(), address(Some(io.input(inputs::A)))])
            .args([address(io.optional_input(inputs::D)), offsets.clone(), delta.into(), cum.into(), rest.into()])
            .args([further.slope.into(), further.chunk_states.into(), further.chunk_gradients.into()])
            .args([dy.into(), dx.into(), ddt.into(), db.into(), dc.into()])
            .args([further.split_b.into(), further.split_c.into(), pointer(sums[0].is_some(), further.part_a)])
            .args([pointer(sums[1].is_some(), further.part_bias), pointer(sums[2].is_some(), further.part_d)])
            .args([(splits as i32).into(), cut.sizes(dims)]),
    )?;
    for (parts, out) in [(further.split_b, db), (further.split_c, dc)] {
        if let Some(out) = out.filter(|_| splits > 1 && cut.segments > 0) {
            let kernel = cut.kernel(&GRADIENT, "add_splits", vector, THREADS).define("STAGES", cut.stages);
            let args = [parts.into(), (splits as i32).into(), offsets.clone(), out.into(), cut.sizes(dims)];
            launcher.launch(kernel.grid((out.rows * out.cols).div_ceil(THREADS), 1, 1).args(args))?;
        }
    }
    for (parts, out) in [further.part_a, further.part_bias, further.part_d].into_iter().zip(sums) {
        if let Some(out) = out {
            sum_parts(launcher, parts, cut.chunk_slots(), out)?;
        }
    }
    Ok(())
}
