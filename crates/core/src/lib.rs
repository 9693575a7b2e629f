//! The core of hognose: a closed set of ops for state space models, the graph that records them, its backward
//! transformation, the plan that places every tensor in one arena, and the devices that run it.
//!
//! Activations are two-dimensional, `[tokens, width]`, row-major: a *pack* of tokens ([`Pack`]) cut into segments,
//! without batch dimension and without padding. See `ARCHITECTURE.md` at the root of the repository.

pub mod cpu;
pub mod cuda;
pub mod device;
pub mod dtype;
pub mod error;
pub mod graph;
pub mod group;
pub mod meeting;
pub mod ops;
pub mod pack;
pub mod plan;
pub mod quant;
pub mod readback;
pub mod rng;

pub use device::{Buffer, Device, Slice};
pub use dtype::{DType, Element};
pub use error::Error;
pub use graph::{Graph, TensorId};
pub use group::Member;
pub use pack::Pack;
pub use plan::Plan;
pub use readback::Readback;
