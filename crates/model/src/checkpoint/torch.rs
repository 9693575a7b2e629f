//! pytorch_model.bin: the zip archive that `torch.save` has written since torch 1.6, read and written.
//!
//! `NAME/data.pkl` is the pickle of a state dict, `NAME/data/KEY` are storages (raw little-endian numbers, stored
//! without compression and aligned to 64 bytes), `NAME/byteorder` says `little`. Storages are used where they lie.

use super::error::CheckpointError;
use super::pickle::{self, TensorView};
use super::tensor::{Checked, Dtype, Mapped, Stored};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Cursor, Write};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// How a legacy file of torch before 1.6 begins: a pickle of its magic number.
const LEGACY: [u8; 14] = [0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// The folder inside of the archive, as torch names it after the file.
const FOLDER: &str = "pytorch_model";

/// Where a record lies in the file.
struct Record {
    start: usize,
    len: usize,
    crc32: u32,
}

/// Opens a .bin file and finds every tensor in it.
pub(super) fn open(path: &Path) -> Result<Vec<(String, Stored)>, CheckpointError> {
    let bad = |message: String| CheckpointError::Torch { path: path.into(), message };
    let file = Mapped::open(path).map_err(CheckpointError::io(path, "open"))?;
    let records = records(file.bytes()).map_err(bad)?;
    let (folder, pickle) = {
        let mut found = records.iter().filter_map(|(n, r)| Some((n.strip_suffix("data.pkl")?, r)));
        match (found.next(), found.next()) {
            (Some(one), None) => one,
            (None, _) => return Err(bad("the archive has no data.pkl".into())),
            _ => return Err(bad("the archive has more than one data.pkl".into())),
        }
    };
    if let Some(order) = records.get(&format!("{folder}byteorder")) {
        let order = &file.bytes()[order.start..order.start + order.len];
        if order != b"little" {
            let found = String::from_utf8_lossy(order).into_owned();
            return Err(bad(format!("its numbers are in {found:?} byte order; expected \"little\"")));
        }
    }
    let pickle_bytes = &file.bytes()[pickle.start..pickle.start + pickle.len];
    if pickle.crc32 != 0 && crc32fast::hash(pickle_bytes) != pickle.crc32 {
        return Err(bad("data.pkl does not match its checksum; the file is damaged".into()));
    }
    let views = pickle::state_dict(pickle_bytes).map_err(|e| bad(e.to_string()))?;
    let mut storages = HashMap::new();
    let mut all = Vec::with_capacity(views.len());
    for (name, view) in views {
        let Some(dtype) = view.storage.kind.dtype else {
            return Err(CheckpointError::Dtype { path: path.into(), name, found: view.storage.kind.name.into() });
        };
        let key = format!("{folder}data/{}", view.storage.key);
        let record =
            records.get(&key).ok_or_else(|| bad(format!("tensor {name} refers to {key}, which is missing")))?;
        let checked = storages.entry(key).or_insert_with(|| {
            // torch writes 0 where it was told not to compute checksums.
            (record.crc32 != 0).then(|| {
                let Record { start, len, crc32 } = *record;
                Arc::new(Checked { start, len, crc32, good: OnceLock::new() })
            })
        });
        let strides = check_view(&view, record.len, dtype).map_err(|e| bad(format!("tensor {name} {e}")))?;
        let start = record.start + view.offset * dtype.bytes(1);
        let (file, checked) = (file.clone(), checked.clone());
        let stored = Stored { file, dtype, shape: view.shape, start, strides, checked, negated_exp: false };
        all.push((name, stored));
    }
    Ok(all)
}

/// Finds the records of an archive; all of them must lie inside of the file, uncompressed.
fn records(bytes: &[u8]) -> Result<HashMap<String, Record>, String> {
    if bytes.starts_with(&LEGACY) {
        return Err("it is in the legacy layout of torch before 1.6; load it in Python and save it again".into());
    }
    if !bytes.starts_with(b"PK") {
        return Err("it does not begin as a zip archive does".into());
    }
    let damaged = |e: zip::result::ZipError| format!("the zip archive is damaged or cut short: {e}");
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(damaged)?;
    let mut all = HashMap::new();
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(damaged)?;
        let name = String::from_utf8_lossy(entry.name_raw()).into_owned();
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(format!("{name} is compressed or encrypted; torch.save writes neither"));
        }
        let start = entry.data_start().and_then(|s| usize::try_from(s).ok());
        let len = usize::try_from(entry.size()).ok().filter(|_| entry.size() == entry.compressed_size());
        let inside = |s: usize, n: usize| s.checked_add(n).is_some_and(|e| e <= bytes.len());
        match (start, len) {
            (Some(start), Some(len)) if inside(start, len) => {
                all.insert(name, Record { start, len, crc32: entry.crc32() });
            }
            _ => return Err(format!("{name} goes past the end of the file, which is cut short or damaged")),
        }
    }
    Ok(all)
}

/// Checks a view against its storage. Gives the strides back where they are not those of a row-major tensor.
fn check_view(view: &TensorView, bytes: usize, dtype: Dtype) -> Result<Option<Vec<usize>>, String> {
    let stored = view.storage.numel;
    if stored.checked_mul(dtype.bytes(1)) != Some(bytes) {
        return Err(format!("has a storage of {bytes} bytes; expected {stored} numbers of {} bytes", dtype.bytes(1)));
    }
    let numel = view.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    // The last element's place; a tensor without elements touches nothing.
    let steps = view.shape.iter().zip(&view.strides);
    let last = steps.clone().try_fold(view.offset, |at, (&n, &s)| at.checked_add(n.saturating_sub(1).checked_mul(s)?));
    match (numel, last) {
        (Some(0), _) if view.offset <= stored => return Ok(None),
        // An expanded view (stride 0) may have more elements than its storage; weights do not, and it could ask for any
        // amount of memory.
        (Some(n), Some(last)) if n <= stored && last < stored => {}
        _ => return Err(format!("reaches outside of its storage of {stored} numbers")),
    }
    let mut expected = 1;
    let mut contiguous = true;
    for (&n, &s) in steps.rev() {
        contiguous &= n == 1 || s == expected;
        expected *= n;
    }
    Ok((!contiguous).then(|| view.strides.clone()))
}

/// A tensor to be written: its name, shape and numbers.
pub(super) struct Entry<'a> {
    pub(super) name: String,
    /// No blocks; see [`Checkpoint::plain_bytes`](super::Checkpoint).
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Position in the list of the entry whose numbers this one shares.
    pub(super) shares: Option<usize>,
    /// Row-major, little-endian. Called once, and not at all for an entry that shares.
    pub(super) data: Box<dyn Fn() -> Result<Cow<'a, [u8]>, CheckpointError> + 'a>,
}

/// Writes a .bin that `torch.load(weights_only=True)` reads, and syncs it to the disk.
pub(super) fn write(path: &Path, entries: &[Entry]) -> Result<(), CheckpointError> {
    let io = |source: std::io::Error| CheckpointError::Io { path: path.into(), action: "write", source };
    let zip_error = |e: zip::result::ZipError| io(e.into());
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).with_alignment(64);
    let mut zip = ZipWriter::new(BufWriter::with_capacity(1 << 20, File::create_new(path).map_err(io)?));
    zip.start_file(format!("{FOLDER}/data.pkl"), options).map_err(zip_error)?;
    zip.write_all(&pickle_of(entries)).map_err(io)?;
    zip.start_file(format!("{FOLDER}/byteorder"), options).map_err(zip_error)?;
    zip.write_all(b"little").map_err(io)?;
    for (key, entry) in entries.iter().enumerate().filter(|(_, e)| e.shares.is_none()) {
        let data = (entry.data)()?;
        let options = options.large_file(data.len() >= u32::MAX as usize);
        zip.start_file(format!("{FOLDER}/data/{key}"), options).map_err(zip_error)?;
        zip.write_all(&data).map_err(io)?;
    }
    zip.start_file(format!("{FOLDER}/version"), options).map_err(zip_error)?;
    zip.write_all(b"3\n").map_err(io)?;
    let file = zip.finish().map_err(zip_error)?.into_inner().map_err(|e| io(e.into_error()))?;
    file.sync_all().map_err(io)
}

/// The pickle (protocol 2) of an OrderedDict from names to tensors.
fn pickle_of(entries: &[Entry]) -> Vec<u8> {
    let mut p = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    for (i, e) in entries.iter().enumerate() {
        let key = e.shares.unwrap_or(i);
        let kind = match e.dtype {
            Dtype::F32 | Dtype::Blocks(_) => "FloatStorage",
            Dtype::F16 => "HalfStorage",
            Dtype::BF16 => "BFloat16Storage",
        };
        text(&mut p, &e.name);
        p.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut p, "storage");
        p.extend(format!("ctorch\n{kind}\n").bytes());
        text(&mut p, &key.to_string());
        text(&mut p, "cpu");
        integer(&mut p, e.shape.iter().product());
        p.extend(b"tQ");
        integer(&mut p, 0);
        integers(&mut p, &e.shape);
        let strides: Vec<_> = (1..=e.shape.len()).map(|d| e.shape[d..].iter().product()).collect();
        integers(&mut p, &strides);
        // requires_grad = False, backward_hooks = OrderedDict().
        p.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    p.extend(b"u.");
    p
}

fn text(p: &mut Vec<u8>, s: &str) {
    p.push(b'X');
    p.extend((s.len() as u32).to_le_bytes());
    p.extend(s.bytes());
}

fn integer(p: &mut Vec<u8>, n: usize) {
    if let Ok(n) = i32::try_from(n) {
        p.push(b'J');
        p.extend(n.to_le_bytes());
    } else {
        p.extend([0x8a, 8]);
        p.extend((n as u64).to_le_bytes());
    }
}

fn integers(p: &mut Vec<u8>, all: &[usize]) {
    p.push(b'(');
    for &n in all {
        integer(p, n);
    }
    p.push(b't');
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::checkpoint::pickle::{Storage, StorageType};

    pub(in super::super) fn small_pickle() -> Vec<u8> {
        let entry = |name: &str, shares| Entry {
            name: name.into(),
            dtype: Dtype::F32,
            shape: vec![2, 3],
            shares,
            data: Box::new(|| Ok(Cow::Borrowed(&[0; 24]))),
        };
        pickle_of(&[entry("a.weight", None), entry("b.weight", Some(0))])
    }

    fn view(numel: usize, offset: usize, shape: &[usize], strides: &[usize]) -> TensorView {
        let kind = StorageType { name: "F32", dtype: Some(Dtype::F32) };
        let storage = Storage { key: "0".into(), kind, numel };
        TensorView { storage, offset, shape: shape.to_vec(), strides: strides.to_vec() }
    }

    #[test]
    fn views_stay_inside_of_their_storage() {
        let ok = |v: TensorView| check_view(&v, 4 * v.storage.numel, Dtype::F32);
        assert_eq!(ok(view(6, 0, &[2, 3], &[3, 1])), Ok(None));
        assert_eq!(ok(view(6, 0, &[3, 2], &[1, 3])), Ok(Some(vec![1, 3])));
        assert_eq!(ok(view(6, 0, &[2, 1, 3], &[3, 77, 1])), Ok(None));
        assert_eq!(ok(view(6, 6, &[0, 3], &[3, 1])), Ok(None));
        assert_eq!(ok(view(6, 5, &[], &[])), Ok(None));
        for bad in [
            view(6, 1, &[2, 3], &[3, 1]),
            view(6, 6, &[], &[]),
            view(6, 7, &[0], &[1]),
            view(6, 0, &[2, 3], &[4, 1]),
            view(6, 0, &[1 << 40], &[0]),
            view(6, 0, &[1 << 40, 1 << 40], &[0, 0]),
            view(6, usize::MAX, &[2], &[1]),
            view(6, 0, &[2], &[usize::MAX]),
        ] {
            assert!(ok(bad.clone()).is_err(), "{bad:?}");
        }
        assert!(check_view(&view(6, 0, &[2], &[1]), 23, Dtype::F32).is_err());
        assert!(check_view(&view(usize::MAX, 0, &[2], &[1]), 24, Dtype::F32).is_err());
    }

    fn write_zip(path: &Path, files: &[(&str, &[u8])]) {
        let mut zip = ZipWriter::new(File::create(path).unwrap());
        for (name, data) in files {
            zip.start_file(*name, SimpleFileOptions::default().compression_method(CompressionMethod::Stored)).unwrap();
            zip.write_all(data).unwrap();
        }
        zip.finish().unwrap();
    }

    /// A pickle of one tensor "t" [shape] over storage "0" of `numel` floats.
    fn one_tensor(kind: &str, numel: usize, offset: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
        let mut p = b"\x80\x02}".to_vec();
        text(&mut p, "t");
        p.extend(b"ctorch._utils\n_rebuild_parameter\n(ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut p, "storage");
        p.extend(format!("ctorch\n{kind}\n").bytes());
        text(&mut p, "0");
        text(&mut p, "cuda:0");
        integer(&mut p, numel);
        p.extend(b"tQ");
        integer(&mut p, offset);
        integers(&mut p, shape);
        integers(&mut p, strides);
        p.extend(b"\x89ccollections\nOrderedDict\n)RtR\x88ccollections\nOrderedDict\n)RtRs.");
        p
    }

    #[test]
    fn transposed_and_shifted_views_are_gathered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.bin");
        let numbers: Vec<u8> = (0..8).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let p = one_tensor("FloatStorage", 8, 1, &[3, 2], &[1, 3]);
        write_zip(&path, &[("x/data.pkl", &p), ("x/data/0", &numbers), ("x/byteorder", b"little")]);
        let all = open(&path).unwrap();
        assert_eq!(all[0].0, "t");
        let mut out = [0f32; 6];
        all[0].1.read_f32(0, &mut out).unwrap();
        assert_eq!(out, [1., 4., 2., 5., 3., 6.]);
    }

    #[test]
    fn damaged_archives_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.bin");
        let error = || open(&path).unwrap_err().to_string();
        let data = [0u8; 24];
        let good = one_tensor("FloatStorage", 6, 0, &[2, 3], &[3, 1]);

        write_zip(&path, &[("x/data.pkl", &good)]);
        assert!(error().contains("x/data/0, which is missing"), "{}", error());
        write_zip(&path, &[("x/data.pkl", &good), ("x/data/0", &data[..20])]);
        assert!(error().contains("20 bytes"), "{}", error());
        write_zip(&path, &[("x/data.pkl", &good), ("x/data/0", &data), ("x/byteorder", b"big")]);
        assert!(error().contains("byte order"), "{}", error());
        write_zip(&path, &[("x/data.pkl", &good), ("y/data.pkl", &good), ("x/data/0", &data)]);
        assert!(error().contains("more than one"), "{}", error());
        write_zip(&path, &[("x/other", &data)]);
        assert!(error().contains("no data.pkl"), "{}", error());
        write_zip(&path, &[("x/data.pkl", &one_tensor("LongStorage", 3, 0, &[3], &[1])), ("x/data/0", &data)]);
        assert!(error().contains("I64"), "{}", error());
        write_zip(&path, &[("x/data.pkl", &one_tensor("FloatStorage", 6, 2, &[2, 3], &[3, 1])), ("x/data/0", &data)]);
        assert!(error().contains("outside"), "{}", error());
        write_zip(&path, &[("x/data.pkl", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."), ("x/data/0", &data)]);
        assert!(error().contains("os.system") && error().contains("x.bin"), "{}", error());
        std::fs::write(&path, [&LEGACY[..], &[0; 100]].concat()).unwrap();
        assert!(error().contains("legacy"), "{}", error());
        for bytes in [&b""[..], b"PK", b"hello", b"PK\x03\x04 and then nothing"] {
            std::fs::write(&path, bytes).unwrap();
            assert!(error().contains("x.bin"), "{}", error());
        }

        // Every way of cutting a good file short, and a flipped bit in the numbers.
        write_zip(&path, &[("x/data.pkl", &good), ("x/data/0", &[7; 24]), ("x/version", b"3\n")]);
        let bytes = std::fs::read(&path).unwrap();
        for n in 0..bytes.len() {
            std::fs::write(&path, &bytes[..n]).unwrap();
            assert!(open(&path).is_err(), "{n}");
        }
        let at = bytes.windows(24).position(|w| w == [7; 24]).unwrap();
        let mut flipped = bytes.clone();
        flipped[at + 3] ^= 1;
        std::fs::write(&path, &flipped).unwrap();
        let tensors = open(&path).unwrap();
        let mut values = vec![0.0; tensors[0].1.numel()];
        assert_eq!(tensors[0].1.read_f32(0, &mut values), Err(crate::checkpoint::tensor::ValueError::Checksum));
    }
}
