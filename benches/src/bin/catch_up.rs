//! `make bench`: catch-up streaming beside `pg_receivewal`, in one run, as ratios.
#![expect(clippy::print_stdout, reason = "it reports to a person")]

use anyhow::{Context, Result};
use benches::{catch_up::CatchUp, tools::servers};

fn main() -> Result<()> {
    let mut job = CatchUp {
        wal_bytes: 1_000_000_000,
        runs: 5,
        wal_compression: "off".to_owned(),
    };
    let mut major = 17;
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments
            .next()
            .with_context(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--megabytes" => job.wal_bytes = value.parse::<u64>()? * 1_000_000,
            "--runs" => job.runs = value.parse()?,
            "--wal-compression" => job.wal_compression = value,
            "--major" => major = value.parse()?,
            _ => anyhow::bail!(
                "unknown flag {name}; known: --megabytes, --runs, --wal-compression, --major"
            ),
        }
    }
    let (_, bin) = servers()
        .into_iter()
        .find(|(installed, _)| *installed == major)
        .context("that PostgreSQL is not installed; run `make install-tools`")?;
    let measured = job.measure(&bin, &|text| println!("{text}"))?;
    println!("\n{}\n{}", measured.figures(), measured.table()?);
    Ok(())
}
