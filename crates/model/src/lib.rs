//! Configurations, blocks, checkpoint formats, tokenizers and states.

pub mod checkpoint;
pub mod config;
pub mod hub;
pub mod init;
pub mod presets;
pub mod tokenizer;
