//! `wal-archiver-full`, which `wal-archiver` becomes: parses the command line, runs the command, and turns its outcome into
//! an exit code.

use std::{io::IsTerminal, process::ExitCode};

use archiver::cli::{Cli, run};
use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            EnvFilter::try_from_env("TIDEMARK_LOG").unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_target(false)
        .init();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            archiver::cli::report(&error);
            ExitCode::from(error.exit_kind() as u8)
        }
    }
}
