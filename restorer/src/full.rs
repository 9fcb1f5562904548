//! `pitr-restore-full`, which `pitr-restore` becomes: parses the command line, runs it, turns the
//! outcome into the contract's exit code.
//!
//! Invariant: as `restore_command` it never ends with a code that PostgreSQL takes for the end of
//! the archive, unless that is proved: neither when it is called wrongly, nor when it panics.

use std::{io::IsTerminal, panic, process::ExitCode};

/// PostgreSQL stops recovery where it can be resumed.
const NO_ANSWER: u8 = 255;

fn main() -> ExitCode {
    // The command that meets an object that the catalog finds damaged reports it.
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        // As restore_command it writes into PostgreSQL's log.
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("TIDEMARK_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,catalog=off")),
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
