//! `wal-archiver`: asks the daemon to archive a file, which PostgreSQL does for every segment; becomes `wal-archiver-full` for
//! everything else.

use std::{
    io::{self, Write},
    process::ExitCode,
};

fn main() -> ExitCode {
    let problem = match quick::push::asked() {
        Some(Ok(())) => return ExitCode::SUCCESS,
        Some(Err(problem)) => problem,
        None => quick::whole::become_whole(),
    };
    drop(writeln!(io::stderr(), "wal-archiver: {problem}"));
    ExitCode::FAILURE
}
