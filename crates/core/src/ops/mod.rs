//! The ops: a closed, small set. Each folder or file holds one op's formula, shapes, builder, gradient, plain
//! reference and CPU kernels; `docs/adding-an-op.md` says how to add one.

pub mod adamw;
pub mod all_reduce;
pub mod attention;
pub mod causal_conv1d;
pub mod cross_entropy;
pub mod diagonal_scan;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
pub mod gated_rms_norm;
pub mod gather_rows;
pub mod layout;
pub mod linear;
pub mod lti_discretise;
pub mod lti_scan;
pub mod norm;
pub mod permute_rows;
pub mod reverse_rows;
pub mod rnn;
pub mod rotary;
pub mod sample;
pub mod scan_step;
pub mod selective_scan;
pub mod ssd;
pub mod ssd_step;
pub mod step_embedding;
pub mod step_linear;
pub mod swiglu;

mod tasks;
mod vectors;

#[cfg(test)]
mod example;
#[cfg(test)]
pub(crate) mod testing;
