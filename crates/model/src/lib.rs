//! Models: configurations, the blocks they are made of, checkpoint formats, tokenizers and states.
//!
//! A [`session::Model`] is a [`config::ModelConfig`] with [`weights::Weights`] on a device; a [`session::Session`] runs
//! it on packs of tokens and holds the states of sequences. [`network`] writes a model as a graph.

pub mod atomic;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod hub;
pub mod init;
pub mod mixers;
pub mod network;
pub mod observe;
pub mod pattern;
pub mod presets;
pub mod scan_order;
pub mod session;
pub mod state;
pub mod steps;
pub mod tokenizer;
pub mod weights;

pub use error::Error;
