//! Files that are either the old one or the new one, never half of it.
//!
//! A file is written under a temporary name in the same folder, flushed to the disk and then renamed; the folder is
//! flushed too, so that the rename survives a power failure. If anything fails on the way, such as a full disk, the
//! temporary file is removed and the old file is as it was.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// What can go wrong while saving. The previous file or folder of that name is untouched in every case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The operating system refused.
    #[error("cannot save {path}: {source}; what was there before is unchanged")]
    Io { path: PathBuf, source: io::Error },
    /// The path has no file name or no folder.
    #[error("cannot save {0}: expected the path of a file inside a folder")]
    Path(PathBuf),
    /// The destination exists.
    #[error("cannot save {0}: it exists already; choose another name or remove it")]
    Exists(PathBuf),
}

impl SaveError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }
}

/// Replaces a file by these bytes.
///
/// # Errors
/// [`SaveError`]; the old file is then unchanged.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), SaveError> {
    write_with(path, |file| file.write_all(bytes))
}

/// Replaces a file by what `fill` writes, through a buffer.
///
/// # Errors
/// [`SaveError`], also when `fill` fails; the old file is then unchanged.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), SaveError> {
    let (folder, temporary) = neighbour(path)?;
    let guard = Temporary(&temporary);
    (|| {
        let file = File::create(&temporary)?;
        let mut buffer = BufWriter::with_capacity(1 << 20, file);
        fill(&mut buffer)?;
        let file = buffer.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_folder(&folder)
    })()
    .map_err(SaveError::io(path))?;
    drop(guard);
    Ok(())
}

/// Makes a folder whose files are all there or not at all: `fill` writes them into a temporary folder, which is
/// flushed and then renamed.
///
/// # Errors
/// [`SaveError::Exists`] if there is anything at `path`, [`SaveError::Io`] if `fill`
/// or the disk fails. No folder is left behind then.
pub fn write_folder<E>(path: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E>
where
    E: From<SaveError>,
{
    let (folder, temporary) = neighbour(path)?;
    if path.symlink_metadata().is_ok() {
        return Err(SaveError::Exists(path.to_path_buf()).into());
    }
    let guard = Temporary(&temporary);
    // A temporary folder may be left from a process that was killed; its name is ours to use.
    remove(&temporary);
    fs::create_dir(&temporary).map_err(SaveError::io(path))?;
    fill(&temporary)?;
    (|| {
        sync_tree(&temporary)?;
        fs::rename(&temporary, path)?;
        sync_folder(&folder)
    })()
    .map_err(SaveError::io(path))?;
    drop(guard);
    Ok(())
}

/// Points the symbolic link `link` to `target` (relative to the link's folder), replacing the link in one step.
///
/// # Errors
/// [`SaveError::Exists`] if there is something other than a symbolic link, [`SaveError::Io`] if the disk or the
/// system refuses. The old link is then unchanged.
pub fn point(link: &Path, target: &Path) -> Result<(), SaveError> {
    if link.symlink_metadata().is_ok_and(|found| !found.file_type().is_symlink()) {
        return Err(SaveError::Exists(link.to_path_buf()));
    }
    let (folder, temporary) = neighbour(link)?;
    let guard = Temporary(&temporary);
    remove(&temporary);
    (|| {
        symlink(target, &temporary)?;
        fs::rename(&temporary, link)?;
        sync_folder(&folder)
    })()
    .map_err(SaveError::io(link))?;
    drop(guard);
    Ok(())
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_target: &Path, _link: &Path) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "symbolic links are only made on Unix"))
}

/// Removes what it names when it goes; a renamed one is no longer there.
struct Temporary<'a>(&'a Path);

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        remove(self.0);
    }
}

/// Removes a file or folder. That it may not exist is expected, and any other failure shows in the next use.
fn remove(path: &Path) {
    let _ = match path.symlink_metadata() {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    };
}

/// The folder of `path`, and a temporary name in it. Within a process and across processes names do not meet.
fn neighbour(path: &Path) -> Result<(PathBuf, PathBuf), SaveError> {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| SaveError::Path(path.to_path_buf()))?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    Ok((folder.clone(), folder.join(temporary)))
}

/// Flushes every file and folder in and below a folder.
fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_folder(folder)
}

/// Flushes the entries of a folder. Only Unix opens folders; elsewhere the rename itself has to do.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn names(folder: &TempDir) -> Vec<String> {
        let entries = fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_a_file_and_leaves_nothing_else() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("a");
        write(&path, b"old, and longer").unwrap();
        write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(&folder), ["a"]);
    }

    #[test]
    fn a_failing_writer_leaves_the_old_file() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("a");
        write(&path, b"old").unwrap();
        let error = write_with(&path, |file| {
            file.write_all(&vec![0; 3 << 20])?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        });
        let message = error.unwrap_err().to_string();
        assert!(message.contains("cannot save") && message.contains("unchanged"), "{message}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(&folder), ["a"]);
    }

    /// `/dev/full` fails each write with "no space left on device", as a full disk does.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_device_leaves_the_old_file() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("a");
        write(&path, b"old").unwrap();
        let mut full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = write_with(&path, |_| full.write_all(b"new"));
        assert!(matches!(error, Err(SaveError::Io { source, .. }) if source.kind() == io::ErrorKind::StorageFull));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(&folder), ["a"]);
    }

    #[test]
    fn a_missing_folder_and_a_path_without_name_are_errors() {
        let folder = TempDir::new().unwrap();
        assert!(matches!(write(&folder.path().join("no/a"), b""), Err(SaveError::Io { .. })));
        assert!(matches!(write(Path::new("/"), b""), Err(SaveError::Path(_))));
        assert!(matches!(write(Path::new(".."), b""), Err(SaveError::Path(_))));
    }

    #[test]
    fn a_folder_is_there_whole_or_not_at_all() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("step-1");
        let fill = |path: &Path| {
            fs::create_dir(path.join("sub")).unwrap();
            write(&path.join("sub/a"), b"a")
        };
        let failed: Result<(), SaveError> = write_folder(&path, |temporary| {
            fill(temporary)?;
            write(Path::new("/"), b"")
        });
        assert!(failed.is_err() && names(&folder).is_empty());
        write_folder(&path, fill).unwrap();
        assert_eq!(fs::read(path.join("sub/a")).unwrap(), b"a");
        assert!(matches!(write_folder(&path, fill), Err(SaveError::Exists(_))));
        assert_eq!(names(&folder), ["step-1"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_moved_in_one_step() {
        let folder = TempDir::new().unwrap();
        let link = folder.path().join("latest");
        for target in ["step-1", "step-2"] {
            fs::create_dir(folder.path().join(target)).unwrap();
            point(&link, Path::new(target)).unwrap();
            assert_eq!(fs::read_link(&link).unwrap(), Path::new(target));
        }
        write(&folder.path().join("file"), b"").unwrap();
        assert!(matches!(point(&folder.path().join("file"), Path::new("step-1")), Err(SaveError::Exists(_))));
        assert_eq!(names(&folder), ["file", "latest", "step-1", "step-2"]);
    }
}
