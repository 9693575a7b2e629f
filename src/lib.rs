//! State space models in Rust.
