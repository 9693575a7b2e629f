//! Data, schedules, the trainer and its records.
