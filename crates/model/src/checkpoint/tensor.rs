//! A tensor where it lies in a mapped file, and its conversion to the numbers that the program computes with.

use half::{bf16, f16};
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
}

impl Dtype {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        if self == Dtype::F32 { 4 } else { 2 }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::BF16 => "bf16",
        })
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

    /// Takes whole pages inside of a range out of memory; whoever reads them again gets them from the file again.
    pub(super) fn forget(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            const PAGE: usize = 1 << 16; // A multiple of the pages of all machines.
            let (start, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
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
}

/// What can go wrong with the numbers themselves.
#[derive(Debug, PartialEq)]
pub(super) enum ValueError {
    Checksum,
    NonFinite { index: usize, value: f32 },
}

impl Stored {
    pub(super) fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// The numbers in row-major order, little-endian: borrowed from the file unless they lie scattered in it.
    pub(super) fn bytes(&self) -> Result<Cow<'_, [u8]>, ValueError> {
        self.part(0..self.numel())
    }

    /// As [`Stored::bytes`], of some numbers in row-major order.
    fn part(&self, range: Range<usize>) -> Result<Cow<'_, [u8]>, ValueError> {
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
        let size = self.dtype.size();
        let Some(strides) = &self.strides else {
            return Ok(Cow::Borrowed(&file[self.start + range.start * size..self.start + range.end * size]));
        };
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

    /// Writes the numbers from `first` on as f32.
    pub(super) fn read_f32(&self, first: usize, out: &mut [f32]) -> Result<(), ValueError> {
        let bytes = self.part(first..first + out.len())?;
        match self.dtype {
            Dtype::F32 => convert(&bytes, out, f32::from_le_bytes),
            Dtype::F16 => convert(&bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => convert(&bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        }
        finite(out.iter().copied()).map_err(|e| match e {
            ValueError::NonFinite { index, value } => ValueError::NonFinite { index: first + index, value },
            e => e,
        })
    }

    /// Gives the memory of some numbers back to the system ([`Mapped::forget`]).
    pub(super) fn forget(&self, range: Range<usize>) {
        if self.strides.is_none() {
            let size = self.dtype.size();
            self.file.forget(self.start + range.start * size..self.start + range.end * size);
        }
    }
}

/// Checks that little-endian numbers of a type are all finite.
pub(super) fn check_finite(dtype: Dtype, bytes: &[u8]) -> Result<(), ValueError> {
    match dtype {
        Dtype::F32 => finite(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
        Dtype::F16 => finite(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32())),
        Dtype::BF16 => finite(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32())),
    }
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
