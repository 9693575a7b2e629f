//! The ops: a closed, small set. Each folder or file holds one op's formula, shapes, builder, gradient, plain
//! reference and CPU kernels; `docs/adding-an-op.md` says how to add one.

pub mod causal_conv1d;
pub mod elementwise;
pub mod layout;
pub mod selective_scan;
pub(crate) mod tasks;

#[cfg(test)]
pub(crate) mod testing;
