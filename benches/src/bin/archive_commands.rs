//! `make bench`: `archive_command` and `restore_command` beside pgBackRest and `cp`.
#![expect(clippy::print_stdout, reason = "it reports to a person")]

use anyhow::{Context, Result};
use benches::{archive_commands::ArchiveCommands, tools::servers};

fn main() -> Result<()> {
    let mut job = ArchiveCommands {
        segments: 75,
        rounds: 3,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments
            .next()
            .with_context(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--segments" => job.segments = value.parse()?,
            "--rounds" => job.rounds = value.parse()?,
            _ => anyhow::bail!("unknown flag {name}; known: --segments, --rounds"),
        }
    }
    // The newest that the pgBackRest of Debian 12 knows.
    let (_, bin) = servers()
        .into_iter()
        .find(|(major, _)| *major == 15)
        .context("PostgreSQL 15 is not installed; run `make install-tools`")?;
    let measured = job.measure(&bin, &|text| println!("{text}"))?;
    println!("\n{}", measured.tables());
    Ok(())
}
