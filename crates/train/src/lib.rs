//! Training: data, schedules, the trainer, its checkpoints and its records.
//!
//! | module | subject |
//! |---|---|
//! | [`corpus`] | the text that ships inside the library |
//! | [`data`] | documents from files, the split, packing into batches, shuffling, evaluation windows |
//! | [`setup`] | from a configuration to model, tokenizer and data |
//! | [`step`] | one training step as two plans: gradients and update |
//! | [`trainer`] | the loop; [`evaluate`] and [`checkpoint`] are its parts, [`report`] is what it tells |
//! | `worker`, `ranks` | what one device does in a step, and several devices that train together |
//! | `memory` | what a run needs on a device, and what to change where that is too much |
//! | [`perplexity`] | what predicting texts costs a model in its form for inference |
//! | [`baseline`] | what gzip and xz need for the held-out documents |
//! | [`schedule`] | learning rates |
//! | [`config`] | the configuration file of a run |
//! | [`records`] | metrics as JSON lines and TensorBoard events, the picture of the loss curves |

pub mod baseline;
pub mod checkpoint;
pub mod config;
pub mod corpus;
pub mod data;
pub mod error;
pub mod evaluate;
mod memory;
pub mod perplexity;
mod ranks;
pub mod records;
pub mod report;
pub mod schedule;
pub mod setup;
pub mod step;
pub mod trainer;
mod worker;

use hognose_model::atomic;

pub use error::Error;
