//! Keeps an archive in order: retention, locks, our slots on standbys, scheduled
//! base backups and drills, and the outcomes of runs.

pub mod expire;
pub(crate) mod locks;
pub(crate) mod outcomes;
pub(crate) mod schedule;
pub(crate) mod standby_slots;
