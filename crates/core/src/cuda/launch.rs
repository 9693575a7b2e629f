//! Launching kernels: what an op's `run_cuda` writes down, and the two ways in which it is taken.
//!
//! A plan asks its ops twice: once to learn which kernels they need (nothing runs, so all of them can be compiled at
//! once), and once to enqueue them, usually into a CUDA graph that is then replayed.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::driver::sys;

use super::blas::Product;
use super::compile::{Program, Variant};
#[cfg(test)]
use super::emulator;
use super::nccl::Communicator;
use super::{Cuda, Properties, check, cuda_error};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::Mat;

/// One argument of a kernel.
#[derive(Clone, Debug)]
pub enum Arg {
    /// `Mat<T>`: address and stride; a missing operand is a null address.
    Mat(u64, i64),
    /// A plain pointer.
    Ptr(u64),
    /// `int`
    I32(i32),
    /// `long long`
    I64(i64),
    /// `float`
    F32(f32),
    /// A structure of 64-bit numbers.
    Table(Vec<u64>),
}

impl From<Mat> for Arg {
    fn from(m: Mat) -> Arg {
        Arg::Mat(m.address(), m.stride as i64)
    }
}
impl From<Option<Mat>> for Arg {
    fn from(m: Option<Mat>) -> Arg {
        m.map_or(Arg::Mat(0, 0), Arg::from)
    }
}
/// Scratch memory.
impl From<*mut u8> for Arg {
    fn from(p: *mut u8) -> Arg {
        Arg::Ptr(p as u64)
    }
}
impl From<i32> for Arg {
    fn from(v: i32) -> Arg {
        Arg::I32(v)
    }
}
impl From<i64> for Arg {
    fn from(v: i64) -> Arg {
        Arg::I64(v)
    }
}
/// Sizes are `long long` in kernels.
impl From<usize> for Arg {
    fn from(v: usize) -> Arg {
        Arg::I64(v as i64)
    }
}
impl From<f32> for Arg {
    fn from(v: f32) -> Arg {
        Arg::F32(v)
    }
}

/// A launch that is being written down.
#[derive(Debug)]
pub struct Kernel {
    pub(super) variant: Variant,
    pub(super) entry: &'static str,
    pub(super) grid: [usize; 3],
    pub(super) threads: u32,
    pub(super) shared: usize,
    overlapping: bool,
    pub(super) args: Vec<Arg>,
}

impl Kernel {
    /// Entry point `entry` of a program: one block of 32 threads until said otherwise.
    pub fn new(program: &'static Program, entry: &'static str) -> Kernel {
        Kernel {
            variant: Variant { program, defines: Vec::new() },
            entry,
            grid: [1; 3],
            threads: 32,
            shared: 0,
            overlapping: false,
            args: Vec::new(),
        }
    }

    /// Defines a macro: a size, a type, a flag. Each combination of values is compiled by itself.
    pub fn define(mut self, name: &'static str, value: impl ToString) -> Kernel {
        self.variant.defines.push((name, value.to_string()));
        self
    }

    /// Defines a macro as the C++ type of a dtype.
    pub fn define_type(self, name: &'static str, dtype: DType) -> Kernel {
        let ty = match dtype {
            DType::F32 => "float",
            DType::BF16 => "bf16",
            DType::I32 => "int",
            DType::Q8_0 | DType::Q4_K | DType::Q6_K => unreachable!("kernels have no elements of blocks"),
        };
        self.define(name, ty)
    }

    /// Number of blocks along x, y and z.
    pub fn grid(mut self, x: usize, y: usize, z: usize) -> Kernel {
        self.grid = [x, y, z];
        self
    }

    /// Threads of a block.
    pub fn threads(mut self, threads: u32) -> Kernel {
        self.threads = threads;
        self
    }

    /// Bytes of dynamic shared memory of a block.
    pub fn shared(mut self, bytes: usize) -> Kernel {
        self.shared = bytes;
        self
    }

    /// Lets the kernel start while the one before it ends (programmatic dependent launch): it must call
    /// `wait_for_previous` before it touches memory that another kernel writes.
    pub fn overlapping(mut self) -> Kernel {
        self.overlapping = true;
        self
    }

    /// Appends arguments, in the order of the kernel's parameters.
    pub fn args<const COUNT: usize>(mut self, args: [Arg; COUNT]) -> Kernel {
        self.args.extend(args);
        self
    }

    /// Appends one argument.
    pub fn arg(mut self, arg: impl Into<Arg>) -> Kernel {
        self.args.push(arg.into());
        self
    }
}

/// Takes the launches of ops.
#[derive(Debug)]
pub struct Launcher<'a> {
    properties: &'a Properties,
    target: Target<'a>,
    /// Something runs beside the main stream.
    forked: bool,
}

#[derive(Debug)]
enum Target<'a> {
    /// Collects the kernels that are needed.
    Collect(HashMap<String, Variant>),
    /// Enqueues them.
    Run(&'a Cuda),
    /// Runs them on the CPU, where blocks and threads may take turns in the reversed order.
    #[cfg(test)]
    Emulate { reversed: bool },
}

/// Arguments as the driver wants them: the address of each.
#[derive(Debug)]
pub(super) struct Parameters<'a> {
    args: &'a [Arg],
    /// Each argument in 16 bytes of its own, as the kernel's parameter has it.
    values: Vec<[u64; 2]>,
    addresses: Vec<*mut c_void>,
}

impl<'a> Parameters<'a> {
    pub(super) fn new(args: &'a [Arg]) -> Parameters<'a> {
        let value = |arg: &Arg| match *arg {
            Arg::Mat(ptr, stride) => [ptr, stride as u64],
            Arg::Ptr(ptr) => [ptr, 0],
            Arg::I32(v) => [u64::from(v as u32), 0],
            Arg::I64(v) => [v as u64, 0],
            Arg::F32(v) => [u64::from(v.to_bits()), 0],
            Arg::Table(_) => [0; 2],
        };
        Parameters { args, values: args.iter().map(value).collect(), addresses: Vec::new() }
    }

    /// The addresses, valid as long as this is neither moved nor dropped.
    pub(super) fn addresses(&mut self) -> &mut [*mut c_void] {
        let address = |(arg, value): (&Arg, &mut [u64; 2])| -> *mut c_void {
            match arg {
                // It is only read.
                Arg::Table(table) => table.as_ptr().cast_mut().cast(),
                _ => value.as_mut_ptr().cast(),
            }
        };
        self.addresses = self.args.iter().zip(&mut self.values).map(address).collect();
        &mut self.addresses
    }
}

impl<'a> Launcher<'a> {
    /// Collects which kernels are needed for a GPU with these properties.
    pub fn collect(properties: &'a Properties) -> Launcher<'a> {
        Launcher { properties, target: Target::Collect(HashMap::new()), forked: false }
    }

    /// Enqueues on a GPU. The context must be current.
    pub(crate) fn run(cuda: &'a Cuda) -> Launcher<'a> {
        Launcher { properties: cuda.properties(), target: Target::Run(cuda), forked: false }
    }

    /// Runs on the CPU what was collected before.
    #[cfg(test)]
    pub(crate) fn emulate(collected: Launcher<'a>, reversed: bool) -> Result<Launcher<'a>, Error> {
        let properties = collected.properties;
        emulator::prepare(&collected.variants())?;
        Ok(Launcher { properties, target: Target::Emulate { reversed }, forked: false })
    }

    /// The kernels that were asked for, by key, if this collects.
    pub fn variants(self) -> HashMap<String, Variant> {
        match self.target {
            Target::Collect(variants) => variants,
            _ => HashMap::new(),
        }
    }

    /// What kernels are fitted to.
    pub fn properties(&self) -> &'a Properties {
        self.properties
    }

    /// Takes a launch. One without blocks does nothing.
    ///
    /// # Errors
    /// More blocks than a grid can have, or what the driver refuses.
    pub fn launch(&mut self, kernel: Kernel) -> Result<(), Error> {
        let [x, y, z] = kernel.grid;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let key = kernel.variant.key();
        if x > i32::MAX as usize || y > 65_535 || z > 65_535 {
            return Err(cuda_error(format!("{key}: a grid of {x} x {y} x {z} blocks is more than a launch can have")));
        }
        if kernel.shared > self.properties.shared as usize {
            let (needed, there) = (kernel.shared, self.properties.shared);
            return Err(cuda_error(format!("{key}: needs {needed} bytes of shared memory, the GPU has {there}")));
        }
        let cuda = match &mut self.target {
            Target::Collect(variants) => {
                variants.entry(key).or_insert(kernel.variant);
                return Ok(());
            }
            Target::Run(cuda) => *cuda,
            #[cfg(test)]
            Target::Emulate { reversed } => return emulator::launch(&kernel, self.properties.shared, *reversed),
        };
        let function = cuda.kernels().function(&key, kernel.entry, kernel.shared as u32)?;
        let mut parameters = Parameters::new(&kernel.args);
        // SAFETY: all zeros is a valid value of this plain structure.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: x as u32,
            gridDimY: y as u32,
            gridDimZ: z as u32,
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: kernel.shared as u32,
            hStream: cuda.stream(),
            attrs: &mut attribute,
            numAttrs: u32::from(kernel.overlapping && self.properties.arch >= (9, 0)),
        };
        // SAFETY: the function is loaded, its parameters are laid out as it expects them (the tests of each op see to
        // it), and the driver copies them before it returns.
        let result = unsafe {
            sys::cuLaunchKernelEx(&config, function, parameters.addresses().as_mut_ptr(), std::ptr::null_mut())
        };
        check(&format!("{key} {}", kernel.entry), result)
    }

    /// Takes a matrix product, which cuBLASLt does.
    ///
    /// # Errors
    /// What cuBLASLt refuses.
    pub fn product(&mut self, product: &Product) -> Result<(), Error> {
        match &self.target {
            Target::Collect(_) => Ok(()),
            Target::Run(cuda) => cuda.blas().run(cuda, product),
            #[cfg(test)]
            Target::Emulate { .. } => {
                emulator::product(product);
                Ok(())
            }
        }
    }

    /// Takes sums over a group of GPUs, in place, of ranges given by address and number of f32. They run beside what
    /// is taken later, until [`Launcher::join`].
    ///
    /// # Errors
    /// What NCCL refuses.
    pub(crate) fn all_reduce(&mut self, communicator: &Communicator, ranges: &[(u64, usize)]) -> Result<(), Error> {
        let Target::Run(cuda) = self.target else { return Ok(()) };
        let side = cuda.side()?;
        side.fork(cuda.stream())?;
        self.forked = true;
        communicator.all_reduce(ranges, side.stream)
    }

    /// What is taken from now on waits for everything before it.
    ///
    /// # Errors
    /// What the driver refuses.
    pub(crate) fn join(&mut self) -> Result<(), Error> {
        match self.target {
            Target::Run(cuda) if std::mem::take(&mut self.forked) => cuda.side()?.join(cuda.stream()),
            _ => Ok(()),
        }
    }

    /// Takes filling memory with zeros.
    ///
    /// # Errors
    /// What the driver refuses.
    // The address is the emulated device's, and is used on the device only, as the others'.
    #[cfg_attr(test, allow(clippy::not_unsafe_ptr_arg_deref))]
    pub fn zero(&mut self, ptr: *mut u8, bytes: usize) -> Result<(), Error> {
        match &self.target {
            Target::Run(cuda) if bytes > 0 => {
                // SAFETY: the caller's memory; it was checked when the plan was bound.
                check("clearing memory", unsafe { sys::cuMemsetD8Async(ptr as u64, 0, bytes, cuda.stream()) })
            }
            #[cfg(test)]
            Target::Emulate { .. } => {
                emulator::zero(ptr as u64, bytes);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
