//! The benchmarks next to the peers.

pub mod archive_commands;
pub mod catch_up;
pub mod commit_latency;
pub mod flags;
