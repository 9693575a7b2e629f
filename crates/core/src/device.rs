//! Devices and their memory: the CPU or an NVIDIA GPU. A device is a value, so nothing above needs to be generic.

use std::alloc::{Layout, alloc, dealloc};
use std::borrow::Cow;
use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use half::bf16;

use crate::cpu::ceiling::Ceiling;
use crate::cpu::{Cpu, gemm, memory};
use crate::cuda::{Cuda, Launcher};
use crate::dtype::{DType, Element};
use crate::error::{Error, human_bytes};
use crate::graph::Layout as MatrixLayout;
use crate::graph::TensorId;
use crate::plan::{Plan, Target};
use crate::quant;

/// Alignment of buffers in bytes: a page, so that large ones start on one.
const BUFFER_ALIGNMENT: usize = 4096;

/// Bytes from which on an allocation is checked against what is free.
const LARGE: usize = 64 << 20;

/// Where graphs run.
#[derive(Clone, Debug)]
pub enum Device {
    /// The threads and the instruction set of this machine's CPU.
    Cpu(Arc<Cpu>),
    /// An NVIDIA GPU.
    Cuda(Arc<Cuda>),
}

/// Memory on a device, zero at first. Contents are copied in and out; no reference to them is handed out, so plans
/// may read and write them through a shared `&Buffer`. It can move to another thread but not be shared between two.
///
/// On a GPU writes are enqueued behind the work before them and reads wait for it. What goes wrong in a copy is an
/// error of the next [`Device::run`] or [`Device::synchronize`].
#[derive(Debug)]
pub struct Buffer {
    ptr: NonNull<u8>,
    bytes: usize,
    /// The GPU whose memory it is.
    cuda: Option<Arc<Cuda>>,
    /// Memory of the host that the GPU writes: see [`Device::alloc_mailbox`].
    mapped: bool,
    not_sync: PhantomData<Cell<u8>>,
}

// SAFETY: the buffer owns its memory; nothing of it is tied to the thread that made it.
unsafe impl Send for Buffer {}

impl Drop for Buffer {
    fn drop(&mut self) {
        match &self.cuda {
            Some(cuda) if self.mapped => cuda.free_mapped(self.address()),
            Some(cuda) => cuda.free(self.address()),
            // SAFETY: allocated by `Buffer::host` with this layout.
            None if self.bytes > 0 => unsafe { dealloc(self.ptr.as_ptr(), layout(self.bytes)) },
            None => {}
        }
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, alignment(bytes)).expect("sizes were checked when the buffer was made")
}

/// Large buffers start on a large page.
fn alignment(bytes: usize) -> usize {
    if bytes >= 2 * memory::LARGE_PAGE { memory::LARGE_PAGE } else { BUFFER_ALIGNMENT }
}

impl Buffer {
    fn host(bytes: usize) -> Result<Buffer, Error> {
        let ptr = if bytes == 0 {
            NonNull::<u64>::dangling().cast()
        } else {
            let refused =
                || Error::Memory { needed: human_bytes(bytes as u64), available: human_bytes(available_memory()) };
            let layout = Layout::from_size_align(bytes, alignment(bytes)).map_err(|_| refused())?;
            // SAFETY: the layout has a size above zero; what is written lies inside of the memory.
            let ptr = NonNull::new(unsafe { alloc(layout) }).ok_or_else(refused)?;
            memory::prefer_large_pages(ptr.as_ptr(), bytes);
            // SAFETY: as above.
            unsafe { ptr.write_bytes(0, bytes) };
            ptr
        };
        Ok(Buffer { ptr, bytes, cuda: None, mapped: false, not_sync: PhantomData })
    }

    fn device(cuda: &Arc<Cuda>, bytes: usize) -> Result<Buffer, Error> {
        let ptr =
            NonNull::new(cuda.alloc(bytes)? as *mut u8).ok_or_else(|| Error::Cuda("memory at address 0".into()))?;
        Ok(Buffer { ptr, bytes, cuda: Some(cuda.clone()), mapped: false, not_sync: PhantomData })
    }

    pub(crate) fn address(&self) -> u64 {
        self.ptr.as_ptr() as u64
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The whole buffer as a binding.
    pub fn slice(&self) -> Slice<'_> {
        Slice { buffer: self, offset: 0 }
    }

    /// The buffer from byte `offset` on as a binding.
    pub fn at(&self, offset: usize) -> Slice<'_> {
        Slice { buffer: self, offset }
    }

    /// Copies elements in, starting at byte `offset`. Panics if they do not fit.
    pub fn write<T: Element>(&self, offset: usize, values: &[T]) {
        // SAFETY: an Element is plain bytes.
        self.write_bytes(offset, unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) });
    }

    /// Copies bytes in, starting at byte `offset`. Panics if they do not fit.
    pub fn write_bytes(&self, offset: usize, from: &[u8]) {
        assert!(offset.checked_add(from.len()).is_some_and(|end| end <= self.bytes), "write past the end of a buffer");
        // SAFETY: the range lies inside the buffer, and nobody else reads or writes it now (the buffer is not Sync).
        unsafe {
            match &self.cuda {
                Some(cuda) => cuda.write(self.address() + offset as u64, from),
                None => std::ptr::copy_nonoverlapping(from.as_ptr(), self.ptr.as_ptr().add(offset), from.len()),
            }
        }
    }

    /// Copies `out.len()` elements out, starting at byte `offset`. Panics if there are fewer.
    pub fn read<T: Element>(&self, offset: usize, out: &mut [T]) {
        // SAFETY: any bytes are a valid T.
        let bytes = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), size_of_val(out)) };
        self.read_bytes(offset, bytes);
    }

    /// Copies bytes out, starting at byte `offset`. Panics if there are fewer.
    pub fn read_bytes(&self, offset: usize, out: &mut [u8]) {
        assert!(offset.checked_add(out.len()).is_some_and(|end| end <= self.bytes), "read past the end of a buffer");
        // SAFETY: the range lies inside the buffer, and nobody writes it now.
        unsafe {
            match &self.cuda {
                Some(cuda) => cuda.read(self.address() + offset as u64, out),
                None => std::ptr::copy_nonoverlapping(self.ptr.as_ptr().add(offset), out.as_mut_ptr(), out.len()),
            }
        }
    }

    /// Copies `bytes` bytes from another place on the same device, behind the work before it. Panics if they do not fit,
    /// or if the two places overlap or are on different devices.
    pub fn copy_from(&self, offset: usize, from: Slice<'_>, bytes: usize) {
        let inside = |buffer: &Buffer, at: usize| at.checked_add(bytes).is_some_and(|end| end <= buffer.bytes);
        assert!(inside(self, offset) && inside(from.buffer, from.offset), "copy past the end of a buffer");
        let (to, source) = (self.address() + offset as u64, from.buffer.address() + from.offset as u64);
        assert!(to.abs_diff(source) >= bytes as u64, "a copy onto itself");
        match (&self.cuda, &from.buffer.cuda) {
            // SAFETY: both ranges lie inside their buffers.
            (Some(cuda), Some(other)) if Arc::ptr_eq(cuda, other) => unsafe { cuda.copy(source, to, bytes) },
            // SAFETY: as above; they do not overlap, and nobody else uses either now (buffers are not Sync).
            (None, None) => unsafe { std::ptr::copy_nonoverlapping(source as *const u8, to as *mut u8, bytes) },
            _ => panic!("a copy between devices"),
        }
    }

    /// `len` elements from byte `offset` on.
    pub fn to_vec<T: Element>(&self, offset: usize, len: usize) -> Vec<T> {
        let mut out = vec![T::default(); len];
        self.read(offset, &mut out);
        out
    }

    /// `len` elements from byte `offset` on: borrowed on a CPU, copied from a GPU. Panics if there are fewer, or the
    /// offset is not aligned.
    pub fn contents<T: Element>(&mut self, offset: usize, len: usize) -> Cow<'_, [T]> {
        match self.cuda {
            Some(_) => Cow::Owned(self.to_vec(offset, len)),
            None => Cow::Borrowed(self.elements_mut(offset, len)),
        }
    }

    /// Number `index` of a mailbox, which a kernel may be writing now.
    pub fn peek(&self, index: usize) -> i32 {
        assert!(self.mapped && 4 * index + 4 <= self.bytes, "number {index} of a mailbox");
        // SAFETY: the number lies in memory of the host; it is written whole, and read again each time.
        unsafe { self.ptr.as_ptr().cast::<i32>().add(index).read_volatile() }
    }

    /// Sets number `index` of a mailbox, which no kernel may be writing now.
    pub fn poke(&self, index: usize, value: i32) {
        assert!(self.mapped && 4 * index + 4 <= self.bytes, "number {index} of a mailbox");
        // SAFETY: the number lies in memory of the host, and the caller keeps kernels away from it.
        unsafe { self.ptr.as_ptr().cast::<i32>().add(index).write_volatile(value) }
    }

    /// Sets every byte to zero.
    pub fn clear(&self) {
        self.fill(0);
    }

    /// Sets every byte to `byte`.
    pub fn fill(&self, byte: u8) {
        // SAFETY: the whole buffer is ours, and nobody else uses it now.
        unsafe {
            match &self.cuda {
                Some(cuda) => cuda.fill(self.address(), byte, self.bytes),
                None => std::ptr::write_bytes(self.ptr.as_ptr(), byte, self.bytes),
            }
        }
    }

    /// `len` bytes of a CPU's buffer from byte `offset` on, to fill in place.
    fn bytes_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.bytes) && self.cuda.is_none());
        // SAFETY: the range lies inside the buffer, which is the host's, and `&mut self` makes the borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().add(offset), len) }
    }

    /// `len` elements of a CPU's buffer from byte `offset` on, to fill in place.
    fn elements_mut<T: Element>(&mut self, offset: usize, len: usize) -> &mut [T] {
        let end = len.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(offset));
        assert!(end.is_some_and(|end| end <= self.bytes) && offset.is_multiple_of(align_of::<T>()));
        assert!(self.cuda.is_none(), "device memory cannot be borrowed");
        // SAFETY: the range lies inside the buffer and is aligned, any bytes are a valid T, and `&mut self` makes the
        // borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().add(offset).cast(), len) }
    }
}

/// A place in a buffer, bound to an external tensor of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a> {
    /// The memory.
    pub buffer: &'a Buffer,
    /// Bytes from the buffer's start.
    pub offset: usize,
}

impl Device {
    /// The CPU with this many threads (`None`: all cores), at the instruction set that `HOGNOSE_ISA` names or the best.
    ///
    /// # Errors
    /// An instruction set that is unknown or not there.
    pub fn cpu(threads: Option<usize>) -> Result<Device, Error> {
        Ok(Device::Cpu(Arc::new(Cpu::new(threads)?)))
    }

    /// The first GPU or, where there is none that can be used, the CPU and a sentence that says why.
    ///
    /// # Errors
    /// As [`Device::cpu`].
    pub fn auto(threads: Option<usize>) -> Result<(Device, Option<String>), Error> {
        match Device::cuda(0) {
            Ok(device) => Ok((device, None)),
            Err(why) => Ok((Device::cpu(threads)?, Some(why.to_string()))),
        }
    }

    /// GPU number `ordinal`.
    ///
    /// # Errors
    /// [`Error::Cuda`]: a library that is missing, no such GPU.
    pub fn cuda(ordinal: usize) -> Result<Device, Error> {
        Ok(Device::Cuda(Arc::new(Cuda::open(ordinal)?)))
    }

    /// Zeroed memory on the device. Refuses more than is free, instead of running into the system's limit later.
    ///
    /// # Errors
    /// [`Error::Memory`], with what is needed and what is free.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer, Error> {
        if bytes >= LARGE {
            self.require(bytes as u64)?;
        }
        match self {
            Device::Cpu(_) => Buffer::host(bytes),
            Device::Cuda(cuda) => Buffer::device(cuda, bytes),
        }
    }

    /// Memory in which kernels of a GPU leave whole numbers that the host reads while they run on, without copies:
    /// [`Buffer::peek`]. On a CPU there is none.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on a CPU, [`Error::Cuda`] where memory is short.
    pub fn alloc_mailbox(&self, bytes: usize) -> Result<Buffer, Error> {
        let Device::Cuda(cuda) = self else {
            return Err(Error::Unsupported { op: "mailbox", message: "a CPU has none".into() });
        };
        let ptr = NonNull::new(cuda.alloc_mapped(bytes)? as *mut u8)
            .ok_or_else(|| Error::Cuda("memory at address 0".into()))?;
        Ok(Buffer { ptr, bytes, cuda: Some(cuda.clone()), mapped: true, not_sync: PhantomData })
    }

    /// Whether everything that was enqueued is done.
    ///
    /// # Errors
    /// What went wrong on a GPU.
    pub fn is_idle(&self) -> Result<bool, Error> {
        match self {
            Device::Cpu(_) => Ok(true),
            Device::Cuda(cuda) => cuda.is_idle(),
        }
    }

    /// Refuses to need more bytes than are free.
    pub fn require(&self, needed: u64) -> Result<(), Error> {
        let available = self.available_memory();
        if needed > available {
            return Err(Error::Memory { needed: human_bytes(needed), available: human_bytes(available) });
        }
        Ok(())
    }

    /// What the device can do, measured now: operations and bytes a second.
    pub fn measure_ceiling(&self) -> Ceiling {
        match self {
            Device::Cpu(cpu) => Ceiling::measure(cpu),
            Device::Cuda(cuda) => cuda.measure_ceiling(),
        }
    }

    /// The device in a few words, for records: `cpu, 2 threads, avx512`.
    pub fn describe(&self) -> String {
        match self {
            Device::Cpu(cpu) => format!("cpu, {} threads, {}", cpu.pool.threads(), cpu.isa),
            Device::Cuda(cuda) => format!("cuda, {}", cuda.properties().name),
        }
    }

    /// How matrices of weights lie in memory for inference.
    pub fn weight_layout(&self) -> MatrixLayout {
        match self {
            Device::Cpu(_) => MatrixLayout::Panels,
            Device::Cuda(_) => MatrixLayout::Rows,
        }
    }

    /// Waits until everything that was enqueued is done.
    ///
    /// # Errors
    /// What went wrong on a GPU since the last wait.
    pub fn synchronize(&self) -> Result<(), Error> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Cuda(cuda) => cuda.synchronize(),
        }
    }

    /// Bytes of a matrix `[rows, cols]` in this type and layout.
    pub fn matrix_bytes(&self, dtype: DType, layout: MatrixLayout, rows: usize, cols: usize) -> usize {
        match (layout, self) {
            (MatrixLayout::Panels, Device::Cpu(cpu)) => match dtype {
                DType::Q8_0 | DType::Q4_K | DType::Q6_K => gemm::blocks_len(dtype, cols, rows),
                DType::BF16 => 2 * gemm::packed_len::<bf16>(cpu.isa, cols, rows),
                DType::F32 | DType::I32 => 4 * gemm::packed_len::<f32>(cpu.isa, cols, rows),
            },
            _ => rows * dtype.row_bytes(cols),
        }
    }

    /// Whether the device computes with weights of this type.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where it does not.
    pub fn check_weights(&self, dtype: DType) -> Result<(), Error> {
        match (self, dtype.blocks()) {
            (Device::Cuda(_), Some(kind)) if kind != quant::Kind::Q8_0 => {
                let message =
                    format!("a GPU does not compute with weights in {dtype} yet; use q8_0 or bf16, or the CPU");
                Err(Error::Unsupported { op: "weights", message })
            }
            _ => Ok(()),
        }
    }

    /// Rows that lie together in every layout: the rows of a matrix from a multiple of this on may be written as a matrix
    /// of their own, [`Device::matrix_bytes`] of the rows before them behind its start.
    pub const ROW_GROUP: usize = 64;

    /// Stores a row-major matrix `[rows, cols]` at byte `offset` in the type and layout that a plan expects of an
    /// external tensor. Numbers are rounded to nearest where the type is narrower; see [`crate::quant`] for blocks.
    ///
    /// Panics if `values` has not `rows · cols` numbers, or if they do not fit into the buffer.
    pub fn write_matrix(
        &self,
        buffer: &mut Buffer,
        offset: usize,
        (dtype, layout): (DType, MatrixLayout),
        (rows, cols): (usize, usize),
        values: &[f32],
    ) {
        let bytes = self.matrix_bytes(dtype, layout, rows, cols);
        let weight = gemm::MatRef::new(values, rows, cols).t();
        match (layout, dtype, self) {
            (MatrixLayout::Rows, DType::Q8_0, _) => {
                let mut blocks = vec![0; bytes];
                for (row, to) in values.chunks(cols.max(1)).zip(blocks.chunks_mut(dtype.row_bytes(cols).max(1))) {
                    quant::encode(dtype, row, to);
                }
                self.write_blocks(buffer, offset, (dtype, layout), (rows, cols), &blocks);
            }
            (MatrixLayout::Panels, DType::Q8_0 | DType::Q4_K | DType::Q6_K, Device::Cpu(cpu)) => {
                let blocks = buffer.bytes_mut(offset, bytes);
                gemm::encode_blocks(&cpu.pool, dtype, values, (rows, cols), blocks);
            }
            (MatrixLayout::Rows, DType::Q4_K | DType::Q6_K, Device::Cpu(cpu)) => {
                let (row, blocks) = (dtype.row_bytes(cols), buffer.bytes_mut(offset, bytes));
                cpu.pool.chunks_mut(blocks, row, |at, blocks| {
                    quant::encode(dtype, &values[at / row * cols..][..cols], blocks);
                });
            }
            (MatrixLayout::Panels, DType::BF16, Device::Cpu(cpu)) => {
                gemm::pack_into::<f32, bf16>(&cpu.pool, cpu.isa, weight, buffer.elements_mut(offset, bytes / 2));
            }
            (MatrixLayout::Panels, _, Device::Cpu(cpu)) => {
                gemm::pack_into::<f32, f32>(&cpu.pool, cpu.isa, weight, buffer.elements_mut(offset, bytes / 4));
            }
            (_, DType::BF16, _) => {
                let narrow: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
                buffer.write(offset, &narrow);
            }
            _ => buffer.write(offset, values),
        }
    }

    /// Stores a matrix `[rows, cols]` that a file has in blocks, row after row ([`DType::row_bytes`]), as
    /// [`Device::write_matrix`] does, with the same numbers exactly.
    ///
    /// Panics if the type is none of blocks, if `blocks` has another size, or if they do not fit into the buffer.
    pub fn write_blocks(
        &self,
        buffer: &mut Buffer,
        offset: usize,
        (dtype, layout): (DType, MatrixLayout),
        (rows, cols): (usize, usize),
        blocks: &[u8],
    ) {
        assert_eq!(blocks.len(), rows * dtype.row_bytes(cols), "rows of blocks");
        match (layout, dtype, self) {
            (MatrixLayout::Panels, _, Device::Cpu(cpu)) => {
                let panels = buffer.bytes_mut(offset, self.matrix_bytes(dtype, layout, rows, cols));
                gemm::arrange_blocks(&cpu.pool, dtype, blocks, (rows, cols), panels);
            }
            (_, DType::Q8_0, _) => {
                let mut split = vec![0; blocks.len()];
                let rows = dtype.row_bytes(cols).max(1);
                blocks.chunks(rows).zip(split.chunks_mut(rows)).for_each(|(from, to)| quant::split_q8_0(from, to));
                buffer.write_bytes(offset, &split);
            }
            _ => buffer.write_bytes(offset, blocks),
        }
    }

    /// Bytes of memory that are free now.
    pub fn available_memory(&self) -> u64 {
        match self {
            Device::Cpu(_) => available_memory(),
            Device::Cuda(cuda) => cuda.available_memory(),
        }
    }

    /// Places the tensors of a graph for this device.
    ///
    /// # Errors
    /// A graph that reads an external's old value after a new one was stored over it.
    pub fn plan(&self, graph: crate::Graph) -> Result<Plan, Error> {
        match self {
            Device::Cpu(cpu) => Plan::new(graph, Target::Cpu(cpu)),
            Device::Cuda(cuda) => Plan::new(graph, Target::Cuda(cuda.properties())),
        }
    }

    /// Bytes that the memory bound to an external tensor of a plan must have.
    pub fn external_bytes(&self, plan: &Plan, t: TensorId) -> usize {
        let tensor = plan.graph().tensor(t);
        self.matrix_bytes(tensor.dtype, tensor.layout, tensor.rows, tensor.cols)
    }

    /// Memory for a plan's intermediate tensors. Refuses what the machine cannot hold, before anything runs.
    ///
    /// # Errors
    /// [`Error::Memory`], with what is needed and what is free.
    pub fn arena(&self, plan: &Plan) -> Result<Buffer, Error> {
        self.require(plan.arena_bytes() as u64)?;
        self.alloc(plan.arena_bytes())
    }

    /// Runs a plan: `bindings[i]` is the memory of external `i`.
    ///
    /// # Errors
    /// [`Error::Plan`] and [`Error::Binding`]: another number of bindings than of externals, an arena or a
    /// binding that is too small, memory that overlaps.
    pub fn run(&self, plan: &Plan, arena: &Buffer, bindings: &[Slice<'_>]) -> Result<(), Error> {
        let externals = self.check_bindings(plan, arena, bindings)?;
        // SAFETY: `check_bindings` has seen that every external fits its memory, that none overlaps another and that
        // the arena is large enough; buffers are not Sync, so no other thread touches them meanwhile.
        match self {
            Device::Cpu(cpu) => unsafe { plan.run_cpu(cpu, arena.ptr.as_ptr(), &externals) },
            Device::Cuda(cuda) => cuda.run(plan, arena.ptr.as_ptr(), &externals)?,
        }
        Ok(())
    }

    /// Does everything for a later run of a plan with this memory that may need memory itself: a GPU compiles and
    /// captures it now.
    ///
    /// # Errors
    /// As [`Device::run`].
    pub fn prepare(&self, plan: &Plan, arena: &Buffer, bindings: &[Slice<'_>]) -> Result<(), Error> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Cuda(cuda) => {
                let externals = self.check_bindings(plan, arena, bindings)?;
                cuda.prepare(plan, arena.ptr.as_ptr(), &externals)
            }
        }
    }

    /// Runs a plan for a GPU on the memory of this CPU, by emulation; see [`crate::cuda::emulator`].
    #[cfg(test)]
    pub(crate) fn emulate(
        &self,
        plan: &Plan,
        gpu: &crate::cuda::Properties,
        arena: &Buffer,
        bindings: &[Slice<'_>],
        reversed: bool,
    ) -> Result<(), Error> {
        let externals = self.check_bindings(plan, arena, bindings)?;
        let mut collected = Launcher::collect(gpu);
        plan.run_cuda(&mut collected, arena.ptr.as_ptr(), &externals)?;
        let mut launcher = Launcher::emulate(collected, reversed)?;
        let mut result = Ok(());
        plan.each(arena.ptr.as_ptr(), &externals, |node, io| {
            if result.is_ok() {
                let memory = arena.ptr.as_ptr()..arena.ptr.as_ptr().wrapping_add(arena.bytes);
                io.spoil(&memory);
                result = node.op.run_cuda(io, &mut launcher);
            }
        });
        result
    }

    /// Seconds that each op of a plan takes by itself, in order, with the op's name: the fastest of some runs. Ops that
    /// update memory in place do so at every run.
    ///
    /// # Errors
    /// As [`Device::run`].
    pub fn profile(
        &self,
        plan: &Plan,
        arena: &Buffer,
        bindings: &[Slice<'_>],
    ) -> Result<Vec<(&'static str, f64)>, Error> {
        let externals = self.check_bindings(plan, arena, bindings)?;
        // Everything is compiled, chosen and computed once before it is timed.
        self.run(plan, arena, bindings)?;
        self.synchronize()?;
        let mut found = Vec::new();
        let mut result = Ok(());
        plan.each(arena.ptr.as_ptr(), &externals, |node, io| {
            if result.is_ok() {
                let seconds = match self {
                    Device::Cpu(cpu) => {
                        let start = Instant::now();
                        node.op.run_cpu(io, cpu);
                        Ok(start.elapsed().as_secs_f64())
                    }
                    Device::Cuda(cuda) => cuda.fastest(|cuda| node.op.run_cuda(io, &mut Launcher::run(cuda))),
                };
                result = seconds.map(|seconds| found.push((node.op.name(), seconds)));
            }
        });
        result.map(|()| found)
    }

    /// Whether memory belongs to this device.
    fn owns(&self, buffer: &Buffer) -> bool {
        match (self, &buffer.cuda) {
            (Device::Cpu(_), None) => true,
            (Device::Cuda(own), Some(other)) => Arc::ptr_eq(own, other),
            _ => false,
        }
    }

    /// Addresses of the bound externals, after checking sizes and overlaps.
    fn check_bindings(&self, plan: &Plan, arena: &Buffer, bindings: &[Slice<'_>]) -> Result<Vec<*mut u8>, Error> {
        let externals = plan.graph().externals();
        if externals.len() != bindings.len() {
            return Err(Error::Plan(format!("{} externals, but {} bindings", externals.len(), bindings.len())));
        }
        if arena.bytes < plan.arena_bytes() {
            return Err(Error::Plan(format!("the arena has {} bytes of {}", arena.bytes, plan.arena_bytes())));
        }
        let mut ranges = Vec::with_capacity(bindings.len() + 1);
        ranges.push((arena.ptr.as_ptr() as usize, arena.bytes, "the arena"));
        for (external, slice) in externals.iter().zip(bindings) {
            if !self.owns(slice.buffer) {
                let message = "its memory belongs to another device".to_string();
                return Err(Error::Binding { name: external.name.clone(), message });
            }
            let bytes = self.external_bytes(plan, external.tensor);
            if slice.offset.checked_add(bytes).is_none_or(|end| end > slice.buffer.bytes) || slice.offset % 4 != 0 {
                let message = format!(
                    "needs {bytes} bytes from byte {} of a buffer of {} bytes, aligned to 4",
                    slice.offset, slice.buffer.bytes
                );
                return Err(Error::Binding { name: external.name.clone(), message });
            }
            if bytes > 0 {
                ranges.push((slice.buffer.ptr.as_ptr() as usize + slice.offset, bytes, external.name.as_str()));
            }
        }
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if pair[0].0 + pair[0].1 > pair[1].0 {
                let message = format!("overlaps the memory of {}", pair[0].2);
                return Err(Error::Binding { name: pair[1].2.to_string(), message });
            }
        }
        Ok(bindings.iter().map(|s| s.buffer.ptr.as_ptr().wrapping_add(s.offset)).collect())
    }
}

/// Memory that new allocations can use without swapping: `MemAvailable` on Linux, elsewhere no limit is known.
fn available_memory() -> u64 {
    let known = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    known.map_or(u64::MAX, |kib| kib * 1024)
}
