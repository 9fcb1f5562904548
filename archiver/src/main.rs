//! `wal-archiver`: what PostgreSQL starts for every segment. Asks the daemon to archive a file;
//! where none answers, and the repository is a plain folder, archives a segment itself; becomes
//! `wal-archiver-full` for everything else.
//!
//! Invariant: it ends well, or the whole program does the same again and says what is wrong.

use std::{
    io::{self, IsTerminal, Write},
    panic,
    path::Path,
    process::ExitCode,
};

use intake::push_alone;
use quick::{
    push::{self, Asked},
    whole::{become_whole, start_with},
};
use repository::{Repository, config::ClusterSettings};
use tracing::Level;
use wal_format::WalFileName;

fn main() -> ExitCode {
    let problem = match push::asked() {
        Asked::Answered(Ok(())) => return ExitCode::SUCCESS,
        Asked::Answered(Err(problem)) => problem,
        Asked::Alone(settings, path) => {
            if panic::catch_unwind(|| is_pushed(&settings, &path)).unwrap_or(false) {
                return ExitCode::SUCCESS;
            }
            become_whole(&push::MEMORY)
        }
        Asked::Other => become_whole(&[]),
    };
    drop(writeln!(io::stderr(), "wal-archiver: {problem}"));
    ExitCode::FAILURE
}

/// Pushes a segment into a plain folder. False when it is anything else, or fails.
fn is_pushed(settings: &ClusterSettings, path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let is_segment = name.is_some_and(|name| matches!(name.parse(), Ok(WalFileName::Segment(_))));
    // A log level other than the default is handled by the full program.
    if !is_segment || std::env::var_os("TIDEMARK_LOG").is_some() {
        return false;
    }
    let Ok(Some(repository)) = Repository::open_known_plain_folder(settings) else {
        return false;
    };
    start_with(&push::MEMORY);
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_max_level(Level::INFO)
        .with_target(false)
        .init();
    push_alone(settings, &repository, path).is_ok()
}
