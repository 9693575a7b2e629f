//! What gzip and xz need for held-out text when they have seen the training text.
//!
//! A compressor is a language model without training: the size of training and held-out text together, less the size
//! of the training text alone, is what it needs for the held-out text. A language model worth its time needs less.

use std::io::{self, Write};

use flate2::write::GzEncoder;
use liblzma::write::XzEncoder;

use serde::{Deserialize, Serialize};

use crate::data::Document;

/// How much of the training text is shown, in bytes: the dictionary of `xz -9`. Neither program can refer to what
/// lies further back, so more would only cost time.
pub const SEEN: usize = 64 << 20;

/// What a compressor needs for the held-out text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// Size of the held-out text in bytes.
    pub held_out: u64,
    /// Additional compressed bytes.
    pub bytes: u64,
    /// The same in bits for each byte of the held-out text.
    pub bits_per_byte: f64,
}

/// What `gzip -9` needs. Its window is 32 KiB, so it has forgotten nearly all of the training text.
///
/// # Errors
/// [`io::Error`] only if memory runs out.
pub fn gzip(training: &[Document], held_out: &[Document]) -> io::Result<Baseline> {
    difference(training, held_out, |documents| {
        let mut encoder = GzEncoder::new(Counter(0), flate2::Compression::best());
        feed(&mut encoder, documents)?;
        Ok(encoder.finish()?.0)
    })
}

/// What `xz -9` needs.
///
/// # Errors
/// [`io::Error`] only if memory runs out; level 9 takes 674 MiB.
pub fn xz(training: &[Document], held_out: &[Document]) -> io::Result<Baseline> {
    difference(training, held_out, |documents| {
        let mut encoder = XzEncoder::new(Counter(0), 9);
        feed(&mut encoder, documents)?;
        Ok(encoder.finish()?.0)
    })
}

fn difference(
    training: &[Document],
    held_out: &[Document],
    size: impl Fn(&[&[&Document]]) -> io::Result<u64>,
) -> io::Result<Baseline> {
    let (training, held_out) = (last(training), held_out.iter().collect::<Vec<_>>());
    let bytes = size(&[&training, &held_out])?.saturating_sub(size(&[&training])?);
    let length: u64 = held_out.iter().map(|document| document.bytes.len() as u64).sum();
    let bits_per_byte = if length == 0 { 0.0 } else { bytes as f64 * 8.0 / length as f64 };
    Ok(Baseline { held_out: length, bytes, bits_per_byte })
}

/// The last documents, as many as make up [`SEEN`] bytes.
fn last(documents: &[Document]) -> Vec<&Document> {
    let mut bytes = 0;
    let mut last: Vec<_> = documents
        .iter()
        .rev()
        .take_while(|document| {
            let room = bytes < SEEN;
            bytes += document.bytes.len();
            room
        })
        .collect();
    last.reverse();
    last
}

fn feed(encoder: &mut dyn Write, parts: &[&[&Document]]) -> io::Result<()> {
    for document in parts.iter().copied().flatten() {
        encoder.write_all(&document.bytes)?;
    }
    Ok(())
}

/// Counts what is written and keeps nothing.
struct Counter(u64);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus;
    use crate::data::split::split;

    fn document(bytes: Vec<u8>) -> Document {
        Document { name: String::new(), bytes }
    }

    /// Bytes that no compressor can shorten.
    fn noise(length: u64, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    #[test]
    fn what_was_seen_costs_little_and_noise_costs_all() {
        let training = [document(noise(1 << 20, 1)), document(noise(20_000, 2))];
        let seen = [document(training[0].bytes[500_000..510_000].to_vec())];
        let near = [document(training[1].bytes[5_000..15_000].to_vec())];
        let new = [document(noise(10_000, 3))];
        // The rest is what LZMA loses on the noise in the same chunk.
        assert!(xz(&training, &seen).unwrap().bytes < 2000);
        assert!(gzip(&training, &near).unwrap().bytes < 400);
        // Further back than gzip's window.
        assert!(gzip(&training, &seen).unwrap().bits_per_byte > 7.9);
        for baseline in [gzip(&training, &new).unwrap(), xz(&training, &new).unwrap()] {
            assert!((7.9..8.2).contains(&baseline.bits_per_byte), "{baseline:?}");
            assert_eq!(baseline.held_out, 10_000);
        }
    }

    #[test]
    fn nothing_held_out_needs_nothing() {
        assert_eq!(gzip(&[document(vec![1, 2])], &[]).unwrap().bits_per_byte, 0.0);
    }

    /// The figures of the default run. The programs themselves (gzip 1.12, xz 5.4) give 64,994 and 46,524 bytes.
    #[test]
    fn figures_of_the_shipped_text() {
        let split = split(corpus::documents().unwrap(), 0.05, 0).unwrap();
        let gzip = gzip(&split.training, &split.validation).unwrap();
        let xz = xz(&split.training, &split.validation).unwrap();
        assert_eq!(xz.held_out, 178_277);
        assert!((64_500..65_500).contains(&gzip.bytes) && (46_000..47_000).contains(&xz.bytes), "{gzip:?} {xz:?}");
    }
}
