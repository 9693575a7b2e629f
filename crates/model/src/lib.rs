//! Configurations, blocks, checkpoint formats, tokenizers and states.
