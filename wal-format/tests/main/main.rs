//! The decoder against WAL: made here, where a case has to be built byte by byte, and PostgreSQL's own from `fixtures`.
#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "tests panic on purpose"
)]

mod contrecords;
mod corruption;
mod golden;
mod streaming;
mod waldump;
mod writer;
