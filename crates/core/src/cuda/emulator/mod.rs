//! Kernels run on the CPU, for tests: the system's C++ compiler makes a library of each variant, with `emulator.h` in
//! the place of what only a GPU has. Slow, but it needs no GPU and finds what a GPU hides: see `emulator.h`.

#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::blas::Product;
use super::compile::{PRELUDE, Program, Variant};
use super::cuda_error;
use super::launch::{Arg, Kernel, Parameters};
use crate::error::Error;
use crate::graph::Mat;

const HEADER: &str = include_str!("emulator.h");

/// Every check that is cheap. Operations are rounded one by one, as nothing is fused on the CPU. A fortified `longjmp`,
/// which some systems' compilers choose by themselves, refuses to go from one fiber to another.
const OPTIONS: [&str; 11] = [
    "-U_FORTIFY_SOURCE",
    "-std=c++17",
    "-O1",
    "-w",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fsanitize=alignment,bounds,null",
    "-DFAKE_CUDA",
];

/// Bytes of a thread's stack, which holds what a GPU has in registers.
const STACK: usize = 256 << 10;
const MOST_THREADS: usize = 1024;

/// The structure of the same name in `emulator.h`.
#[repr(C)]
struct Launch {
    grid: [u32; 3],
    threads: u32,
    reversed: u32,
    args: u32,
    arg: *const *mut c_void,
    kinds: *const c_char,
    bytes: *const u64,
    shared: *mut u8,
    shared_bytes: u64,
    shared_most: u64,
    stacks: *mut u8,
    stack_bytes: u64,
    fault: extern "C" fn(c_int),
    error: [c_char; 1024],
}

/// A compiled variant. Its variables are those of one launch, so there is one at a time.
struct Loaded(Mutex<libloading::Library>);

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

static LOADED: Mutex<Option<HashMap<String, Arc<Loaded>>>> = Mutex::new(None);

/// Compiles what was not compiled before, on all cores.
pub(super) fn prepare(variants: &HashMap<String, Variant>) -> Result<(), Error> {
    let missing: Vec<(&String, &Variant)> = {
        let mut guard = lock(&LOADED);
        let loaded = guard.get_or_insert_default();
        variants.iter().filter(|(key, _)| !loaded.contains_key(*key)).collect()
    };
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..missing.len().min(std::thread::available_parallelism().map_or(1, |n| n.get())) {
            scope.spawn(|| {
                while let Some((key, variant)) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                    lock(&results).push(((*key).clone(), load(variant)));
                }
            });
        }
    });
    for (key, result) in results.into_inner().unwrap_or_else(PoisonError::into_inner) {
        // Another test may have been faster. Its lock is the one that counts: a library is loaded once.
        let new = Arc::new(Loaded(Mutex::new(result?)));
        lock(&LOADED).get_or_insert_default().entry(key).or_insert(new);
    }
    Ok(())
}

/// Behind the source, an adapter for each kernel that the macros leave in it: lines that begin with KERNEL.
fn source(variant: &Variant) -> String {
    let Program { name, source } = variant.program;
    let mut text = format!("namespace {{\n#line 1 \"prelude.cu\"\n{PRELUDE}\n");
    for (name, value) in &variant.defines {
        text.push_str(&format!("#define {name} {value}\n"));
    }
    text.push_str(&format!("#line 1 \"{name}/kernel.cu\"\n"));
    let (mut entries, mut line, mut rest) = (String::new(), 1, *source);
    while let Some(at) = rest.find("\nKERNEL ") {
        let (before, kernel) = rest.split_at(at + 1);
        let (bounds, entry) = head(kernel);
        line += before.matches('\n').count();
        text.push_str(&format!("{before}#define EMULATED_{entry}\n#line {line} \"{name}/kernel.cu\"\nKERNEL "));
        entries.push_str(&format!("#ifdef EMULATED_{entry}\nEMULATED_ENTRY({entry}, {bounds})\n#endif\n"));
        rest = &kernel["KERNEL ".len()..];
    }
    text.push_str(rest);
    text + "}\n" + &entries
}

/// Launch bounds and name in `KERNEL name(…)` or `KERNEL __launch_bounds__(bounds) name(…)`.
fn head(kernel: &str) -> (&str, &str) {
    let kernel = kernel["KERNEL ".len()..].trim_start();
    let (bounds, rest) = match kernel.strip_prefix("__launch_bounds__(") {
        Some(rest) => {
            let mut depth = 1;
            let end = rest.find(|c| {
                depth += i32::from(c == '(') - i32::from(c == ')');
                depth == 0
            });
            rest.split_at(end.unwrap_or(0))
        }
        None => ("1024", kernel),
    };
    (bounds, rest.trim_start_matches(')').split('(').next().unwrap_or_default().trim())
}

/// The library of a variant. It stays in a folder beside the test's program, under the hash of all it is made from.
fn load(variant: &Variant) -> Result<libloading::Library, Error> {
    let failed = |what: &str, why: String| cuda_error(format!("{}: {what}: {why}", variant.key()));
    let text = source(variant);
    let mut hasher = blake3::Hasher::new();
    for part in [HEADER, &text].into_iter().chain(OPTIONS) {
        hasher.update(part.as_bytes());
    }
    let folder: PathBuf = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join("emulated")))
        .unwrap_or_else(|| std::env::temp_dir().join("hognose-emulated"));
    let name = format!("{}-{}", variant.program.name, &hasher.finalize().to_hex()[..32]);
    let library = folder.join(format!("{name}.so"));
    if !library.exists() {
        // Several tests and processes may do this at once: a library appears complete or not at all.
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let file = |end: &str| folder.join(format!("{name}-{}-{number}.{end}", std::process::id()));
        let (header, main, made) = (file("h"), file("cpp"), file("so"));
        let write = || {
            std::fs::create_dir_all(&folder)?;
            std::fs::write(&header, HEADER)?;
            std::fs::write(&main, &text)
        };
        write().map_err(|e| failed("writing its source", e.to_string()))?;
        let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
        let output =
            Command::new(&compiler).args(OPTIONS).arg("-include").args([&header, &main]).arg("-o").arg(&made).output();
        let output = output.map_err(|e| failed(&compiler.to_string_lossy(), e.to_string()))?;
        if !output.status.success() {
            let log = String::from_utf8_lossy(&output.stderr);
            return Err(failed(
                &format!("{} refuses {}", compiler.to_string_lossy(), main.display()),
                log.into_owned(),
            ));
        }
        std::fs::rename(&made, &library).map_err(|e| failed("keeping its library", e.to_string()))?;
        let _ = (std::fs::remove_file(&header), std::fs::remove_file(&main));
    }
    // SAFETY: the library was compiled from our source and runs nothing when it is loaded.
    unsafe { libloading::Library::new(&library) }.map_err(|e| failed("loading it", e.to_string()))
}

thread_local! {
    /// Memory for the stacks of a block's threads; what is not touched costs nothing.
    static STACKS: RefCell<Vec<u64>> = RefCell::new(vec![0; MOST_THREADS * STACK / 8]);
    /// The kernel that runs, for messages of the last moment.
    static RUNNING: Cell<*const c_char> = const { Cell::new(std::ptr::null()) };
}

/// Runs a kernel's blocks one after another, the last one first if `reversed`.
pub(super) fn launch(kernel: &Kernel, shared_most: u32, reversed: bool) -> Result<(), Error> {
    let key = kernel.variant.key();
    let name = format!("{key}, {}", kernel.entry);
    let loaded = lock(&LOADED).get_or_insert_default().get(&key).cloned();
    let loaded = loaded.ok_or_else(|| cuda_error(format!("{name}: was not collected before it is launched")))?;
    let library = lock(&loaded.0);
    // SAFETY: every `emulated_` function has this type.
    let entry =
        unsafe { library.get::<unsafe extern "C" fn(*mut Launch)>(format!("emulated_{}", kernel.entry).as_bytes()) };
    let entry = entry.map_err(|_| cuda_error(format!("{name}: there is no such kernel")))?;
    let kinds = kernel.args.iter().map(|arg| match arg {
        Arg::Mat(..) => ('m', 16),
        Arg::Ptr(_) => ('p', 8),
        Arg::I32(_) => ('i', 4),
        Arg::I64(_) => ('l', 8),
        Arg::F32(_) => ('f', 4),
        Arg::Table(table) => ('t', 8 * table.len() as u64),
    });
    let (kinds, bytes): (String, Vec<u64>) = kinds.unzip();
    let kinds = CString::new(kinds).map_err(|e| cuda_error(e.to_string()))?;
    let mut parameters = Parameters::new(&kernel.args);
    // Aligned as the kernels may expect, and as a GPU has it.
    let mut shared = vec![0u8; kernel.shared + 1024];
    let padding = shared.as_ptr().align_offset(1024);
    let message = STACKS.with_borrow_mut(|stacks| {
        let mut launch = Launch {
            grid: kernel.grid.map(|n| n as u32),
            threads: kernel.threads,
            reversed: u32::from(reversed),
            args: kernel.args.len() as u32,
            arg: parameters.addresses().as_ptr(),
            kinds: kinds.as_ptr(),
            bytes: bytes.as_ptr(),
            shared: shared[padding..].as_mut_ptr(),
            shared_bytes: kernel.shared as u64,
            shared_most: u64::from(shared_most),
            stacks: stacks.as_mut_ptr().cast(),
            stack_bytes: STACK as u64,
            fault: report_fault,
            error: [0; 1024],
        };
        let running = CString::new(name.clone()).unwrap_or_default();
        RUNNING.set(running.as_ptr());
        // SAFETY: the structure is the one that the function expects, everything in it outlives the call, and the
        // operands are memory of the plan that is being run.
        unsafe { entry(&mut launch) };
        RUNNING.set(std::ptr::null());
        // SAFETY: the message ends with a zero, as the array did before.
        unsafe { CStr::from_ptr(launch.error.as_ptr()) }.to_string_lossy().into_owned()
    });
    if message.is_empty() { Ok(()) } else { Err(cuda_error(format!("{name}: {message}"))) }
}

/// Names the kernel that touches memory which is not there, before the process ends.
extern "C" fn report_fault(_: c_int) {
    unsafe extern "C" {
        fn write(file: c_int, text: *const c_void, bytes: usize) -> isize;
        fn strlen(text: *const c_char) -> usize;
        fn _exit(code: c_int) -> !;
    }
    let running = RUNNING.get();
    // SAFETY: functions of the C library that a handler may call; the text is alive while its kernel runs.
    unsafe {
        if !running.is_null() {
            let text = c"\nthis kernel touches memory that is not there, or needs more stack: ";
            write(2, text.as_ptr().cast(), text.count_bytes());
            write(2, running.cast(), strlen(running));
            write(2, c"\n".as_ptr().cast(), 1);
        }
        _exit(139);
    }
}

pub(super) fn zero(address: u64, bytes: usize) {
    // SAFETY: memory of the plan that is being run.
    unsafe { (address as *mut u8).write_bytes(0, bytes) }
}

/// A matrix product in f64.
pub(super) fn product(p: &Product) {
    use crate::dtype::DType;
    let read = |m: &Mat, row: usize, col: usize| -> f64 {
        // SAFETY: operands of a plan that is being run; row and col lie inside.
        unsafe {
            match m.dtype {
                DType::BF16 => m.at::<half::bf16>(row, col).read().to_f64(),
                _ => f64::from(m.at::<f32>(row, col).read()),
            }
        }
    };
    let (m, n) = (p.out.rows, p.out.cols);
    let k = if p.a_transposed { p.a.rows } else { p.a.cols };
    let (rows, cols) = if p.a_transposed { (k, m) } else { (m, k) };
    assert_eq!((p.a.rows, p.a.cols), (rows, cols), "the left operand of a product of {m} x {k} x {n}");
    let (rows, cols) = if p.b_transposed { (n, k) } else { (k, n) };
    assert_eq!((p.b.rows, p.b.cols), (rows, cols), "the right operand of a product of {m} x {k} x {n}");
    let a = |i: usize, j: usize| if p.a_transposed { read(&p.a, j, i) } else { read(&p.a, i, j) };
    let b: Vec<f64> =
        (0..k * n).map(|i| if p.b_transposed { read(&p.b, i % n, i / n) } else { read(&p.b, i / n, i % n) }).collect();
    for i in 0..m {
        let mut sums: Vec<f64> = (0..n)
            .map(|j| p.bias.map_or(0.0, |b| read(&b, 0, j)) + p.start.map_or(0.0, |start| read(&start, i, j)))
            .collect();
        for (l, row) in b.chunks_exact(n.max(1)).enumerate() {
            let factor = a(i, l);
            sums.iter_mut().zip(row).for_each(|(sum, b)| *sum += factor * b);
        }
        for (j, sum) in sums.into_iter().enumerate() {
            // SAFETY: as above; nobody else touches the output.
            unsafe {
                match p.out.dtype {
                    DType::BF16 => p.out.at::<half::bf16>(i, j).write(half::bf16::from_f32(sum as f32)),
                    _ => p.out.at::<f32>(i, j).write(sum as f32),
                }
            }
        }
    }
}
