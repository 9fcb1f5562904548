//! `pitr-restore`: delivers a prefetched segment to PostgreSQL; executes `pitr-restore-full` for
//! everything else.
//!
//! Invariant: as `restore_command` it never exits with a code that PostgreSQL interprets as the end
//! of the archive.

use std::{
    io::{self, Write},
    panic,
    process::ExitCode,
};

/// The exit code with which PostgreSQL stops recovery, which can be resumed later.
const NO_ANSWER: u8 = 255;

fn main() -> ExitCode {
    if panic::catch_unwind(quick::fetch::delivered).unwrap_or(false) {
        return ExitCode::SUCCESS;
    }
    let problem = quick::whole::become_whole(&[]);
    drop(writeln!(io::stderr(), "pitr-restore: {problem}"));
    ExitCode::from(NO_ANSWER)
}
