//! The ops: a closed, small set. Each folder or file holds one op's formula, shapes, builder, gradient, plain
//! reference and CPU kernels; `docs/adding-an-op.md` says how to add one.

pub mod elementwise;
pub mod gated_rms_norm;
pub mod layout;
pub mod ssd;
pub mod swiglu;

#[cfg(test)]
pub(crate) mod testing;
