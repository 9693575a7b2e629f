//! Launches of the elementwise kernels.

use crate::cuda::{Kernel, Launcher, Program};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Io, Mat};

static PROGRAM: Program = Program { name: "elementwise", source: include_str!("kernel.cu") };

/// Threads of a block.
const THREADS: usize = 256;
/// Rows that a block of `column_sums` adds up, at least; with many rows more, so that there are at most MOST_PARTS.
const ROWS: usize = 256;
const MOST_PARTS: usize = 512;

/// The functions, numbered as in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Function {
    Fill = 0,
    Add = 1,
    Mul = 2,
    Scale = 3,
    ScaleBy = 4,
    Silu = 5,
    SiluGrad = 6,
    NegExp = 7,
    Copy = 8,
    AddRow = 9,
}

/// Elements that a thread handles with one access an operand: as many as fill 16 bytes of the widest type, if every
/// operand's rows and columns allow it.
pub(crate) fn vector(mats: &[Mat]) -> usize {
    let fits = |v: usize| {
        mats.iter().all(|m| {
            if m.dtype.blocks().is_some() {
                return m.cols.is_multiple_of(v);
            }
            let bytes = v * m.dtype.size();
            m.cols.is_multiple_of(v)
                && m.address().is_multiple_of(bytes.min(16) as u64)
                && (m.rows <= 1 || (m.stride * m.dtype.size()).is_multiple_of(bytes.min(16)))
        })
    };
    let widest = if mats.iter().all(|m| m.dtype == DType::BF16) { 8 } else { 4 };
    [widest, 4, 2].into_iter().find(|&v| fits(v)).unwrap_or(1)
}

/// out = f(a, b), with the factor of a scaling or the value of a filling.
pub(crate) fn map(
    launcher: &mut Launcher<'_>,
    function: Function,
    a: Option<Mat>,
    b: Option<Mat>,
    scalar: Option<Mat>,
    out: Mat,
    factor: f32,
) -> Result<(), Error> {
    let row = scalar.filter(|_| function == Function::AddRow);
    let mut mats: Vec<Mat> = a.into_iter().chain(b).chain(row).chain([out]).collect();
    // Rows that follow each other are one row, unless columns differ.
    if function != Function::AddRow && mats.iter().all(|m| m.stride == m.cols || m.rows <= 1) {
        mats.iter_mut().for_each(|m| (m.rows, m.cols) = (1, m.rows * m.cols));
    }
    let v = vector(&mats);
    let (rows, cols) = (mats[0].rows, mats[0].cols);
    let input = a.map_or(DType::F32, |a| a.dtype);
    launcher.launch(
        Kernel::new(&PROGRAM, "map")
            .define_type("TA", input)
            .define_type("TO", out.dtype)
            .define("V", v)
            .define("OP", function as usize)
            .define("ROWS", ROWS)
            .grid((rows * (cols / v)).div_ceil(THREADS), 1, 1)
            .threads(THREADS as u32)
            .args([a.into(), b.into(), out.into(), scalar.into(), rows.into(), (cols / v).into(), factor.into()]),
    )
}

/// Adds the f32 row `bias` to each row of `out`.
pub(crate) fn add_row(launcher: &mut Launcher<'_>, out: Mat, bias: Mat) -> Result<(), Error> {
    map(launcher, Function::AddRow, Some(out), None, Some(bias), out, 0.0)
}

/// A tensor whose elements all equal `value`.
pub(super) fn fill(launcher: &mut Launcher<'_>, out: Mat, value: f32) -> Result<(), Error> {
    if out.dtype != DType::I32 {
        return map(launcher, Function::Fill, None, None, None, out, value);
    }
    launcher.launch(
        Kernel::new(&PROGRAM, "fill_int")
            .define_type("TA", DType::F32)
            .define_type("TO", DType::F32)
            .define("V", 1)
            .define("OP", Function::Fill as usize)
            .define("ROWS", ROWS)
            .grid((out.rows * out.cols).div_ceil(THREADS), 1, 1)
            .threads(THREADS as u32)
            .args([out.into(), out.rows.into(), out.cols.into(), (value as i32).into()]),
    )
}

/// Rows that one block sums.
fn rows_per_part(rows: usize) -> usize {
    ROWS.max(rows.div_ceil(MOST_PARTS))
}

/// Bytes of the partial sums.
pub(super) fn column_sums_workspace(rows: usize, cols: usize) -> usize {
    4 * rows.div_ceil(rows_per_part(rows)) * cols
}

/// Sums over rows.
pub(super) fn column_sums(launcher: &mut Launcher<'_>, io: &Io<'_>) -> Result<(), Error> {
    let (x, out) = (io.input(0), io.output(0));
    let per_part = rows_per_part(x.rows);
    let parts = x.rows.div_ceil(per_part);
    let part = io.workspace().0;
    launcher.launch(
        reduction("sum_rows", x.dtype, per_part).grid(x.cols.div_ceil(32), parts, 1).threads(THREADS as u32).args([
            x.into(),
            part.into(),
            x.rows.into(),
            x.cols.into(),
        ]),
    )?;
    sum_parts(launcher, part, parts, out)
}

/// out [1, cols] = the sum over `parts` rows of partial sums in scratch memory.
pub(crate) fn sum_parts(launcher: &mut Launcher<'_>, part: *mut u8, parts: usize, out: Mat) -> Result<(), Error> {
    launcher.launch(reduction("sum_parts", DType::F32, ROWS).grid(out.cols.div_ceil(32), 1, 1).threads(1024).args([
        part.into(),
        out.into(),
        parts.into(),
        out.cols.into(),
    ]))
}

fn reduction(entry: &'static str, dtype: DType, rows: usize) -> Kernel {
    Kernel::new(&PROGRAM, entry)
        .define_type("TA", dtype)
        .define_type("TO", DType::F32)
        .define("V", 1)
        .define("OP", Function::Add as usize)
        .define("ROWS", rows)
}
