//! Launches of the scan's kernels.

use super::{A, B, C, D, DT, DT_BIAS, Discretisation, Forward, Gradient, SEGMENTS, X, Z, chunk_len};
use crate::cuda::{Arg, Kernel, Launcher, Program, Properties};
use crate::error::Error;
use crate::graph::{Io, Mat};
use crate::ops::elementwise::cuda::vector;

static FORWARD: Program =
    Program { name: "selective_scan", source: concat!(include_str!("common.cu"), include_str!("forward.cu")) };
static BACKWARD: Program =
    Program { name: "selective_scan_grad", source: concat!(include_str!("common.cu"), include_str!("backward.cu")) };

/// Blocks of a multiprocessor that parts are made for.
const BLOCKS_PER_SM: u32 = 3;
/// Tokens a segment up to which a block takes a whole segment.
const SHORT: usize = 4;
/// Threads of the blocks that add up parts.
const ADDING_THREADS: usize = 256;

/// How states and channels are spread over threads.
#[derive(Clone, Copy)]
struct Spread {
    d_state: usize,
    /// States of a thread.
    states: usize,
    /// Channels of a warp.
    warp_channels: usize,
    warps: usize,
    /// Rows of a tile of the forward pass.
    steps: usize,
    /// Steps of the gradient whose states are in registers.
    sub: usize,
}

impl Spread {
    fn new(d_state: usize) -> Spread {
        let lanes = d_state.div_ceil(4).next_power_of_two().min(32);
        Spread {
            d_state,
            states: d_state.div_ceil(lanes).next_power_of_two(),
            warp_channels: 32 / lanes,
            // Many states need much shared memory a warp.
            warps: [4, 2, 1][usize::from(d_state > 64) + usize::from(d_state > 128)],
            steps: if d_state <= 32 { 32 } else { 8 },
            sub: if d_state <= 128 { 8 } else { 4 },
        }
    }

    fn channels(&self) -> usize {
        self.warps * self.warp_channels
    }

    fn threads(&self) -> usize {
        32 * self.warps
    }

    fn padded(&self) -> usize {
        self.states * 32 / self.warp_channels
    }

    /// Whether B and C of a chunk fit into shared memory.
    fn staged(&self) -> bool {
        self.d_state <= 64
    }

    /// Bytes of shared memory, as the kernel's `Tile` lays it out.
    fn forward_shared(&self, size: usize, v: usize, vb: usize) -> usize {
        let (row, pair_row, vector) = self.rows();
        let computed = self.steps * (2 * pair_row + 4 * self.padded() + row) + 2 * vector;
        let by_channel = 3 * (self.steps * self.warp_channels).div_ceil(32 * v) * v;
        let by_state = (2 * self.steps * self.d_state).div_ceil(self.threads() * vb) * vb;
        4 * computed.next_multiple_of(4) + 2 * size * self.threads() * (by_channel + by_state)
    }

    fn gradient_shared(&self) -> usize {
        let (row, pair_row, vector) = self.rows();
        let chunk = chunk_len(self.d_state);
        let tiles = chunk * (2 * pair_row + 3 * row);
        let states = (chunk / self.sub - 1) * self.threads() * self.states;
        let sums = 4 * self.warps * self.sub * self.padded();
        let coefficients = if self.staged() { 2 * chunk * self.padded() } else { 0 };
        4 * (tiles + states + sums + coefficients + 2 * vector)
    }

    /// Elements of a tile's rows, of its rows of pairs, and of a vector by channel.
    fn rows(&self) -> (usize, usize, usize) {
        (self.channels() + 4, self.channels() + 2, self.channels().next_multiple_of(4))
    }
}

/// Sizes of a scan and how it is cut into blocks.
struct Cut {
    spread: Spread,
    tokens: usize,
    channels: usize,
    segments: usize,
    groups: usize,
    /// Blocks of channels of a group.
    group_blocks: usize,
    /// Rows of a part.
    part_rows: usize,
    parts: usize,
}

impl Cut {
    fn new(forward: &Forward, tokens: usize, channels: usize, segments: usize, gpu: &Properties) -> Cut {
        let spread = Spread::new(forward.shape.d_state);
        let groups = forward.shape.groups;
        let group_blocks = (channels / groups).div_ceil(spread.channels());
        let chunk = chunk_len(forward.shape.d_state);
        // As many parts as fill the chip. They end with segments where all of those are of one length.
        let wanted = (gpu.blocks(BLOCKS_PER_SM) as usize / (groups * group_blocks)).max(1);
        let segment_rows = tokens.div_ceil(segments.max(1));
        let rows = if segments >= wanted {
            segment_rows * (segments / (4 * wanted)).max(1)
        } else {
            segment_rows.div_ceil(wanted.div_ceil(segments.max(1)))
        };
        let part_rows = rows.next_multiple_of(chunk).max(chunk);
        let parts = tokens.div_ceil(part_rows).max(1);
        Cut { spread, tokens, channels, segments, groups, group_blocks, part_rows, parts }
    }

    /// Blocks of channels.
    fn blocks(&self) -> usize {
        self.groups * self.group_blocks
    }

    /// Numbers that parts leave for each other; what follows is aligned to 16 bytes.
    fn carry(&self) -> usize {
        let each = (2 * self.spread.d_state + 1) * self.channels;
        if self.parts > 1 { (self.parts * each).next_multiple_of(4) } else { 0 }
    }

    fn channel_parts(&self) -> usize {
        self.blocks() * self.tokens * 2 * self.spread.d_state
    }

    fn time_parts(&self) -> usize {
        self.parts * (self.spread.d_state + 2) * self.channels
    }

    fn kernel(&self, program: &'static Program, entry: &'static str, launch: &Launch<'_>) -> Kernel {
        let spread = &self.spread;
        let mut kernel = Kernel::new(program, entry)
            .define_type("T", launch.scan.x.dtype)
            .define("N", spread.d_state)
            .define("NS", spread.states)
            .define("CH", spread.warp_channels)
            .define("WARPS", spread.warps)
            .define("V", launch.v)
            .define("VB", launch.vb)
            .define("CHUNK", chunk_len(spread.d_state))
            .define("SOFTPLUS", i32::from(launch.forward.softplus))
            .define("ZOH", i32::from(launch.forward.discretisation == Discretisation::Zoh));
        kernel = if std::ptr::eq(program, &FORWARD) {
            kernel.define("STEPS", spread.steps)
        } else {
            kernel.define("SUB", spread.sub).define("STAGED", i32::from(spread.staged()))
        };
        kernel.threads(spread.threads() as u32)
    }
}

/// The operands of both passes.
struct Operands {
    x: Mat,
    dt: Mat,
    a: Mat,
    b: Mat,
    c: Mat,
    d: Option<Mat>,
    z: Option<Mat>,
    bias: Option<Mat>,
    offsets: Mat,
}

impl Operands {
    fn of(io: &Io<'_>) -> Operands {
        Operands {
            x: io.input(X),
            dt: io.input(DT),
            a: io.input(A),
            b: io.input(B),
            c: io.input(C),
            d: io.optional_input(D),
            z: io.optional_input(Z),
            bias: io.optional_input(DT_BIAS),
            offsets: io.input(SEGMENTS),
        }
    }

    /// `Scan` of the kernels.
    fn table(&self, cut: &Cut) -> Arg {
        let mats = [Some(self.x), Some(self.dt), Some(self.a), Some(self.b), Some(self.c), self.d, self.z, self.bias];
        let mut table = matrices(&mats);
        table.push(self.offsets.address());
        let sizes =
            [cut.segments, cut.tokens, cut.channels, cut.channels / cut.groups, cut.group_blocks, cut.part_rows];
        table.extend(sizes.map(|size| size as u64));
        Arg::Table(table)
    }
}

/// Some `Mat`s in a structure.
fn matrices(mats: &[Option<Mat>]) -> Vec<u64> {
    mats.iter().flat_map(|m| m.map_or([0, 0], |m| [m.address(), m.stride as u64])).collect()
}

/// What kernels are compiled for, beside the sizes.
struct Launch<'a> {
    forward: &'a Forward,
    scan: Operands,
    v: usize,
    vb: usize,
}

impl<'a> Launch<'a> {
    /// `others` are operands by channel beside x, dt and z.
    fn new(forward: &'a Forward, io: &Io<'_>, cut: &Cut, others: &[Option<Mat>]) -> Launch<'a> {
        let scan = Operands::of(io);
        let within = |cols: usize, mats: &[Option<Mat>]| {
            vector(&mats.iter().flatten().map(|m| Mat { cols, ..*m }).collect::<Vec<_>>())
        };
        // A group's columns start at a multiple of its width.
        let by_channel: Vec<Option<Mat>> =
            [Some(scan.x), Some(scan.dt), scan.z].into_iter().chain(others.iter().copied()).collect();
        let v = within(cut.channels / cut.groups, &by_channel).min(cut.spread.warp_channels);
        let vb = within(cut.spread.d_state, &[Some(scan.b), Some(scan.c)]);
        Launch { forward, scan, v, vb }
    }
}

/// Bytes of scratch memory.
pub(super) fn workspace(forward: &Forward, tokens: usize, channels: usize, segments: usize, gpu: &Properties) -> usize {
    4 * Cut::new(forward, tokens, channels, segments, gpu).carry()
}

pub(super) fn run(forward: &Forward, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (x, segments) = (io.input(X), io.input(SEGMENTS).cols - 1);
    let initial = io.optional_input(Forward::INITIAL_STATE);
    let [y, last, kept] = [0, 1, 2].map(|i| io.optional_output(i));
    let cut = Cut::new(forward, x.rows, x.cols, segments, launcher.properties());
    let launch = Launch::new(forward, io, &cut, &[y]);
    let scan = launch.scan.table(&cut);
    if segments > 0 && x.rows <= SHORT * segments && segments <= 65_535 {
        let kernel = cut.kernel(&FORWARD, "scan_segments", &launch).grid(cut.blocks(), segments, 1);
        return launcher.launch(kernel.args([scan, initial.into(), y.into(), last.into(), kept.into()]));
    }
    let shared = cut.spread.forward_shared(x.dtype.size(), launch.v, launch.vb);
    let carry = io.workspace().0;
    let kernel = cut.kernel(&FORWARD, "end_states", &launch).grid(cut.blocks(), cut.parts - 1, 1).shared(shared);
    launcher.launch(kernel.args([scan.clone(), initial.into(), carry.into()]))?;
    let kernel = cut.kernel(&FORWARD, "scan_parts", &launch).grid(cut.blocks(), cut.parts, 1).shared(shared);
    launcher.launch(kernel.args([scan, initial.into(), y.into(), last.into(), kept.into(), carry.into()]))
}

/// Bytes of scratch memory of the gradient.
pub(super) fn gradient_workspace(
    forward: &Forward,
    tokens: usize,
    channels: usize,
    segments: usize,
    gpu: &Properties,
) -> usize {
    let cut = Cut::new(forward, tokens, channels, segments, gpu);
    4 * (cut.carry() + cut.channel_parts() + cut.time_parts())
}

pub(super) fn run_grad(gradient: &Gradient, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let forward = &gradient.forward;
    let (x, segments) = (io.input(X), io.input(SEGMENTS).cols - 1);
    let (dy, dlast) = (io.optional_input(Gradient::DY), io.optional_input(Gradient::D_FINAL));
    let kept = io.optional_input(Gradient::CHUNK_STATES);
    let [dx, ddt, da, db, dc, dd, dz, dbias, dinitial] =
        [X, DT, A, B, C, D, Z, DT_BIAS, Forward::INITIAL_STATE].map(|i| io.optional_output(i));
    let cut = Cut::new(forward, x.rows, x.cols, segments, launcher.properties());
    let launch = Launch::new(forward, io, &cut, &[dy, dx, ddt, dz]);
    let shared = cut.spread.gradient_shared();
    let carry = io.workspace().0;
    let channel_parts = carry.wrapping_add(4 * cut.carry());
    let time_parts = channel_parts.wrapping_add(4 * cut.channel_parts());
    let wanted = |parts: *mut u8, of: &[Option<Mat>]| match of.iter().any(|m| m.is_some()) {
        true => Arg::from(parts),
        false => Arg::Ptr(0),
    };
    let scan = launch.scan.table(&cut);
    let kernel = cut.kernel(&BACKWARD, "start_grads", &launch).grid(cut.blocks(), cut.parts - 1, 1).shared(shared);
    launcher.launch(kernel.args([scan.clone(), dy.into(), dlast.into(), carry.into()]))?;
    let kernel = cut.kernel(&BACKWARD, "scan_parts_grad", &launch).grid(cut.blocks(), cut.parts, 1).shared(shared);
    let gradients = Arg::Table(matrices(&[dy, dlast, kept, dx, ddt, dz, dinitial]));
    let by_channel = wanted(channel_parts, &[db, dc]);
    let by_time = wanted(time_parts, &[da, dd, dbias]);
    launcher.launch(kernel.args([scan, gradients, carry.into(), by_channel, by_time]))?;
    let d_state = cut.spread.d_state;
    if db.is_some() || dc.is_some() {
        let wide = if launch.vb.is_multiple_of(4) { 4 } else { 1 };
        let blocks = (cut.tokens * 2 * d_state).div_ceil(ADDING_THREADS * wide);
        let kernel = cut.kernel(&BACKWARD, "add_channels", &launch).grid(blocks, cut.groups, 1);
        launcher.launch(kernel.threads(ADDING_THREADS as u32).args([
            channel_parts.into(),
            db.into(),
            dc.into(),
            cut.tokens.into(),
            cut.group_blocks.into(),
        ]))?;
    }
    if da.is_some() || dd.is_some() || dbias.is_some() {
        let kernel =
            cut.kernel(&BACKWARD, "add_time", &launch).grid(cut.channels.div_ceil(ADDING_THREADS), d_state + 2, 1);
        launcher.launch(kernel.threads(ADDING_THREADS as u32).args([
            time_parts.into(),
            da.into(),
            dd.into(),
            dbias.into(),
            cut.parts.into(),
            cut.channels.into(),
        ]))?;
    }
    Ok(())
}
