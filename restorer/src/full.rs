//! `pitr-restore-full`, which `pitr-restore` executes: parses the command line, runs the command,
//! and returns the contract's exit code.
//!
//! Invariant: as `restore_command` it never exits with a code that PostgreSQL interprets as the end
//! of the archive unless the file is proved absent. This also holds for wrong arguments and panics.

use std::{io::IsTerminal, panic, process::ExitCode};

/// The exit code with which PostgreSQL stops recovery, which can be resumed later.
const NO_ANSWER: u8 = 255;

/// The log shows warnings of our own crates and only errors of libraries, as in `wal-archiver`. The
/// catalog's messages about damaged objects are off, because the command that needs a damaged
/// object reports it.
const LOG: &str = "error,restorer=warn,quick=warn,repository=warn,wal_format=warn,catalog=off,\
                   catalog_unusable=warn";

fn main() -> ExitCode {
    // The catalog's own messages are off: the command that needs a damaged object reports it.
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        // As `restore_command`, this program writes into PostgreSQL's log.
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("TIDEMARK_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(LOG)),
        )
        .init();
    let fetching = std::env::args_os().any(|argument| argument == "wal-fetch");
    let outcome = panic::catch_unwind(|| restorer::cli::run(std::env::args_os().collect()));
    let code = outcome.unwrap_or(ExitCode::from(101));
    let delivered_or_absent = [ExitCode::SUCCESS, ExitCode::from(1)].contains(&code);
    if fetching && !delivered_or_absent {
        return ExitCode::from(NO_ANSWER);
    }
    code
}
