//! The status of each cluster: plain facts, and the judgement on them. No I/O, and no reference
//! into the archive.
//!
//! Modules in reading order: [`cluster_status`] (the facts that the archiver writes and any task
//! reads), [`rpo`] (the distance from the primary), [`report`] (the one document that every view
//! shows), [`light`] (facts and alerts become a state), [`alerts`] (a report becomes alerts).

pub mod alert;
pub mod alerts;
pub mod cluster_status;
pub mod details;
pub mod durable;
pub mod gap;
pub mod instruments;
pub mod light;
pub mod locate;
pub mod loss;
pub mod outcomes;
pub mod relation_names;
pub mod report;
pub mod rpo;
pub mod schedule;
pub mod standby;
pub mod state;
pub mod units;
