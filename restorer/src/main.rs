//! `pitr-restore`: parses the command line, runs it, turns the outcome into the contract's exit code.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // What the catalog finds damaged is said by the command that met it.
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| {
                tracing_subscriber::EnvFilter::new("warn,repository::catalog=off")
            }),
        )
        .init();
    restorer::cli::run(restorer::cli::Cli::parse())
}
