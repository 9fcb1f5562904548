//! `wal-archiver-full`, which `wal-archiver` becomes: parses the command line, runs the command,
//! and turns its outcome into an exit code.

use std::{io::IsTerminal, process::ExitCode};

use archiver::cli::{Cli, run};
use clap::Parser;
use repository::with_command_hint;
use tracing_subscriber::EnvFilter;

/// The default log filter: our own events, and only errors of libraries. The SDK of S3 logs each
/// client that it sets up, and logs as a warning what our own error says too. `TIDEMARK_LOG=debug`
/// shows everything.
const LOG: &str = "error,archiver=info,dashboard=info,intake=info,quick=info,replication=info,repository=info,status=info,\
                   catalog=info,catalog_unusable=info,wal_format=info";

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => with_command_hint(error).exit(),
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            EnvFilter::try_from_env("TIDEMARK_LOG").unwrap_or_else(|_| EnvFilter::new(LOG)),
        )
        .with_target(false)
        .init();
    // Other users get access to nothing. A group has access only to directories that are shared
    // with it (`repository::access`).
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o007));
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            archiver::cli::report(&error);
            ExitCode::from(error.exit_kind() as u8)
        }
    }
}
