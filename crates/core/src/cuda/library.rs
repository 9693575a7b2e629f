//! Finding NVIDIA's libraries at run time: where the system looks, and where pip and conda put them.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::error::Error;

/// A library that is loaded when it is first needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// The driver, which comes with the GPU's kernel module.
    Driver,
    /// The run-time compiler.
    Nvrtc,
    /// Matrix products.
    CublasLt,
    /// Communication between GPUs.
    Nccl,
}

impl Library {
    /// File names, newest first.
    fn names(self) -> &'static [&'static str] {
        match self {
            Library::Driver if cfg!(windows) => &["nvcuda.dll"],
            Library::Driver => &["libcuda.so.1", "libcuda.so"],
            Library::Nvrtc if cfg!(windows) => &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"],
            Library::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12"],
            Library::CublasLt if cfg!(windows) => &["cublasLt64_13.dll", "cublasLt64_12.dll"],
            Library::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12"],
            Library::Nccl => &["libnccl.so.2"],
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Library::Driver => "the NVIDIA driver, from your system's packages or nvidia.com",
            Library::Nvrtc => "NVIDIA's run-time compiler, from `pip install nvidia-cuda-nvrtc` or the CUDA toolkit",
            Library::CublasLt => "matrix products, from `pip install nvidia-cublas` or the CUDA toolkit",
            Library::Nccl => "sums over several GPUs, from `pip install nvidia-nccl-cu13`",
        }
    }

    /// The newest of the functions that are called, without which a library is too old: cudarc panics where one is missing.
    fn functions(self) -> &'static [&'static str] {
        match self {
            Library::Driver => &["cuLaunchKernelEx", "cuGraphInstantiateWithFlags"],
            Library::Nvrtc => &["nvrtcGetCUBIN"],
            Library::CublasLt => &["cublasLtMatmul", "cublasLtMatmulAlgoGetHeuristic"],
            // It is called without cudarc.
            Library::Nccl => &[],
        }
    }

    /// Whether cudarc finds it now. NCCL is called without cudarc, which does not know the file's name.
    fn is_found(self) -> bool {
        // SAFETY: looking a library up runs its initialisers only, and these are NVIDIA's.
        unsafe {
            match self {
                Library::Driver => cudarc::driver::sys::is_culib_present(),
                Library::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
                Library::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
                Library::Nccl => true,
            }
        }
    }

    /// Loads the library, so that cudarc, which asks the system's loader by name, finds it already there.
    ///
    /// # Errors
    /// [`Error::Cuda`] that says what is missing, how to get it and where was looked.
    pub fn load(self) -> Result<(), Error> {
        static LOADED: Mutex<Vec<Library>> = Mutex::new(Vec::new());
        let mut loaded = LOADED.lock().unwrap_or_else(|e| e.into_inner());
        if loaded.contains(&self) {
            return Ok(());
        }
        // The library stays loaded for the life of the process.
        std::mem::forget(self.find()?);
        loaded.push(self);
        Ok(())
    }

    /// NVRTC asks the system's loader for a second library of its own while it compiles. Where the loader does not know
    /// the folder, some versions fail then, unless that library is there already.
    fn load_companions(self, path: &Path) {
        let Some(folder) = path.parent().filter(|f| self == Library::Nvrtc && f.is_absolute()) else { return };
        for file in entries(folder) {
            if file.file_name().is_some_and(|n| n.to_string_lossy().starts_with("libnvrtc-builtins.so")) {
                // SAFETY: as in `is_found`.
                std::mem::forget(unsafe { libloading::Library::new(&file) });
            }
        }
    }

    /// Finds the library and loads it.
    ///
    /// # Errors
    /// As [`Library::load`].
    pub(super) fn find(self) -> Result<libloading::Library, Error> {
        let folders = folders();
        let open = |path: &Path| {
            self.load_companions(path);
            // SAFETY: as in `is_found`.
            let library = unsafe { libloading::Library::new(path) }.ok()?;
            // SAFETY: the functions are looked for, not called.
            let has = |name: &&str| unsafe { library.get::<fn()>(name.as_bytes()) }.is_ok();
            self.functions().iter().all(has).then_some(library)
        };
        let by_path = || {
            let mut paths = folders.iter().flat_map(|f| self.names().iter().map(move |n| f.join(n)));
            paths.find_map(|path| path.exists().then(|| open(&path)).flatten())
        };
        let by_name = || self.names().iter().find_map(|n| open(Path::new(n)));
        // A folder that was named comes first, then what the system finds, then folders that it does not know.
        let named = if std::env::var_os(FOLDER_VARIABLE).is_some() { by_path() } else { None };
        match named.or_else(by_name).or_else(by_path) {
            Some(library) if self.is_found() => Ok(library),
            _ => {
                let places: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
                let also = if places.is_empty() { String::new() } else { format!(" or in {}", places.join(", ")) };
                Err(Error::Cuda(format!(
                    "no {} that can be used ({}) was found where the system's loader looks{also}; {FOLDER_VARIABLE} \
                     names another folder",
                    self.names()[0],
                    self.describe(),
                )))
            }
        }
    }
}

/// Names a folder with NVIDIA's libraries, which is looked at first.
const FOLDER_VARIABLE: &str = "HOGNOSE_CUDA_LIBRARIES";

/// Folders that hold NVIDIA's libraries without the system's loader knowing of them.
fn folders() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::env::var_os(FOLDER_VARIABLE).iter().flat_map(std::env::split_paths).collect();
    let mut prefixes: Vec<PathBuf> =
        ["CONDA_PREFIX", "VIRTUAL_ENV"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    // The Python that a shell would start, and the user's own packages.
    for folder in std::env::var_os("PATH").iter().flat_map(std::env::split_paths) {
        if folder.join("python3").exists()
            && let Some(prefix) = folder.parent()
        {
            prefixes.push(prefix.to_path_buf());
        }
    }
    prefixes.extend(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local")));
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        found.extend(std::env::var_os(variable).map(|p| PathBuf::from(p).join("lib64")));
    }
    for prefix in &prefixes {
        found.push(prefix.join("lib"));
        for python in entries(&prefix.join("lib")) {
            for packages in ["site-packages", "dist-packages"] {
                // nvidia/cu13/lib, nvidia/cuda_nvrtc/lib, nvidia/cublas/lib, nvidia/nccl/lib
                found.extend(entries(&python.join(packages).join("nvidia")).into_iter().map(|p| p.join("lib")));
            }
        }
    }
    found.push(PathBuf::from("/usr/local/cuda/lib64"));
    let mut seen = Vec::new();
    for folder in found {
        let holds_some = entries(&folder).iter().any(|file| {
            let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            ["cuda", "nvrtc", "cublasLt", "nccl"].iter().any(|part| name.contains(part))
        });
        if holds_some && !seen.contains(&folder) {
            seen.push(folder);
        }
    }
    seen
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).map(|list| list.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    paths.sort();
    paths
}
