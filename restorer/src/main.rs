//! `pitr-restore`: hands PostgreSQL a segment that lies ready; becomes `pitr-restore-full` for everything else.
//!
//! Invariant: as `restore_command` it never ends with a code that PostgreSQL takes for the end of the archive.

use std::{
    io::{self, Write},
    panic,
    process::ExitCode,
};

/// PostgreSQL stops recovery where it can be resumed.
const NO_ANSWER: u8 = 255;

fn main() -> ExitCode {
    if panic::catch_unwind(quick::fetch::delivered).unwrap_or(false) {
        return ExitCode::SUCCESS;
    }
    let problem = quick::whole::become_whole(&[]);
    drop(writeln!(io::stderr(), "pitr-restore: {problem}"));
    ExitCode::from(NO_ANSWER)
}
