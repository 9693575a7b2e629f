//! Scalars as TensorBoard event files.
//!
//! A file is a row of records (TensorFlow's `lib/io/record_writer`): the length of the data (u64), a masked CRC-32C
//! of these eight bytes, the data, a masked CRC-32C of it; all numbers little-endian. The data is an `Event` message
//! (`event.proto`, `summary.proto`), of which only the few fields below are needed.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{Metrics, RecordError};

/// Writes scalars that TensorBoard shows; each call reaches the file before it returns.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts an event file in a folder, which is made if need be. A run that resumes after `resumed` starts a new
    /// file beside the old ones; it tells TensorBoard to forget what these hold of later steps.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn create(folder: &Path, resumed: Option<u64>) -> Result<Self, RecordError> {
        fs::create_dir_all(folder).map_err(RecordError::io(folder))?;
        let seconds = now().as_secs();
        // TensorBoard reads files in the order of their names, and a name must not come twice.
        for number in 0.. {
            let path = folder.join(format!("events.out.tfevents.{seconds:010}.{number:03}.hognose"));
            let file = match OpenOptions::new().append(true).create_new(true).open(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                file => file.map_err(RecordError::io(&path))?,
            };
            let mut writer = Self { path, file };
            let mut version = Vec::new();
            put_bytes(&mut version, 3, b"brain.Event:2"); // Event.file_version
            writer.event(0, &version)?;
            if let Some(step) = resumed {
                let mut log = Vec::new();
                put_varint(&mut log, 1, 1); // SessionLog.status = START
                let mut start = Vec::new();
                put_bytes(&mut start, 7, &log); // Event.session_log
                writer.event(step + 1, &start)?;
            }
            return Ok(writer);
        }
        unreachable!("the loop has no end")
    }

    /// The file that is written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes scalars of a step, each with its tag.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<(), RecordError> {
        let mut summary = Vec::new();
        for (tag, value) in scalars {
            let mut entry = Vec::new();
            put_bytes(&mut entry, 1, tag.as_bytes()); // Summary.Value.tag
            put_key(&mut entry, 2, 5); // Summary.Value.simple_value, a float
            entry.extend_from_slice(&(*value as f32).to_le_bytes());
            put_bytes(&mut summary, 1, &entry); // Summary.value
        }
        let mut event = Vec::new();
        put_bytes(&mut event, 5, &summary); // Event.summary
        self.event(step, &event)
    }

    /// Writes what was measured of a step under the usual tags.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn metrics(&mut self, metrics: &Metrics) -> Result<(), RecordError> {
        let all = [
            ("train/loss", metrics.loss),
            ("train/bits_per_byte", metrics.bits_per_byte),
            ("train/learning_rate", metrics.learning_rate),
            ("train/gradient_norm", metrics.gradient_norm),
            ("train/tokens_per_second", metrics.tokens_per_second),
            ("validation/loss", metrics.validation_loss),
            ("validation/bits_per_byte", metrics.validation_bits_per_byte),
        ];
        let measured: Vec<_> = all.into_iter().filter_map(|(tag, value)| value.map(|value| (tag, value))).collect();
        if measured.is_empty() { Ok(()) } else { self.scalars(metrics.step, &measured) }
    }

    /// Writes an event: time, step and the field that says what it is.
    fn event(&mut self, step: u64, what: &[u8]) -> Result<(), RecordError> {
        let mut event = Vec::new();
        put_key(&mut event, 1, 1); // Event.wall_time, a double
        event.extend_from_slice(&now().as_secs_f64().to_le_bytes());
        put_varint(&mut event, 2, step); // Event.step
        event.extend_from_slice(what);
        self.file.write_all(&record(&event)).map_err(RecordError::io(&self.path))
    }
}

fn now() -> Duration {
    // A clock before 1970 is no reason to stop a run.
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length).to_le_bytes(), data, &masked_crc(data).to_le_bytes()].concat()
}

/// TensorFlow's mask, for checksums of data that itself holds checksums.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A protocol buffer's field key: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
fn put_key(message: &mut Vec<u8>, field: u8, kind: u8) {
    message.push(field << 3 | kind);
}

fn put_varint(message: &mut Vec<u8>, field: u8, value: u64) {
    put_key(message, field, 0);
    put_number(message, value);
}

fn put_bytes(message: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    put_key(message, field, 2);
    put_number(message, bytes.len() as u64);
    message.extend_from_slice(bytes);
}

fn put_number(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// The data of each record, after a check of its framing.
    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(bytes[8..12], masked_crc(&bytes[..8]).to_le_bytes());
            let data = &bytes[12..12 + length];
            assert_eq!(bytes[12 + length..16 + length], masked_crc(data).to_le_bytes());
            found.push(data.to_vec());
            bytes = &bytes[16 + length..];
        }
        found
    }

    #[test]
    fn the_checksum_is_the_published_one() {
        // CRC-32C of "123456789" is e3069283 (RFC 3720's polynomial); rotated by 15 bits and shifted it is this.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5);
    }

    #[test]
    fn numbers_are_encoded_in_groups_of_seven_bits() {
        for (value, bytes) in [(0, &[0][..]), (127, &[127]), (128, &[0x80, 1]), (300, &[0xac, 2])] {
            let mut message = Vec::new();
            put_number(&mut message, value);
            assert_eq!(message, bytes);
        }
    }

    #[test]
    fn writes_version_and_scalars() {
        let folder = TempDir::new().unwrap();
        let mut writer = EventWriter::create(&folder.path().join("tb"), None).unwrap();
        writer.scalars(300, &[("a", 1.5)]).unwrap();
        let records = records(&fs::read(writer.path()).unwrap());
        assert_eq!(records.len(), 2);
        // wall_time takes nine bytes, the step 0 two.
        assert_eq!(records[0][9..], *b"\x10\x00\x1a\x0dbrain.Event:2");
        assert_eq!(records[1][9..], *b"\x10\xac\x02\x2a\x0a\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x3f");
    }

    #[test]
    fn a_resumed_run_starts_a_file_of_its_own() {
        let folder = TempDir::new().unwrap();
        let first = EventWriter::create(folder.path(), None).unwrap();
        let second = EventWriter::create(folder.path(), Some(7)).unwrap();
        assert!(first.path() < second.path());
        let records = records(&fs::read(second.path()).unwrap());
        assert_eq!(records[1][9..], *b"\x10\x08\x3a\x02\x08\x01");
    }

    #[test]
    fn metrics_without_any_measure_write_nothing() {
        let folder = TempDir::new().unwrap();
        let mut writer = EventWriter::create(folder.path(), None).unwrap();
        writer.metrics(&Metrics::default()).unwrap();
        writer.metrics(&Metrics { step: 1, loss: Some(2.0), ..Metrics::default() }).unwrap();
        assert_eq!(records(&fs::read(writer.path()).unwrap()).len(), 2);
    }
}
