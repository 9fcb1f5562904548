//! `wal-archiver`: asks the daemon to archive a file, which PostgreSQL does for every segment; becomes `wal-archiver-full` for
//! everything else.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use quick::{
    push::{self, Asked},
    whole::become_whole,
};

fn main() -> ExitCode {
    let problem = match push::asked() {
        Asked::Answered(Ok(())) => return ExitCode::SUCCESS,
        Asked::Answered(Err(problem)) => problem,
        Asked::Alone => become_whole(&push::MEMORY),
        Asked::Other => become_whole(&[]),
    };
    drop(writeln!(io::stderr(), "wal-archiver: {problem}"));
    ExitCode::FAILURE
}
