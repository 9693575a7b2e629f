//! Matrix products through cuBLASLt, with the algorithm for each shape chosen once.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::{result, sys};

use super::{Cuda, cuda_error};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::Mat;

/// Scratch memory of cuBLASLt, as NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// out = a · b (+ start), where a and b are row-major matrices or transposed ones.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// `[m, n]`
    pub out: Mat,
    /// `[m, k]`, or `[k, m]` if transposed.
    pub a: Mat,
    /// Whether a is transposed.
    pub a_transposed: bool,
    /// `[k, n]`, or `[n, k]` if transposed.
    pub b: Mat,
    /// Whether b is transposed.
    pub b_transposed: bool,
    /// Added to each row `[1, n]`, f32 or of out's type.
    pub bias: Option<Mat>,
    /// Added to the product `[m, n]`, of out's type; it may be `out` itself.
    pub start: Option<Mat>,
}

impl Product {
    /// out = a · b, each with whether it is transposed.
    pub fn new(out: Mat, (a, a_transposed): (Mat, bool), (b, b_transposed): (Mat, bool)) -> Product {
        Product { out, a, a_transposed, b, b_transposed, bias: None, start: None }
    }
}

/// What decides an algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    sizes: [usize; 3],
    strides: [usize; 4],
    types: [DType; 3],
    transposed: [bool; 2],
    start: bool,
    bias: Option<DType>,
    alignment: [u32; 4],
}

#[derive(Debug)]
struct Chosen {
    desc: sys::cublasLtMatmulDesc_t,
    /// Of a, b, the start and out.
    layouts: [sys::cublasLtMatrixLayout_t; 4],
    algo: sys::cublasLtMatmulAlgo_t,
}

/// The library's handle and the algorithms chosen so far.
#[derive(Debug)]
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    chosen: HashMap<Shape, Chosen>,
    workspace: u64,
}

// SAFETY: the library's handles may be used from any thread; what changes is behind a Mutex.
unsafe impl Send for State {}

fn status(what: &str, error: result::CublasError) -> Error {
    cuda_error(format!("cuBLASLt, {what}: {error}"))
}

/// The largest power of two up to 256 that divides an address.
fn alignment(m: &Mat) -> u32 {
    1 << (m.address() | 256).trailing_zeros()
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        DType::I32 => sys::cudaDataType::CUDA_R_32I,
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        DType::Q8_0 | DType::Q4_K | DType::Q6_K => unreachable!("the library multiplies no blocks"),
    }
}

impl Blas {
    pub(super) fn new() -> Result<Blas, Error> {
        let handle = result::create_handle().map_err(|e| status("starting", e))?;
        Ok(Blas { handle, state: Mutex::new(State::default()) })
    }

    /// Enqueues a product.
    pub(super) fn run(&self, cuda: &Cuda, p: &Product) -> Result<(), Error> {
        let (m, n) = (p.out.rows, p.out.cols);
        let k = if p.a_transposed { p.a.rows } else { p.a.cols };
        if m == 0 || n == 0 {
            return Ok(());
        }
        let start = p.start.unwrap_or(p.out);
        let shape = Shape {
            sizes: [m, n, k],
            strides: [p.a.stride, p.b.stride, start.stride, p.out.stride],
            types: [p.a.dtype, p.b.dtype, p.out.dtype],
            transposed: [p.a_transposed, p.b_transposed],
            start: p.start.is_some(),
            bias: p.bias.map(|b| b.dtype),
            alignment: [p.a, p.b, start, p.out].map(|m| alignment(&m)),
        };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.workspace == 0 {
            return Err(cuda_error("the workspace of the matrix product is missing".into()));
        }
        let workspace = state.workspace;
        let chosen = match state.chosen.entry(shape) {
            Entry::Occupied(chosen) => chosen.into_mut(),
            Entry::Vacant(place) => place.insert(self.choose(&shape)?),
        };
        let alpha = 1.0f32;
        let beta = if p.start.is_some() { 1.0f32 } else { 0.0 };
        // SAFETY: descriptors and layouts live in `chosen`; addresses were checked when the plan was bound. The library
        // is column-major: a row-major product is the product of the transposed operands in the other order.
        unsafe {
            if let Some(bias) = p.bias {
                let address = bias.address();
                set_desc(
                    chosen.desc,
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                    &address,
                )?;
            }
            let [a, b, c, out] = chosen.layouts;
            result::matmul(
                self.handle,
                chosen.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                p.b.address() as *const c_void,
                b,
                p.a.address() as *const c_void,
                a,
                start.address() as *const c_void,
                c,
                p.out.address() as *mut c_void,
                out,
                &raw const chosen.algo,
                workspace as *mut c_void,
                WORKSPACE,
                cuda.stream().cast(),
            )
        }
        .map_err(|e| status(&format!("a product of {m} x {k} x {n}"), e))
    }

    /// Makes sure of the library's scratch memory: outside of a capture, where memory can be allocated.
    pub(crate) fn prepare(&self, cuda: &Cuda) -> Result<(), Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.workspace == 0 {
            state.workspace = cuda.alloc(WORKSPACE)?;
        }
        Ok(())
    }

    /// Asks the library for its best algorithm.
    fn choose(&self, s: &Shape) -> Result<Chosen, Error> {
        use sys::cublasLtMatmulDescAttributes_t as Desc;
        use sys::cublasLtMatmulPreferenceAttributes_t as Pref;
        let [m, n, k] = s.sizes;
        let describe = |e| status(&format!("a product of {m} x {k} x {n}"), e);
        // True f32: no tf32, whose products have 10 bits.
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F);
        // Row-major [rows, cols] with a stride is column-major [cols, rows] with that leading dimension.
        let layout = |dtype, rows: usize, cols: usize, transposed: bool, stride: usize| {
            let (rows, cols) = if transposed { (cols, rows) } else { (rows, cols) };
            result::create_matrix_layout(data_type(dtype), cols as u64, rows as u64, stride.max(1) as i64)
                .map_err(describe)
        };
        // SAFETY: every handle is used only after it was made; attributes have the sizes that the library expects.
        unsafe {
            let desc = result::create_matmul_desc(compute, scale).map_err(describe)?;
            // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1.
            let op = i32::from;
            set_desc(desc, Desc::CUBLASLT_MATMUL_DESC_TRANSA, &op(s.transposed[1]))?;
            set_desc(desc, Desc::CUBLASLT_MATMUL_DESC_TRANSB, &op(s.transposed[0]))?;
            if let Some(dtype) = s.bias {
                set_desc(desc, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
                set_desc(desc, Desc::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &data_type(dtype))?;
            }
            let a = layout(s.types[0], m, k, s.transposed[0], s.strides[0])?;
            let b = layout(s.types[1], k, n, s.transposed[1], s.strides[1])?;
            let c = layout(s.types[2], m, n, false, s.strides[2])?;
            let out = layout(s.types[2], m, n, false, s.strides[3])?;
            let pref = result::create_matmul_pref().map_err(describe)?;
            let set_pref = |attribute, value: &u32| {
                result::set_matmul_pref_attribute(pref, attribute, (value as *const u32).cast(), 4).map_err(describe)
            };
            let bytes = WORKSPACE;
            result::set_matmul_pref_attribute(
                pref,
                Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                size_of::<usize>(),
            )
            .map_err(describe)?;
            set_pref(Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &s.alignment[1])?;
            set_pref(Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &s.alignment[0])?;
            set_pref(Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &s.alignment[2])?;
            set_pref(Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &s.alignment[3])?;
            let heuristic =
                result::get_matmul_algo_heuristic(self.handle, desc, b, a, c, out, pref).map_err(describe)?;
            result::destroy_matmul_pref(pref).map_err(describe)?;
            Ok(Chosen { desc, layouts: [a, b, c, out], algo: heuristic.algo })
        }
    }
}

/// Sets an attribute of a product's descriptor.
///
/// # Safety
/// The descriptor was made, and T is the attribute's type.
unsafe fn set_desc<T>(
    desc: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<(), Error> {
    // SAFETY: the caller's.
    unsafe { result::set_matmul_desc_attribute(desc, attribute, (value as *const T).cast(), size_of::<T>()) }
        .map_err(|e| status("an attribute", e))
}
