//! Sampling and generation: token ids in, token ids out; texts only at the edge ([`text`]).

pub mod error;
pub mod generate;
pub mod sampling;
pub mod text;

pub use error::Error;
pub use generate::{Continued, Finish, GenerateOptions, Generated, generate, generate_all};
pub use sampling::{Sampler, Sampling};
