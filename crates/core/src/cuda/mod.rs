//! NVIDIA GPUs: the driver found at run time, memory, copies, and everything that a plan needs to run there.
//!
//! All work of a [`Cuda`] goes through one stream, so what is enqueued later sees what was enqueued before; sums over
//! several GPUs alone run beside it inside of a plan. Nothing waits for the GPU but reads. While one thread captures a
//! plan no other may touch the stream, so threads take turns.

pub mod blas;
mod ceiling;
pub mod compile;
#[cfg(test)]
mod emulator;
pub mod launch;
pub mod library;
pub mod nccl;
pub mod replay;

use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use crate::error::Error;
use blas::Blas;
use compile::Kernels;
use library::Library;
use nccl::SideStream;

pub use compile::{Program, Variant};
pub use launch::{Arg, Kernel, Launcher};

/// Bytes of page-locked memory through which small copies go, in two halves.
const STAGING: usize = 8 << 20;

/// What kernels are fitted to.
#[derive(Clone, Debug, PartialEq)]
pub struct Properties {
    /// The device's name.
    pub name: String,
    /// Compute capability.
    pub arch: (u32, u32),
    /// Multiprocessors.
    pub sms: u32,
    /// Bytes of shared memory that a block may have.
    pub shared: u32,
    /// Bytes of the level-2 cache.
    pub l2: usize,
    /// Bytes of device memory.
    pub memory: u64,
}

impl Properties {
    /// What a GPU that is not here would have: to compile for it.
    pub fn of_arch(arch: (u32, u32)) -> Properties {
        let shared = match arch {
            (8, 0) => 163 << 10,
            (9 | 10 | 11, _) => 227 << 10,
            _ => 99 << 10,
        };
        Properties { name: format!("sm_{}{}", arch.0, arch.1), arch, sms: 132, shared, l2: 50 << 20, memory: 80 << 30 }
    }

    /// Blocks that fill the chip `per_sm` times over.
    pub fn blocks(&self, per_sm: u32) -> u32 {
        self.sms * per_sm
    }
}

/// One GPU with its stream, its kernels and the library of matrix products.
#[derive(Debug)]
pub struct Cuda {
    ordinal: usize,
    properties: Properties,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Made when several GPUs sum for the first time.
    side: OnceLock<SideStream>,
    kernels: Kernels,
    blas: Blas,
    staging: Mutex<Staging>,
    /// Held by whoever uses the stream.
    turn: Mutex<()>,
    /// The first error of a call that could not return one.
    fault: Mutex<Option<String>>,
}

// SAFETY: the driver's handles may be used from any thread once the context is current there, which every call sees to.
unsafe impl Send for Cuda {}
// SAFETY: as above; what changes is behind a Mutex.
unsafe impl Sync for Cuda {}

/// Page-locked memory for copies to the device that need not wait: two halves, used in turn.
#[derive(Debug)]
struct Staging {
    memory: *mut u8,
    half: usize,
    used: usize,
    /// Recorded when a half was left: copies from it are done once the event is.
    done: [sys::CUevent; 2],
}

/// An error of the driver as ours.
pub(crate) fn check(what: &str, result: sys::CUresult) -> Result<(), Error> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: the driver writes a pointer to a constant text.
    let known = unsafe { sys::cuGetErrorString(result, &mut text) } == sys::CUresult::CUDA_SUCCESS && !text.is_null();
    // SAFETY: the text ends with a zero.
    let text =
        if known { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() } else { format!("{result:?}") };
    Err(cuda_error(format!("{what}: {text}")))
}

pub(crate) fn cuda_error(message: String) -> Error {
    Error::Cuda(message)
}

impl Cuda {
    /// Number of GPUs, 0 without a driver.
    pub fn count() -> usize {
        let mut count = 0;
        // SAFETY: the driver is loaded before it is called.
        let found = Library::Driver.load().is_ok()
            && unsafe { sys::cuInit(0) } == sys::CUresult::CUDA_SUCCESS
            && unsafe { sys::cuDeviceGetCount(&mut count) } == sys::CUresult::CUDA_SUCCESS;
        if found { count.max(0) as usize } else { 0 }
    }

    /// Opens GPU number `ordinal`.
    ///
    /// # Errors
    /// A missing library, no such GPU, or what the driver refuses: [`Error::Cuda`] with a sentence.
    pub fn open(ordinal: usize) -> Result<Cuda, Error> {
        Library::Driver.load()?;
        Library::Nvrtc.load()?;
        Library::CublasLt.load()?;
        // SAFETY: the libraries are loaded, every pointer is valid, and handles are used only if their making succeeded.
        unsafe {
            check("starting CUDA", sys::cuInit(0))?;
            let mut count = 0;
            check("counting GPUs", sys::cuDeviceGetCount(&mut count))?;
            if ordinal >= count.max(0) as usize {
                return Err(cuda_error(format!(
                    "there is no GPU number {ordinal}; this machine has {count}, counted from 0"
                )));
            }
            let mut device = 0;
            check("opening the GPU", sys::cuDeviceGet(&mut device, ordinal as i32))?;
            let attribute = |attribute| {
                let mut value = 0;
                check("asking the GPU", sys::cuDeviceGetAttribute(&mut value, attribute, device)).map(|()| value as u32)
            };
            let mut name = [0 as std::ffi::c_char; 128];
            check("asking the GPU's name", sys::cuDeviceGetName(name.as_mut_ptr(), 127, device))?;
            let mut memory = 0;
            check("asking the GPU's memory", sys::cuDeviceTotalMem_v2(&mut memory, device))?;
            let properties = Properties {
                name: CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned(),
                arch: (
                    attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                    attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
                ),
                sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
                shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
                l2: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
                memory: memory as u64,
            };
            if properties.arch < (8, 0) {
                return Err(cuda_error(format!(
                    "{} has compute capability {}.{}; hognose needs 8.0 (Ampere) or newer",
                    properties.name, properties.arch.0, properties.arch.1
                )));
            }
            let mut context = std::ptr::null_mut();
            check("making a context", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            check("making a context current", sys::cuCtxSetCurrent(context))?;
            let mut stream = std::ptr::null_mut();
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            check("making a stream", sys::cuStreamCreate(&mut stream, flags))?;
            let mut staging = std::ptr::null_mut();
            check("page-locking memory", sys::cuMemAllocHost_v2(&mut staging, STAGING))?;
            let mut done = [std::ptr::null_mut(); 2];
            for event in &mut done {
                let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                check("making an event", sys::cuEventCreate(event, flags))?;
            }
            let kernels = Kernels::new(format!("sm_{}{}", properties.arch.0, properties.arch.1));
            let staging = Mutex::new(Staging { memory: staging.cast(), half: 0, used: 0, done });
            let blas = Blas::new()?;
            let (side, turn, fault) = (OnceLock::new(), Mutex::new(()), Mutex::new(None));
            Ok(Cuda { ordinal, properties, context, stream, side, kernels, blas, staging, turn, fault })
        }
    }

    /// Which GPU it is, counted from 0.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// What kernels are fitted to.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// The stream that all work goes through.
    pub fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// The stream beside it.
    fn side(&self) -> Result<&SideStream, Error> {
        match self.side.get() {
            Some(side) => Ok(side),
            None => {
                let side = SideStream::new()?;
                Ok(self.side.get_or_init(|| side))
            }
        }
    }

    pub(crate) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    pub(crate) fn blas(&self) -> &Blas {
        &self.blas
    }

    /// Waits until no other thread uses the stream.
    pub(crate) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the context current in this thread.
    pub fn bind(&self) -> Result<(), Error> {
        // SAFETY: the context lives as long as the process.
        check("making a context current", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// Bytes of free device memory.
    pub fn available_memory(&self) -> u64 {
        let (mut free, mut total) = (0, 0);
        // SAFETY: two numbers to write to.
        let asked = self.bind().is_ok()
            && unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) } == sys::CUresult::CUDA_SUCCESS;
        if asked { free as u64 } else { 0 }
    }

    /// Device memory, zero at first.
    pub(crate) fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        self.bind()?;
        let _turn = self.turn();
        let mut ptr = 0;
        // SAFETY: the pointer is valid; the memory is as large as what is cleared.
        unsafe {
            check("allocating device memory", sys::cuMemAlloc_v2(&mut ptr, bytes.max(1)))?;
            check("clearing device memory", sys::cuMemsetD8Async(ptr, 0, bytes, self.stream))?;
        }
        Ok(ptr)
    }

    /// Gives memory of [`Cuda::alloc`] back, once the stream is done with it.
    pub(crate) fn free(&self, ptr: u64) {
        let _turn = self.turn();
        // SAFETY: the memory came from `alloc`, and the stream is done with it.
        unsafe {
            if self.bind().is_ok() && sys::cuStreamSynchronize(self.stream) == sys::CUresult::CUDA_SUCCESS {
                sys::cuMemFree_v2(ptr);
            }
        }
    }

    /// Page-locked memory of the host that kernels can write, zero at first: host and device use the same address.
    pub(crate) fn alloc_mapped(&self, bytes: usize) -> Result<u64, Error> {
        self.bind()?;
        let mut ptr = std::ptr::null_mut();
        // SAFETY: the pointer is valid; the memory is as large as what is cleared.
        unsafe {
            let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
            check("page-locking memory", sys::cuMemHostAlloc(&mut ptr, bytes.max(1), flags))?;
            std::ptr::write_bytes(ptr.cast::<u8>(), 0, bytes);
        }
        Ok(ptr as u64)
    }

    /// Gives memory of [`Cuda::alloc_mapped`] back, once the stream is done with it.
    pub(crate) fn free_mapped(&self, ptr: u64) {
        // SAFETY: the memory came from `alloc_mapped`, and the stream is done with it.
        unsafe {
            if self.bind().is_ok() && sys::cuStreamSynchronize(self.stream) == sys::CUresult::CUDA_SUCCESS {
                sys::cuMemFreeHost(ptr as *mut std::ffi::c_void);
            }
        }
    }

    /// Whether everything that was enqueued is done.
    ///
    /// # Errors
    /// What went wrong in a kernel.
    pub(crate) fn is_idle(&self) -> Result<bool, Error> {
        // SAFETY: the stream lives as long as this.
        match unsafe { sys::cuStreamQuery(self.stream) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("waiting for the GPU", result).map(|()| true),
        }
    }

    /// Keeps an error for the next call that can return one.
    fn note<T: Default>(&self, result: Result<T, Error>) -> T {
        result.unwrap_or_else(|error| {
            let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
            fault.get_or_insert(error.to_string());
            T::default()
        })
    }

    /// The error of an earlier copy, if there was one.
    pub(crate) fn take_fault(&self) -> Result<(), Error> {
        match self.fault.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(message) => Err(cuda_error(message)),
            None => Ok(()),
        }
    }

    /// Enqueues a copy to device memory. `from` may change as soon as this returns; small copies wait for nothing.
    ///
    /// # Safety
    /// `ptr` is device memory of at least as many bytes.
    pub(crate) unsafe fn write(&self, ptr: u64, from: &[u8]) {
        self.note(self.bind());
        let _turn = self.turn();
        // SAFETY: the staging memory has STAGING bytes, a half is used again only when the copies out of it are done,
        // and large copies are finished before this returns.
        unsafe {
            if from.len() > STAGING / 2 {
                self.note(check(
                    "copying to the GPU",
                    sys::cuMemcpyHtoDAsync_v2(ptr, from.as_ptr().cast(), from.len(), self.stream),
                ));
                self.note(check("copying to the GPU", sys::cuStreamSynchronize(self.stream)));
                return;
            }
            let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
            if staging.used + from.len() > STAGING / 2 {
                self.note(check("copying to the GPU", sys::cuEventRecord(staging.done[staging.half], self.stream)));
                staging.half = 1 - staging.half;
                staging.used = 0;
                self.note(check("copying to the GPU", sys::cuEventSynchronize(staging.done[staging.half])));
            }
            let place = staging.memory.add(staging.half * (STAGING / 2) + staging.used);
            std::ptr::copy_nonoverlapping(from.as_ptr(), place, from.len());
            staging.used += from.len().next_multiple_of(16);
            self.note(check(
                "copying to the GPU",
                sys::cuMemcpyHtoDAsync_v2(ptr, place.cast(), from.len(), self.stream),
            ));
        }
    }

    /// Waits for everything that was enqueued and copies out of device memory.
    ///
    /// # Safety
    /// `ptr` is device memory of at least as many bytes.
    pub(crate) unsafe fn read(&self, ptr: u64, to: &mut [u8]) {
        self.note(self.bind());
        let _turn = self.turn();
        // SAFETY: the caller's; the copy is done before this returns.
        unsafe {
            self.note(check(
                "copying from the GPU",
                sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), ptr, to.len(), self.stream),
            ));
            self.note(check("waiting for the GPU", sys::cuStreamSynchronize(self.stream)));
        }
    }

    /// Enqueues a copy inside of device memory.
    ///
    /// # Safety
    /// Both are device memory of at least `bytes` bytes.
    pub(crate) unsafe fn copy(&self, from: u64, to: u64, bytes: usize) {
        self.note(self.bind());
        // SAFETY: the caller's.
        self.note(check("copying on the GPU", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream) }));
    }

    /// Enqueues filling device memory with a byte.
    ///
    /// # Safety
    /// `ptr` is device memory of at least `bytes` bytes.
    pub(crate) unsafe fn fill(&self, ptr: u64, byte: u8, bytes: usize) {
        self.note(self.bind());
        let _turn = self.turn();
        // SAFETY: the caller's.
        self.note(check("clearing device memory", unsafe { sys::cuMemsetD8Async(ptr, byte, bytes, self.stream) }));
    }

    /// Waits until everything that was enqueued is done.
    ///
    /// # Errors
    /// What went wrong since the last wait, in a kernel or a copy.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.bind()?;
        let turn = self.turn();
        // SAFETY: the stream lives as long as this.
        check("waiting for the GPU", unsafe { sys::cuStreamSynchronize(self.stream) })?;
        drop(turn);
        self.take_fault()
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // SAFETY: nothing uses the handles any more. Modules and the primary context go with the process.
        unsafe {
            if self.bind().is_err() {
                return;
            }
            sys::cuStreamSynchronize(self.stream);
            let staging = self.staging.get_mut().unwrap_or_else(PoisonError::into_inner);
            staging.done.iter().for_each(|&event| {
                sys::cuEventDestroy_v2(event);
            });
            sys::cuMemFreeHost(staging.memory.cast());
            sys::cuStreamDestroy_v2(self.stream);
        }
    }
}
