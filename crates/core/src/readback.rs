//! Results on their way from a device, for a caller that has other things to do meanwhile.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;

use crate::cuda::{Cuda, check};
use crate::device::{Buffer, Device};
use crate::dtype::Element;
use crate::error::Error;

/// How long a wait for a GPU looks away.
const PAUSE: Duration = Duration::from_micros(20);

/// A place to which results are copied behind the work that makes them, and an event that tells when they are there.
#[derive(Debug)]
pub struct Readback {
    place: Place,
}

#[derive(Debug)]
enum Place {
    Host(Vec<u64>),
    /// Page-locked memory, to which a GPU copies by itself.
    Cuda {
        cuda: Arc<Cuda>,
        memory: *mut u8,
        bytes: usize,
        done: sys::CUevent,
    },
}

// SAFETY: the memory and the event are this value's own, and may be used from any thread.
unsafe impl Send for Readback {}

impl Readback {
    /// A place for that many bytes.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn new(device: &Device, bytes: usize) -> Result<Readback, Error> {
        let place = match device {
            Device::Cpu(_) => Place::Host(vec![0; bytes.div_ceil(8)]),
            Device::Cuda(cuda) => {
                cuda.bind()?;
                let (mut memory, mut done) = (std::ptr::null_mut(), std::ptr::null_mut());
                // SAFETY: the context is current, and both pointers are valid.
                unsafe {
                    check("page-locking memory", sys::cuMemAllocHost_v2(&mut memory, bytes.max(1)))?;
                    let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                    check("making an event", sys::cuEventCreate(&mut done, flags))?;
                }
                Place::Cuda { cuda: cuda.clone(), memory: memory.cast(), bytes, done }
            }
        };
        Ok(Readback { place })
    }

    /// Enqueues copying `bytes` bytes of a buffer from byte `offset` on to byte `at` of this place; what was copied
    /// there before must have been waited for. Panics if they do not fit.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn fetch(&mut self, at: usize, buffer: &Buffer, offset: usize, bytes: usize) -> Result<(), Error> {
        match &mut self.place {
            Place::Host(memory) => {
                buffer.read_bytes(offset, &mut as_bytes(memory)[at..at + bytes]);
                Ok(())
            }
            Place::Cuda { cuda, memory, bytes: size, done } => {
                let fits = |at: usize, size: usize| at.checked_add(bytes).is_some_and(|end| end <= size);
                assert!(fits(at, *size) && fits(offset, buffer.bytes()), "more than there is");
                cuda.bind()?;
                // SAFETY: both ranges exist, and the memory is page-locked and stays until the event is done.
                unsafe {
                    let from = buffer.address() + offset as u64;
                    let copied = sys::cuMemcpyDtoHAsync_v2(memory.add(at).cast(), from, bytes, cuda.stream());
                    check("copying from the GPU", copied)?;
                    check("copying from the GPU", sys::cuEventRecord(*done, cuda.stream()))
                }
            }
        }
    }

    /// Waits until everything that was fetched is here; gives up when `hopeless` says so, and returns whether it is
    /// here.
    ///
    /// # Errors
    /// What went wrong on the GPU.
    pub fn wait(&self, hopeless: impl Fn() -> bool) -> Result<bool, Error> {
        let Place::Cuda { cuda, done, .. } = &self.place else { return Ok(true) };
        cuda.bind()?;
        loop {
            // SAFETY: the event is alive.
            match unsafe { sys::cuEventQuery(*done) } {
                sys::CUresult::CUDA_ERROR_NOT_READY if hopeless() => return Ok(false),
                sys::CUresult::CUDA_ERROR_NOT_READY => std::thread::sleep(PAUSE),
                result => {
                    check("waiting for the GPU", result)?;
                    return cuda.take_fault().map(|()| true);
                }
            }
        }
    }

    /// Element number `i` of what was fetched, as if the whole place held elements of this type. Panics if there are
    /// fewer. Call [`Readback::wait`] before.
    pub fn get<T: Element>(&self, i: usize) -> T {
        let (memory, bytes) = match &self.place {
            Place::Host(memory) => (memory.as_ptr().cast::<u8>(), 8 * memory.len()),
            Place::Cuda { memory, bytes, .. } => (memory.cast_const(), *bytes),
        };
        assert!((i + 1) * size_of::<T>() <= bytes, "more than there is");
        // SAFETY: the element lies in the memory, which is aligned to more than an element, and any bytes are a T.
        unsafe { memory.cast::<T>().add(i).read() }
    }
}

fn as_bytes(memory: &mut [u64]) -> &mut [u8] {
    // SAFETY: the same memory, which any bytes may fill.
    unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), 8 * memory.len()) }
}

impl Drop for Readback {
    fn drop(&mut self) {
        if let Place::Cuda { cuda, memory, done, .. } = &self.place {
            // SAFETY: made by the driver and given back once, when no copy is under way any more.
            unsafe {
                if cuda.bind().is_ok() && sys::cuEventSynchronize(*done) == sys::CUresult::CUDA_SUCCESS {
                    sys::cuMemFreeHost(memory.cast());
                }
                sys::cuEventDestroy_v2(*done);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brings_what_was_there_when_it_was_fetched() {
        let device = Device::cpu(Some(1)).unwrap();
        let buffer = device.alloc(16).unwrap();
        let mut back = Readback::new(&device, 12).unwrap();
        for (i, value) in [1.5f32, -2.0, 4.0].into_iter().enumerate() {
            buffer.write(8, &[value]);
            back.fetch(4 * i, &buffer, 8, 4).unwrap();
        }
        assert!(back.wait(|| true).unwrap());
        assert_eq!([0, 1, 2].map(|i| back.get::<f32>(i)), [1.5, -2.0, 4.0]);
    }
}
