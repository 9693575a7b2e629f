//! Documents from files, folders and patterns.
//!
//! A `.txt` file is one document; every line of a `.jsonl` file is an object with a document in one of its fields.
//! Both may be compressed: `.gz`, `.zst` or `.xz` after the name. Folders are searched with everything below them.
//! The order is that of the arguments, and of the sorted paths inside each, so it does not depend on the machine.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{DataError, Document};

/// The field of a JSON line that holds the text when none is named.
pub const DEFAULT_FIELD: &str = "text";

/// Reads every document that `paths` name: files, folders or patterns with `*`, `?` and `[…]`.
///
/// `field` is the field of a JSON line that holds the text. Documents without a single byte are left out.
///
/// # Errors
/// [`DataError`] that names the path, and the line for JSON lines: nothing there, a folder or pattern without text,
/// a file that is neither text nor JSON lines, a damaged archive, an invalid line, a line without the field, and no
/// text at all.
pub fn read(paths: &[PathBuf], field: &str) -> Result<Vec<Document>, DataError> {
    if paths.is_empty() {
        return Err(DataError::NoSources);
    }
    let files = find(paths)?;
    let mut documents = Vec::new();
    for path in &files {
        let kind = Kind::of(path).ok_or_else(|| DataError::UnknownKind(path.clone()))?;
        let file = File::open(path).map_err(|source| read_error(path, source))?;
        read_file(path, kind, BufReader::with_capacity(1 << 16, file), field, &mut documents)?;
    }
    if documents.is_empty() {
        return Err(DataError::Empty { files: files.len() });
    }
    Ok(documents)
}

/// The files that `paths` stand for, each once, in the order in which [`read`] reads them.
///
/// # Errors
/// As [`read`], as far as names go.
pub fn find(paths: &[PathBuf]) -> Result<Vec<PathBuf>, DataError> {
    let mut found = Vec::new();
    let mut visited = HashSet::new();
    for path in paths {
        if path.exists() {
            collect(path, &mut visited, &mut found)?;
            continue;
        }
        let pattern = path.to_string_lossy();
        if !pattern.contains(['*', '?', '[']) {
            return Err(DataError::Missing(path.clone()));
        }
        let reason = |reason: String| DataError::Pattern { pattern: pattern.to_string(), reason };
        let mut matches = glob::glob(&pattern)
            .map_err(|error| reason(error.msg.to_owned()))?
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error: glob::GlobError| DataError::Read {
                path: error.path().to_path_buf(),
                source: error.into(),
            })?;
        // A pattern such as data/* also matches files of other kinds; only what it names by its ending must be text.
        matches.retain(|path| path.is_dir() || Kind::of(path).is_some());
        if matches.is_empty() {
            return Err(DataError::NoMatch { pattern: pattern.to_string() });
        }
        matches.sort();
        for path in matches {
            collect(&path, &mut visited, &mut found)?;
        }
    }
    let mut seen = HashSet::new();
    found.retain(|path| seen.insert(path.clone()));
    Ok(found)
}

/// Adds a file, or every text file in and below a folder.
fn collect(path: &Path, visited: &mut HashSet<PathBuf>, found: &mut Vec<PathBuf>) -> Result<(), DataError> {
    if !path.is_dir() {
        return match Kind::of(path) {
            Some(_) => {
                found.push(path.to_path_buf());
                Ok(())
            }
            None => Err(DataError::UnknownKind(path.to_path_buf())),
        };
    }
    let before = found.len();
    walk(path, visited, found)?;
    if found.len() == before {
        return Err(DataError::FolderWithoutText(path.to_path_buf()));
    }
    Ok(())
}

fn walk(folder: &Path, visited: &mut HashSet<PathBuf>, found: &mut Vec<PathBuf>) -> Result<(), DataError> {
    // Symbolic links may lead back up; each real folder is entered once on the way down.
    let real = folder.canonicalize().map_err(|source| read_error(folder, source))?;
    if !visited.insert(real.clone()) {
        return Ok(());
    }
    let mut entries = fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect::<io::Result<Vec<_>>>())
        .map_err(|source| read_error(folder, source))?;
    entries.sort();
    for path in entries {
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        if path.is_dir() {
            walk(&path, visited, found)?;
        } else if Kind::of(&path).is_some() {
            found.push(path);
        }
    }
    visited.remove(&real);
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    JsonLines,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    None,
    Gzip,
    Zstd,
    Xz,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    format: Format,
    packing: Packing,
}

impl Kind {
    /// What a file holds by its name, or `None` when the name does not say.
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_string_lossy().to_ascii_lowercase();
        let (stem, packing) = match name.rsplit_once('.')? {
            (stem, "gz") => (stem, Packing::Gzip),
            (stem, "zst") => (stem, Packing::Zstd),
            (stem, "xz") => (stem, Packing::Xz),
            _ => (name.as_str(), Packing::None),
        };
        let format = match stem.rsplit_once('.')?.1 {
            "txt" => Format::Text,
            "jsonl" => Format::JsonLines,
            _ => return None,
        };
        Some(Self { format, packing })
    }
}

fn read_file<'a, R: BufRead + 'a>(
    path: &Path,
    kind: Kind,
    reader: R,
    field: &str,
    documents: &mut Vec<Document>,
) -> Result<(), DataError> {
    let mut reader = unpack(kind.packing, reader).map_err(|source| read_error(path, source))?;
    match kind.format {
        Format::Text => {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).map_err(|source| read_error(path, source))?;
            if !bytes.is_empty() {
                documents.push(Document { name: path.display().to_string(), bytes });
            }
            Ok(())
        }
        Format::JsonLines => json_lines(path, reader.as_mut(), field, documents),
    }
}

/// A reader of what is inside; archives of several members one after another are read to the end.
fn unpack<'a, R: BufRead + 'a>(packing: Packing, reader: R) -> io::Result<Box<dyn BufRead + 'a>> {
    Ok(match packing {
        Packing::None => Box::new(reader),
        Packing::Gzip => Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(reader))),
        Packing::Zstd => Box::new(BufReader::new(zstd::Decoder::with_buffer(reader)?)),
        Packing::Xz => Box::new(BufReader::new(liblzma::bufread::XzDecoder::new_multi_decoder(reader))),
    })
}

fn json_lines(
    path: &Path,
    reader: &mut dyn BufRead,
    field: &str,
    documents: &mut Vec<Document>,
) -> Result<(), DataError> {
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        if reader.read_until(b'\n', &mut bytes).map_err(|source| read_error(path, source))? == 0 {
            break;
        }
        let mut content = bytes.as_slice();
        if line == 1 {
            content = content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content);
        }
        if content.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let invalid = |reason: String| DataError::Json { path: path.to_path_buf(), line, reason };
        let value: Value = serde_json::from_slice(content).map_err(|error| {
            // The reader's own line number counts within the line; only the column says something.
            let text = error.to_string();
            let reason = text.split(" at line ").next().unwrap_or(&text);
            invalid(format!("\"{reason}\" at column {}", error.column()))
        })?;
        let Value::Object(mut object) = value else {
            return Err(invalid(kind_name(&value).to_owned()));
        };
        match object.remove(field) {
            Some(Value::String(text)) if text.is_empty() => {}
            Some(Value::String(text)) => {
                documents.push(Document { name: format!("{}:{line}", path.display()), bytes: text.into_bytes() });
            }
            Some(other) => {
                return Err(DataError::FieldKind {
                    path: path.to_path_buf(),
                    line,
                    field: field.to_owned(),
                    found: kind_name(&other),
                });
            }
            None => {
                let mut found: Vec<_> = object.keys().take(8).map(|key| format!("\"{key}\"")).collect();
                if object.is_empty() {
                    found.push("none at all".to_owned());
                }
                return Err(DataError::Field {
                    path: path.to_path_buf(),
                    line,
                    field: field.to_owned(),
                    found: found.join(", "),
                });
            }
        }
    }
    Ok(())
}

fn kind_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn read_error(path: &Path, source: io::Error) -> DataError {
    DataError::Read { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests;
