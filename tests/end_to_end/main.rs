//! The whole program, from its command line to its files. One binary, because linking takes longer than testing.

mod bidirectional;
mod checkpoints;
mod cli;
mod common;
mod cuts;
mod explain;
mod gguf;
mod hybrids;
mod oracles;
mod perplexity;
mod steps;
mod streams;
mod training;
