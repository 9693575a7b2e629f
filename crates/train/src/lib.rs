//! Data, schedules, the trainer and its records.
//!
//! | module | subject |
//! |---|---|
//! | [`corpus`] | the text that ships inside the library |
//! | [`data`] | documents from files, the split, packing into batches, shuffling, evaluation windows |
//! | [`baseline`] | what gzip and xz need for the held-out documents |
//! | [`schedule`] | learning rates |
//! | [`config`] | the configuration file of a run |
//! | [`records`] | metrics as JSON lines and TensorBoard events, the picture of the loss curves |
//! | [`atomic`] | files that are either the old or the new one, never half of it |

pub mod atomic;
pub mod baseline;
pub mod config;
pub mod corpus;
pub mod data;
pub mod records;
pub mod schedule;
