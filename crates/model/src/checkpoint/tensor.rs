//! A tensor where it lies in a mapped file, and its conversion to the numbers that the program computes with.

use half::{bf16, f16};
use hognose_core::quant::Kind;
use memmap2::{Mmap, UncheckedAdvice};
use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

#[cfg(target_endian = "big")]
compile_error!("checkpoints hold little-endian numbers, which this crate uses where they lie");

/// The number formats in which weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// Blocks of few bits a number, which GGUF files have. A row is a whole number of blocks.
    Blocks(Kind),
}

impl Dtype {
    /// Numbers of the smallest piece that has bytes of its own, and these bytes.
    fn piece(self) -> (usize, usize) {
        match self {
            Dtype::F32 => (1, 4),
            Dtype::F16 | Dtype::BF16 => (1, 2),
            Dtype::Blocks(kind) => (kind.block_len(), kind.block_bytes()),
        }
    }

    /// The type of the numbers where there are no blocks: f32 in place of them.
    pub fn plain(self) -> Dtype {
        if let Dtype::Blocks(_) = self { Dtype::F32 } else { self }
    }

    /// Whether rows of `columns` numbers can be of this type.
    pub fn fits(self, columns: usize) -> bool {
        columns.is_multiple_of(self.piece().0)
    }

    /// Bytes of `numel` numbers: as many as whole blocks hold.
    pub fn bytes(self, numel: usize) -> usize {
        let (numbers, bytes) = self.piece();
        numel / numbers * bytes
    }

    /// Converts numbers from these bytes to f32, as many as `out` has.
    pub(super) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Dtype::F32 => convert(bytes, out, f32::from_le_bytes),
            Dtype::F16 => convert(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => convert(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::Blocks(kind) => kind.decode(bytes, out),
        }
    }
}

impl serde::Serialize for Dtype {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Dtype::F32 => f.write_str("f32"),
            Dtype::F16 => f.write_str("f16"),
            Dtype::BF16 => f.write_str("bf16"),
            Dtype::Blocks(kind) => f.write_str(&format!("{kind:?}").to_lowercase()),
        }
    }
}

/// Bytes of a file that a checksum reads at a time.
const HASHED: usize = 1 << 22;

/// A file mapped into memory.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) path: PathBuf,
    map: Mmap,
}

impl Mapped {
    pub(super) fn open(path: &Path) -> std::io::Result<Arc<Self>> {
        let file = File::open(path)?;
        // SAFETY: the map is only read. Another program that shortens or rewrites the file meanwhile can end this one
        // with a bus error or change numbers under it, as for every program that maps its weights; nothing here keeps
        // references into the map whose meaning depends on the bytes (text, lengths) beyond the check that made them.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Arc::new(Mapped { path: path.into(), map }))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Takes the pages of a range out of memory; whoever reads them again, or what else is in the first and the last of
    /// them, gets them from the file again.
    pub(super) fn forget(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            const PAGE: usize = 1 << 16; // A multiple of the pages of all machines.
            let (start, end) = (range.start / PAGE * PAGE, range.end.next_multiple_of(PAGE).min(self.map.len()));
            if start < end {
                // SAFETY: nobody writes this map, so its pages hold what the file holds, now and when they come back.
                // That it may fail does not matter: it only saves memory.
                let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
            }
        }
    }
}

/// A run of bytes in a file with the checksum that the file gives for it.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) start: usize,
    pub(super) len: usize,
    pub(super) crc32: u32,
    pub(super) good: OnceLock<bool>,
}

/// A tensor in a mapped file. Offsets and strides have been checked against the file.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) file: Arc<Mapped>,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Byte offset of the first element.
    pub(super) start: usize,
    /// Steps in elements, where the elements do not simply follow each other.
    pub(super) strides: Option<Vec<usize>>,
    /// The storage the tensor lies in, where the file has a checksum for it.
    pub(super) checked: Option<Arc<Checked>>,
    /// The file holds A = −exp(A_log) in f32; the tensor is A_log.
    pub(super) negated_exp: bool,
}

/// What can go wrong with the numbers themselves.
#[derive(Debug, PartialEq)]
pub(super) enum ValueError {
    Checksum,
    /// A transition A that is not negative, so that it has no A_log.
    NotNegative {
        index: usize,
        value: f32,
    },
    NonFinite {
        index: usize,
        value: f32,
    },
}

impl Stored {
    pub(super) fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// The numbers in row-major order, little-endian: borrowed from the file unless they lie scattered in it, or other
    /// ones are meant.
    pub(super) fn bytes(&self) -> Result<Cow<'_, [u8]>, ValueError> {
        self.part(0..self.numel())
    }

    /// As [`Stored::bytes`], of some numbers in row-major order.
    pub(super) fn part(&self, range: Range<usize>) -> Result<Cow<'_, [u8]>, ValueError> {
        let file = self.file.bytes();
        if let Some(c) = &self.checked {
            let good = c.good.get_or_init(|| {
                let mut hasher = crc32fast::Hasher::new();
                for start in (c.start..c.start + c.len).step_by(HASHED) {
                    let end = (c.start + c.len).min(start + HASHED);
                    hasher.update(&file[start..end]);
                    self.file.forget(start..end);
                }
                hasher.finalize() == c.crc32
            });
            if !good {
                return Err(ValueError::Checksum);
            }
        }
        let Some(strides) = &self.strides else {
            let bytes = &file[self.place(range)];
            return if self.negated_exp { log_of_negated(bytes).map(Cow::Owned) } else { Ok(Cow::Borrowed(bytes)) };
        };
        let size = self.dtype.bytes(1);
        let mut out = Vec::with_capacity(range.len() * size);
        let mut index = vec![0; self.shape.len()];
        let mut first = range.start;
        for (i, &n) in index.iter_mut().zip(&self.shape).rev() {
            (*i, first) = (first % n.max(1), first / n.max(1));
        }
        for _ in range {
            let element: usize = index.iter().zip(strides).map(|(i, s)| i * s).sum();
            let at = self.start + element * size;
            out.extend_from_slice(&file[at..at + size]);
            for (i, &n) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < n {
                    break;
                }
                *i = 0;
            }
        }
        Ok(Cow::Owned(out))
    }

    /// Where numbers that follow each other lie in the file; in types of blocks, whole blocks of them.
    fn place(&self, range: Range<usize>) -> Range<usize> {
        self.start + self.dtype.bytes(range.start)..self.start + self.dtype.bytes(range.end)
    }

    /// Writes the numbers from `first` on as f32; in types of blocks, `first` is the start of one.
    pub(super) fn read_f32(&self, first: usize, out: &mut [f32]) -> Result<(), ValueError> {
        let bytes = self.part(first..first + out.len()).map_err(|e| e.after(first))?;
        self.dtype.decode(&bytes, out);
        finite(out.iter().copied()).map_err(|e| e.after(first))
    }

    /// Gives the memory of some numbers back to the system ([`Mapped::forget`]).
    pub(super) fn forget(&self, range: Range<usize>) {
        if self.strides.is_none() {
            self.file.forget(self.place(range));
        }
    }
}

/// Checks that little-endian numbers of a type are all finite.
pub(super) fn check_finite(dtype: Dtype, bytes: &[u8]) -> Result<(), ValueError> {
    match dtype {
        Dtype::F32 => finite(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
        Dtype::F16 => finite(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32())),
        Dtype::BF16 => finite(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32())),
        Dtype::Blocks(kind) => {
            let mut values = [0.0; DECODED_AT_ONCE];
            for (i, bytes) in bytes.chunks(kind.row_bytes(DECODED_AT_ONCE)).enumerate() {
                let values = &mut values[..bytes.len() / kind.block_bytes() * kind.block_len()];
                kind.decode(bytes, values);
                finite(values.iter().copied()).map_err(|e| e.after(i * DECODED_AT_ONCE))?;
            }
            Ok(())
        }
    }
}

/// Numbers of blocks that are looked at together: some blocks of every kind.
const DECODED_AT_ONCE: usize = 1024;

impl ValueError {
    /// The same error, where `before` numbers stand before those that were looked at.
    pub(super) fn after(self, before: usize) -> ValueError {
        match self {
            ValueError::NonFinite { index, value } => ValueError::NonFinite { index: index + before, value },
            ValueError::NotNegative { index, value } => ValueError::NotNegative { index: index + before, value },
            ValueError::Checksum => ValueError::Checksum,
        }
    }
}

/// ln(−A) of numbers A in f32.
fn log_of_negated(bytes: &[u8]) -> Result<Vec<u8>, ValueError> {
    let mut out = Vec::with_capacity(bytes.len());
    for (index, b) in bytes.as_chunks().0.iter().enumerate() {
        let value = f32::from_le_bytes(*b);
        if value.is_finite() && value >= 0.0 {
            return Err(ValueError::NotNegative { index, value });
        }
        // In f64, so that exp of it gives A again within the rounding of A_log itself.
        out.extend_from_slice(&((-f64::from(value)).ln() as f32).to_le_bytes());
    }
    Ok(out)
}

fn convert<const N: usize, T>(bytes: &[u8], out: &mut [T], f: impl Fn([u8; N]) -> T) {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
        *o = f(*b);
    }
}

fn finite(values: impl Iterator<Item = f32> + Clone) -> Result<(), ValueError> {
    // A sum without branches first: the common case is that all is well, and this loop vectorises.
    let bad: u32 = values.clone().map(|v| u32::from(!v.is_finite())).fold(0, |a, b| a | b);
    if bad == 0 {
        return Ok(());
    }
    let found = values.enumerate().find(|(_, v)| !v.is_finite());
    found.map_or(Ok(()), |(index, value)| Err(ValueError::NonFinite { index, value }))
}
