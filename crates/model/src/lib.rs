//! Configurations, blocks, checkpoint formats, tokenizers and states.

pub mod config;
pub mod init;
pub mod presets;
