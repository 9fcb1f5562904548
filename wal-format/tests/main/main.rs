//! Tests of the decoder with WAL that is built byte by byte here, and with WAL of real servers from
//! `fixtures`. Also tests of the parsers of a cluster's other files.
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
