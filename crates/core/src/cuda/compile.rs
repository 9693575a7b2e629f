//! Kernels from source: the cubin in the cache folder, else NVRTC.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsString, c_char};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::sys as driver;
use cudarc::nvrtc::sys as nvrtc;

use super::library::Library;
use super::{check, cuda_error};
use crate::error::Error;

/// Put in front of every kernel.
pub(super) const PRELUDE: &str = include_str!("prelude.cu");

/// Lambdas with `auto` parameters count as host functions for NVRTC 13.0 unless all functions are the device's.
const OPTIONS: [&str; 3] = ["--std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v"];

/// The CUDA C++ of an op. Its kernels vary by macros that a launch defines.
#[derive(Debug)]
pub struct Program {
    /// Its name in messages.
    pub name: &'static str,
    /// Its source, without the prelude.
    pub source: &'static str,
}

/// A program with the macros that specialise it.
#[derive(Clone, Debug)]
pub struct Variant {
    /// What is compiled.
    pub program: &'static Program,
    /// Names and values of macros.
    pub defines: Vec<(&'static str, String)>,
}

impl Variant {
    /// What tells variants apart: the program and the values of its macros.
    pub fn key(&self) -> String {
        let mut key = self.program.name.to_string();
        for (name, value) in &self.defines {
            key.push_str(&format!(" {name}={value}"));
        }
        key
    }
}

/// What the compiler says of a variant beside its machine code.
#[derive(Debug)]
pub struct Compiled {
    /// Machine code.
    pub cubin: Vec<u8>,
    /// Messages, with registers and spills of each kernel.
    pub log: String,
}

/// Compiles a variant for an architecture like `sm_90`. Needs NVRTC but no GPU.
///
/// # Errors
/// NVRTC is missing or refuses the source; the message holds its log.
pub fn compile(variant: &Variant, arch: &str) -> Result<Compiled, Error> {
    Library::Nvrtc.load()?;
    let failed = |what: &str| Error::Cuda(format!("{}: {what}", variant.key()));
    // Macros come after the compiler's own header, whose template parameters have names like `T`, too.
    let defines: String = variant.defines.iter().map(|(name, value)| format!("#define {name} {value}\n")).collect();
    let Program { name, source } = variant.program;
    let source = CString::new(format!("{PRELUDE}\n{defines}#line 1 \"{name}/kernel.cu\"\n{source}"))
        .map_err(|_| failed("the source holds a zero byte"))?;
    let options: Result<Vec<CString>, _> =
        OPTIONS.iter().map(|o| (*o).into()).chain([format!("--gpu-architecture={arch}")]).map(CString::new).collect();
    let options = options.map_err(|_| failed("an option holds a zero byte"))?;
    let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
    // SAFETY: all pointers are valid for the calls, sizes are asked for before buffers are filled, and the program is
    // destroyed once.
    unsafe {
        let mut program = std::ptr::null_mut();
        let name =
            CString::new(format!("{}.cu", variant.program.name)).map_err(|_| failed("a name with a zero byte"))?;
        let created = nvrtc::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            name.as_ptr(),
            0,
            std::ptr::null(),
            std::ptr::null(),
        );
        if created != nvrtc::nvrtcResult::NVRTC_SUCCESS {
            return Err(failed("NVRTC could not start"));
        }
        let result = nvrtc::nvrtcCompileProgram(program, pointers.len() as i32, pointers.as_ptr());
        let mut size = 0;
        nvrtc::nvrtcGetProgramLogSize(program, &mut size);
        let mut log = vec![0u8; size.max(1)];
        nvrtc::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
        let log = CStr::from_bytes_until_nul(&log).map(|t| t.to_string_lossy().into_owned()).unwrap_or_default();
        let mut cubin = Vec::new();
        if result == nvrtc::nvrtcResult::NVRTC_SUCCESS {
            let mut size = 0;
            nvrtc::nvrtcGetCUBINSize(program, &mut size);
            cubin = vec![0u8; size];
            nvrtc::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast());
        }
        nvrtc::nvrtcDestroyProgram(&mut program);
        if cubin.is_empty() {
            return Err(failed(&format!("NVRTC: {result:?}\n{log}")));
        }
        Ok(Compiled { cubin, log })
    }
}

/// The folder that keeps compiled kernels: `HOGNOSE_CACHE`, else `hognose` in the user's cache folder, if there is one.
fn cache_folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = set("HOGNOSE_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("hognose")))
        .or_else(|| set("HOME").map(|p| p.join(".cache/hognose")))
        .or_else(|| set("LOCALAPPDATA").map(|p| p.join("hognose")))?;
    Some(base.join("kernels"))
}

/// The machine code of a variant, from the cache folder if it is there. Several processes may do this at once: a file
/// appears complete or not at all. A folder that cannot be written only costs time.
fn cubin(variant: &Variant, arch: &str, folder: Option<&Path>) -> Result<Vec<u8>, Error> {
    let compiler = {
        Library::Nvrtc.load()?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two integers to write to.
        unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) };
        format!("nvrtc {major}.{minor} {arch} {OPTIONS:?}")
    };
    let mut hasher = blake3::Hasher::new();
    for part in [PRELUDE, variant.program.source, &variant.key(), &compiler] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let name = format!("{}-{}.cubin", variant.program.name, &hasher.finalize().to_hex()[..32]);
    let file = folder.map(|f| f.join(name));
    // The last 32 bytes are a checksum, so that a damaged file is compiled anew.
    if let Some(bytes) = file.as_ref().and_then(|f| std::fs::read(f).ok())
        && let Some((code, sum)) = bytes.split_last_chunk::<32>()
        && blake3::hash(code).as_bytes() == sum
    {
        return Ok(code.to_vec());
    }
    let compiled = compile(variant, arch)?;
    if let Some(file) = file {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let unique = format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let partial = file.with_extension(unique);
        let mut bytes = compiled.cubin.clone();
        bytes.extend_from_slice(blake3::hash(&compiled.cubin).as_bytes());
        let made = file.parent().map_or(Ok(()), std::fs::create_dir_all);
        let written = made.and_then(|()| std::fs::write(&partial, bytes));
        if written.and_then(|()| std::fs::rename(&partial, &file)).is_err() {
            let _ = std::fs::remove_file(&partial);
        }
    }
    Ok(compiled.cubin)
}

/// The kernels that a context has loaded.
#[derive(Debug)]
pub(crate) struct Kernels {
    arch: String,
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<String, driver::CUmodule>,
    functions: HashMap<(String, &'static str), (driver::CUfunction, u32)>,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Loaded {}

impl Kernels {
    pub(super) fn new(arch: String) -> Kernels {
        Kernels { arch, loaded: Mutex::new(Loaded::default()) }
    }

    /// Compiles what is not loaded yet, on all cores, and loads it. The context must be current.
    pub(super) fn prepare(&self, variants: &HashMap<String, Variant>) -> Result<(), Error> {
        let mut loaded = self.loaded.lock().unwrap_or_else(|e| e.into_inner());
        let missing: Vec<(&String, &Variant)> =
            variants.iter().filter(|(k, _)| !loaded.modules.contains_key(*k)).collect();
        let folder = cache_folder(|name| std::env::var_os(name));
        let next = AtomicU64::new(0);
        let results = Mutex::new(Vec::new());
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(missing.len());
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some((key, variant)) = missing.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                        let result = cubin(variant, &self.arch, folder.as_deref());
                        results.lock().unwrap_or_else(|e| e.into_inner()).push(((*key).clone(), result));
                    }
                });
            }
        });
        for (key, result) in results.into_inner().unwrap_or_else(|e| e.into_inner()) {
            let image = result?;
            let mut module = std::ptr::null_mut();
            // SAFETY: the image is a cubin with its size inside.
            let what = "loading a kernel, which a driver older than NVRTC may refuse";
            check(what, unsafe { driver::cuModuleLoadData(&mut module, image.as_ptr().cast()) })?;
            loaded.modules.insert(key, module);
        }
        Ok(())
    }

    /// A kernel of a prepared variant, allowed to use `shared` bytes of dynamic shared memory.
    pub(super) fn function(&self, key: &str, entry: &'static str, shared: u32) -> Result<driver::CUfunction, Error> {
        let mut guard = self.loaded.lock().unwrap_or_else(|e| e.into_inner());
        let loaded = &mut *guard;
        let module = *loaded.modules.get(key).ok_or_else(|| cuda_error(format!("{key} was not compiled")))?;
        let known = (key.to_string(), entry);
        if !loaded.functions.contains_key(&known) {
            let name = CString::new(entry).map_err(|_| cuda_error("a kernel's name holds a zero byte".into()))?;
            let mut function = std::ptr::null_mut();
            // SAFETY: the module is loaded and the name ends with a zero.
            check(entry, unsafe { driver::cuModuleGetFunction(&mut function, module, name.as_ptr()) })?;
            // What is allowed without asking is 48 KiB less the kernel's own `__shared__` variables.
            loaded.functions.insert(known.clone(), (function, 0));
        }
        let (function, allowed) = loaded.functions.get_mut(&known).ok_or_else(|| cuda_error(entry.into()))?;
        if shared > *allowed {
            let attribute = driver::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            check(entry, unsafe { driver::cuFuncSetAttribute(*function, attribute, shared as i32) })?;
            *allowed = shared;
        }
        Ok(*function)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static PROGRAM: Program =
        Program { name: "compile_test", source: "KERNEL set_one(float* out) { out[threadIdx.x] = VALUE; }" };

    fn variant(value: &str) -> Variant {
        Variant { program: &PROGRAM, defines: vec![("VALUE", value.into())] }
    }

    /// Whether NVRTC is here; CI sees to it.
    fn nvrtc_is_there() -> bool {
        let found = Library::Nvrtc.load();
        assert!(found.is_ok() || std::env::var_os("HOGNOSE_TEST_NVRTC").is_none(), "{found:?}");
        found.is_ok()
    }

    /// A folder of this test's own.
    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("hognose-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        folder
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn the_cache_folder_is_the_users() {
        let folder = |set: &'static [(&str, &str)]| {
            let value = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into());
            cache_folder(value).map(|p| p.to_string_lossy().into_owned())
        };
        assert_eq!(folder(&[]), None);
        assert_eq!(folder(&[("HOME", "")]), None);
        assert_eq!(folder(&[("HOME", "/h")]).as_deref(), Some("/h/.cache/hognose/kernels"));
        assert_eq!(folder(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]).as_deref(), Some("/c/hognose/kernels"));
        assert_eq!(folder(&[("HOME", "/h"), ("HOGNOSE_CACHE", "/own")]).as_deref(), Some("/own/kernels"));
    }

    #[test]
    fn damaged_files_are_made_anew_and_whole_ones_are_read() {
        if !nvrtc_is_there() {
            return;
        }
        let folder = folder("damaged");
        let get = || cubin(&variant("1.0f"), "sm_90", Some(&folder)).unwrap();
        let code = get();
        let [file] = &files(&folder)[..] else { panic!("one file: {:?}", files(&folder)) };
        let whole = std::fs::read(file).unwrap();
        assert_eq!(whole[..code.len()], code);
        let mut flipped = whole.clone();
        flipped[code.len() / 2] ^= 1;
        for damaged in [&[][..], &whole[..10], &whole[..whole.len() - 1], &flipped] {
            std::fs::write(file, damaged).unwrap();
            assert_eq!(get(), code);
            assert_eq!(std::fs::read(file).unwrap(), whole);
        }
        let other = [b"other".as_slice(), blake3::hash(b"other").as_bytes()].concat();
        std::fs::write(file, other).unwrap();
        assert_eq!(get(), b"other", "it was compiled, not read");
        assert_ne!(cubin(&variant("2.0f"), "sm_90", Some(&folder)).unwrap(), b"other");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn kernels_compile_without_a_cache_folder() {
        if !nvrtc_is_there() {
            return;
        }
        let folder = folder("no-folder");
        std::fs::write(&folder, "a file where the folder should be").unwrap();
        let code = cubin(&variant("1.0f"), "sm_90", None).unwrap();
        assert_eq!(cubin(&variant("1.0f"), "sm_90", Some(&folder)).unwrap(), code);
        assert_eq!(cubin(&variant("1.0f"), "sm_90", Some(&folder.join("below"))).unwrap(), code);
        std::fs::remove_file(&folder).unwrap();
    }

    #[test]
    fn many_fill_the_cache_at_once() {
        if !nvrtc_is_there() {
            return;
        }
        let folder = folder("together");
        let results: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let one = || cubin(&variant("1.0f"), "sm_90", Some(&folder)).unwrap();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(results.iter().all(|code| *code == results[0]));
        let files = files(&folder);
        assert!(files.len() == 1 && files[0].extension().is_some_and(|e| e == "cubin"), "{files:?}");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_does_not_compile_says_where() {
        if !nvrtc_is_there() {
            return;
        }
        let message = |value, arch| compile(&variant(value), arch).unwrap_err().to_string();
        let error = message("nonsense", "sm_90");
        assert!(error.contains("compile_test VALUE=nonsense") && error.contains("kernel.cu(1)"), "{error}");
        assert!(message("1.0f", "sm_1").contains("gpu-architecture"));
        assert!(message("1\0", "sm_90").contains("zero byte"));
    }
}
