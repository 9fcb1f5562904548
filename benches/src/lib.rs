//! The test harness: throwaway PostgreSQL servers, our own programs beside them, and a bank ledger that remembers
//! outside PostgreSQL what was acknowledged. The demo, the end-to-end tests and the benchmarks are made of it.

pub mod archive_commands;
pub mod bucket_proxy;
pub mod catch_up;
pub mod cluster;
pub mod commit_latency;
pub mod encrypted_job;
pub mod fault_proxy;
pub mod flags;
pub mod host_loss;
pub mod ledger;
pub mod main_job;
pub mod moto;
pub mod object_store;
pub mod programs;
pub mod restored;
pub mod tools;
pub mod truth;
pub mod usage;
pub mod waldump;
pub mod workload;
