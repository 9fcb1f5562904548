//! The decoder against WAL: made here, where a case has to be built byte by byte, and PostgreSQL's own from `fixtures`; and the
//! parsers of a cluster's other files.
#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "tests panic on purpose"
)]

mod cluster_files;
mod contrecords;
mod corruption;
mod golden;
mod streaming;
mod waldump;
mod writer;
