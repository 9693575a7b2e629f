//! The ops, their kernels, and the graph that plans and runs them.

pub mod cpu;
