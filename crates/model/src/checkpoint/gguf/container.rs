//! The container: header, metadata and the list of tensors (versions 2 and 3, little-endian).
//!
//! A file says how many things follow and how long they are. None of these numbers is believed: nothing is allocated by
//! them, and every range is checked against the file before it is read.

use super::super::tensor::Dtype;
use hognose_core::quant::Kind;
use std::collections::BTreeMap;

/// The first four bytes of every file.
pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// The version that is written.
pub(super) const VERSION: u32 = 3;
/// What tensors are aligned to where the file does not say.
pub(super) const ALIGNMENT: u64 = 32;
/// Largest alignment that is taken for real.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// Largest number of axes.
const MAX_AXES: u32 = 4;

/// What is wrong with a file, for people.
pub(super) type Damage = String;

/// Types of tensors by their number in a file.
const TYPES: [(u32, Dtype); 11] = [
    (0, Dtype::F32),
    (1, Dtype::F16),
    (2, Dtype::Blocks(Kind::Q4_0)),
    (3, Dtype::Blocks(Kind::Q4_1)),
    (6, Dtype::Blocks(Kind::Q5_0)),
    (7, Dtype::Blocks(Kind::Q5_1)),
    (8, Dtype::Blocks(Kind::Q8_0)),
    (12, Dtype::Blocks(Kind::Q4_K)),
    (13, Dtype::Blocks(Kind::Q5_K)),
    (14, Dtype::Blocks(Kind::Q6_K)),
    (30, Dtype::BF16),
];

/// Types that are not read, for messages.
const OTHER_TYPES: [(u32, &str); 18] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// The number of a type in a file.
pub(super) fn type_number(dtype: Dtype) -> u32 {
    TYPES.iter().find(|t| t.1 == dtype).map_or(0, |t| t.0)
}

/// A value of the metadata. Texts and arrays lie in the file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    /// Any whole number.
    Whole(i128),
    /// f32 or f64.
    Float(f64),
    Bool(bool),
    /// Usually UTF-8.
    Text(&'a [u8]),
    Array(Array<'a>),
}

/// An array of the metadata: `len` values of one type in `bytes`, checked to be there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Array<'a> {
    kind: u32,
    len: u64,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Number of values.
    pub(super) fn len(&self) -> usize {
        // The values are in memory, so that their number fits.
        self.len as usize
    }

    /// The values one after another.
    pub(super) fn values(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (kind, mut cursor) = (self.kind, Cursor { bytes: self.bytes, at: 0 });
        (0..self.len).map_while(move |_| cursor.value(kind).ok())
    }
}

/// A tensor of the list.
#[derive(Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    /// Sizes, innermost first.
    pub(super) dims: Vec<usize>,
    /// Byte offset in the file.
    pub(super) start: usize,
}

/// What stands before the numbers of a file.
#[derive(Debug)]
pub(super) struct Container<'a> {
    pub(super) metadata: BTreeMap<&'a str, Value<'a>>,
    pub(super) tensors: Vec<Entry>,
}

/// Reads everything but the numbers.
///
/// # Errors
/// Whatever is wrong, in words.
pub(super) fn read(bytes: &[u8]) -> Result<Container<'_>, Damage> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(4).is_ok_and(|magic| magic != MAGIC) || bytes.len() < 4 {
        return Err("it does not begin with \"GGUF\"".into());
    }
    match cursor.u32()? {
        2 | VERSION => {}
        1 => return Err("it is of version 1; convert the model again with a program of today".into()),
        v if v & 0xffff == 0 => return Err("it is for machines of the other byte order (big-endian)".into()),
        v => return Err(format!("it is of version {v}; expected 2 or {VERSION}")),
    }
    let (tensor_count, value_count) = (cursor.u64()?, cursor.u64()?);
    let mut metadata = BTreeMap::new();
    for i in 0..value_count {
        let key = cursor.name().map_err(|e| format!("key {i} of {value_count}: {e}"))?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind).map_err(|e| format!("the value of {key}: {e}"))?;
        if metadata.insert(key, value).is_some() {
            return Err(format!("the key {key} is there twice"));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT,
        Some(&Value::Whole(n)) => u64::try_from(n)
            .ok()
            .filter(|n| n.is_power_of_two() && *n <= MAX_ALIGNMENT)
            .ok_or_else(|| format!("general.alignment is {n}; expected a power of two up to {MAX_ALIGNMENT}"))?,
        Some(_) => return Err("general.alignment is no whole number".into()),
    };
    let mut infos = Vec::new();
    for i in 0..tensor_count {
        infos.push(cursor.tensor().map_err(|e| format!("tensor {i} of {tensor_count}: {e}"))?);
    }
    let data = (cursor.at as u64).next_multiple_of(alignment);
    let mut tensors: Vec<Entry> = Vec::with_capacity(infos.len());
    let mut names = std::collections::HashSet::new();
    for info in infos {
        let name = info.name;
        if !names.insert(name) {
            return Err(format!("the tensor {name} is there twice"));
        }
        let (dtype, dims) = (info.dtype, info.dims);
        if info.offset % alignment != 0 {
            return Err(format!("tensor {name} is not aligned to {alignment} bytes"));
        }
        let numel = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let columns = dims.first().copied().unwrap_or(1);
        if !dtype.fits(columns) {
            return Err(format!("tensor {name} has rows of {columns} numbers, which are no whole blocks of {dtype}"));
        }
        let start = data.checked_add(info.offset).and_then(|s| usize::try_from(s).ok());
        // No type takes more than four bytes a number.
        let end = numel.filter(|n| n.checked_mul(4).is_some()).and_then(|n| start?.checked_add(dtype.bytes(n)));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(format!("tensor {name} is of the shape {dims:?}, which is larger than any file"));
        };
        if end > bytes.len() {
            return Err(format!(
                "tensor {name} goes past the end of the file, to byte {end} of {}; it is cut short or damaged",
                bytes.len()
            ));
        }
        tensors.push(Entry { name: name.to_string(), dtype, dims, start });
    }
    Ok(Container { metadata, tensors })
}

/// A tensor as the list has it.
struct Info<'a> {
    name: &'a str,
    dtype: Dtype,
    dims: Vec<usize>,
    /// From the first tensor's place.
    offset: u64,
}

/// A place in the file.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8], Damage> {
        let end = usize::try_from(count).ok().and_then(|n| self.at.checked_add(n));
        let Some(taken) = end.and_then(|end| self.bytes.get(self.at..end)) else {
            return Err(format!(
                "{count} bytes are announced at byte {}, and the file ends at {}; it is cut short or damaged",
                self.at,
                self.bytes.len()
            ));
        };
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Damage> {
        let taken = self.take(N as u64)?;
        taken.try_into().map_err(|_| "the file ends".to_string())
    }

    fn u32(&mut self) -> Result<u32, Damage> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Damage> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<&'a [u8], Damage> {
        let length = self.u64()?;
        self.take(length)
    }

    fn name(&mut self) -> Result<&'a str, Damage> {
        std::str::from_utf8(self.text()?).map_err(|_| "a name is not UTF-8; the file is damaged".to_string())
    }

    /// A value of the type with this number.
    fn value(&mut self, kind: u32) -> Result<Value<'a>, Damage> {
        Ok(match kind {
            0 => Value::Whole(self.array().map(u8::from_le_bytes)?.into()),
            1 => Value::Whole(self.array().map(i8::from_le_bytes)?.into()),
            2 => Value::Whole(self.array().map(u16::from_le_bytes)?.into()),
            3 => Value::Whole(self.array().map(i16::from_le_bytes)?.into()),
            4 => Value::Whole(self.u32()?.into()),
            5 => Value::Whole(self.array().map(i32::from_le_bytes)?.into()),
            6 => Value::Float(self.array().map(f32::from_le_bytes)?.into()),
            7 => match self.array()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(format!("{other} is neither true (1) nor false (0)")),
            },
            8 => Value::Text(self.text()?),
            9 => Value::Array(self.values()?),
            10 => Value::Whole(self.u64()?.into()),
            11 => Value::Whole(self.array().map(i64::from_le_bytes)?.into()),
            12 => Value::Float(self.array().map(f64::from_le_bytes)?),
            other => return Err(format!("there is no type {other}; the file is damaged")),
        })
    }

    fn values(&mut self) -> Result<Array<'a>, Damage> {
        let (kind, len) = (self.u32()?, self.u64()?);
        let start = self.at;
        let size: u64 = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => 0,
            other => return Err(format!("an array of type {other} is not read")),
        };
        if kind == 8 {
            for _ in 0..len {
                self.text()?;
            }
        } else {
            let bytes = len.checked_mul(size).ok_or_else(|| format!("{len} values are more than any file has"))?;
            self.take(bytes)?;
        }
        Ok(Array { kind, len, bytes: &self.bytes[start..self.at] })
    }

    fn tensor(&mut self) -> Result<Info<'a>, Damage> {
        let name = self.name()?;
        let axes = self.u32()?;
        if axes > MAX_AXES {
            return Err(format!("{name} has {axes} axes; expected at most {MAX_AXES}"));
        }
        let mut dims = Vec::new();
        for _ in 0..axes {
            let size = self.u64()?;
            let size = usize::try_from(size).ok().filter(|&n| n > 0);
            dims.push(size.ok_or_else(|| format!("{name} has an axis of a size that cannot be"))?);
        }
        let number = self.u32()?;
        let Some(&(_, dtype)) = TYPES.iter().find(|t| t.0 == number) else {
            let known = OTHER_TYPES.iter().find(|t| t.0 == number);
            let found = known.map_or_else(|| format!("number {number}"), |t| t.1.to_string());
            let all = TYPES.map(|t| t.1.to_string()).join(", ");
            return Err(format!("{name} is of type {found}, which is not read; those that are: {all}"));
        };
        Ok(Info { name, dtype, dims, offset: self.u64()? })
    }
}
