//! Sums between GPUs through NCCL, found at run time.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use cudarc::driver::sys as driver;
use cudarc::nccl::sys::{ncclComm_t as Handle, ncclDataType_t as DataType, ncclRedOp_t as Reduction};

use super::library::Library;
use super::{Cuda, check, cuda_error};
use crate::error::Error;

/// The functions of NCCL that are called here. cudarc has them all, but looks for `libnccl.so`, and the packages of pip
/// and conda bring `libnccl.so.2` only.
#[derive(Debug)]
struct Api {
    init_all: unsafe extern "C" fn(*mut Handle, c_int, *const c_int) -> c_int,
    #[allow(clippy::type_complexity)]
    all_reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, driver::CUstream) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    abort: unsafe extern "C" fn(Handle) -> c_int,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(Handle) -> *const c_char,
}

impl Api {
    /// The library, loaded at the first call.
    fn get() -> Result<&'static Api, Error> {
        static API: OnceLock<Api> = OnceLock::new();
        match API.get() {
            Some(api) => Ok(api),
            None => Ok(API.get_or_init({
                let api = Api::load()?;
                || api
            })),
        }
    }

    fn load() -> Result<Api, Error> {
        let library = Library::Nccl.find()?;
        macro_rules! symbol {
            ($name:literal) => {{
                // SAFETY: the type is that of nccl.h, and the library is never unloaded.
                let found = unsafe { library.get($name) };
                *found.map_err(|e| cuda_error(format!("NCCL is older than 2.13: {e}")))?
            }};
        }
        let api = Api {
            init_all: symbol!(b"ncclCommInitAll"),
            all_reduce: symbol!(b"ncclAllReduce"),
            group_start: symbol!(b"ncclGroupStart"),
            group_end: symbol!(b"ncclGroupEnd"),
            abort: symbol!(b"ncclCommAbort"),
            destroy: symbol!(b"ncclCommDestroy"),
            error_string: symbol!(b"ncclGetErrorString"),
            last_error: symbol!(b"ncclGetLastError"),
        };
        std::mem::forget(library);
        Ok(api)
    }

    fn check(&self, what: &str, result: c_int) -> Result<(), Error> {
        if result == 0 {
            return Ok(());
        }
        let text = |text: *const c_char| {
            // SAFETY: the library's texts end with a zero.
            if text.is_null() { String::new() } else { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() }
        };
        // SAFETY: both functions only return a text.
        let (reason, more) =
            unsafe { (text((self.error_string)(result)), text((self.last_error)(std::ptr::null_mut()))) };
        Err(cuda_error(format!("NCCL, {what}: {reason} {}", more.trim()).trim_end().into()))
    }
}

/// One GPU's end of the connections between the GPUs of a group.
#[derive(Debug)]
pub struct Communicator {
    api: &'static Api,
    cuda: Arc<Cuda>,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Open(Handle),
    /// The thread ends when the GPU has stopped waiting for the others and no captured run uses the handle any more.
    Aborted(Option<JoinHandle<()>>),
}

// SAFETY: the handle may be used from any thread, by one at a time, which the Mutex sees to.
unsafe impl Send for State {}

impl Communicator {
    /// Connects GPUs, no two of them the same; in their order.
    ///
    /// # Errors
    /// NCCL is missing or refuses.
    pub(crate) fn group(gpus: &[Arc<Cuda>]) -> Result<Vec<Communicator>, Error> {
        let api = Api::get()?;
        let ordinals: Vec<c_int> = gpus.iter().map(|cuda| cuda.ordinal() as c_int).collect();
        let mut handles: Vec<Handle> = vec![std::ptr::null_mut(); gpus.len()];
        // SAFETY: as many handles are written as there are numbers of GPUs.
        let result = unsafe { (api.init_all)(handles.as_mut_ptr(), handles.len() as c_int, ordinals.as_ptr()) };
        api.check("connecting the GPUs", result)?;
        let one = |(cuda, handle): (&Arc<Cuda>, _)| Communicator {
            api,
            cuda: cuda.clone(),
            state: Mutex::new(State::Open(handle)),
        };
        Ok(gpus.iter().zip(handles).map(one).collect())
    }

    /// Enqueues sums over the group, in place, of ranges given by address and number of f32.
    pub(super) fn all_reduce(&self, ranges: &[(u64, usize)], stream: driver::CUstream) -> Result<(), Error> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State::Open(handle) = *state else {
            return Err(cuda_error("another GPU of the group has failed".into()));
        };
        let (api, f32, sum) = (self.api, DataType::ncclFloat32 as c_int, Reduction::ncclSum as c_int);
        // SAFETY: the handle is open, and the memory was checked when the plan was bound.
        unsafe {
            api.check("a sum", (api.group_start)())?;
            let mut enqueued = Ok(());
            for &(address, numbers) in ranges {
                let (from, to) = (address as *const c_void, address as *mut c_void);
                let result = (api.all_reduce)(from, to, numbers, f32, sum, handle, stream);
                enqueued = enqueued.and(api.check("a sum", result));
            }
            // What was started is ended whatever happens in between.
            let ended = api.check("a sum", (api.group_end)());
            enqueued.and(ended)
        }
    }

    /// Makes sums under way end with garbage. The handle goes when no captured run needs it any more.
    pub(crate) fn abort(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State::Open(handle) = *state else { return };
        let (cuda, api, handle) = (self.cuda.clone(), self.api, handle as usize);
        let abort = move || {
            // SAFETY: the handle was open, and nobody uses it after this.
            let _ = cuda.bind().map(|()| unsafe { (api.abort)(handle as Handle) });
        };
        *state = State::Aborted(std::thread::Builder::new().spawn(abort).ok());
    }
}

impl Drop for Communicator {
    /// NCCL waits here until the captured runs that sum are gone: plans must be dropped before.
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        match state {
            State::Open(handle) => {
                if self.cuda.synchronize().is_ok() {
                    // SAFETY: the handle is open and not used any more.
                    unsafe { (self.api.destroy)(*handle) };
                }
            }
            State::Aborted(thread) => drop(thread.take().map(JoinHandle::join)),
        }
    }
}

/// A stream beside the main one, for work that runs at the same time, and the events that tie them together.
#[derive(Debug)]
pub(super) struct SideStream {
    pub(super) stream: driver::CUstream,
    fork: driver::CUevent,
    join: driver::CUevent,
}

impl SideStream {
    /// Its kernels go first where both streams have some to run: others wait for them.
    pub(super) fn new() -> Result<SideStream, Error> {
        let mut side =
            SideStream { stream: std::ptr::null_mut(), fork: std::ptr::null_mut(), join: std::ptr::null_mut() };
        // SAFETY: the context is current, and every pointer is valid.
        unsafe {
            let (mut least, mut greatest) = (0, 0);
            check("asking for priorities", driver::cuCtxGetStreamPriorityRange(&mut least, &mut greatest))?;
            let flags = driver::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            check("making a stream", driver::cuStreamCreateWithPriority(&mut side.stream, flags, greatest))?;
            for event in [&mut side.fork, &mut side.join] {
                let flags = driver::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                check("making an event", driver::cuEventCreate(event, flags))?;
            }
        }
        Ok(side)
    }

    /// What is enqueued on the side from now on waits for what is on the main stream now.
    pub(super) fn fork(&self, main: driver::CUstream) -> Result<(), Error> {
        wait(main, self.fork, self.stream)
    }

    /// What is enqueued on the main stream from now on waits for what is on the side now.
    pub(super) fn join(&self, main: driver::CUstream) -> Result<(), Error> {
        wait(self.stream, self.join, main)
    }
}

fn wait(first: driver::CUstream, event: driver::CUevent, then: driver::CUstream) -> Result<(), Error> {
    // SAFETY: streams and event are alive.
    unsafe {
        check("ordering streams", driver::cuEventRecord(event, first))?;
        check("ordering streams", driver::cuStreamWaitEvent(then, event, 0))
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        // SAFETY: nothing uses the handles any more.
        unsafe {
            driver::cuEventDestroy_v2(self.fork);
            driver::cuEventDestroy_v2(self.join);
            driver::cuStreamDestroy_v2(self.stream);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where NCCL is missing this says so and passes, unless `HOGNOSE_TEST_NCCL` is set.
    #[test]
    fn the_library_has_what_is_called() {
        match Api::get() {
            Ok(api) => {
                api.check("a test", 0).unwrap();
                let error = api.check("a test", 4).unwrap_err().to_string();
                assert!(error.starts_with("CUDA: NCCL, a test: invalid argument"), "{error}");
            }
            Err(error) => {
                assert!(std::env::var_os("HOGNOSE_TEST_NCCL").is_none(), "{error}");
                assert!(error.to_string().contains("no libnccl.so.2 that can be used"), "{error}");
                eprintln!("not tested: {error}");
            }
        }
    }
}
