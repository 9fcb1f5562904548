//! `make bench`: the latency of a commit that waits for us, beside `pg_receivewal --synchronous`, as ratios.
#![expect(clippy::print_stdout, reason = "it reports to a person")]

use anyhow::{Context, Result};
use benches::{
    commit_latency::{CommitLatency, table},
    tools::servers,
};

fn main() -> Result<()> {
    let mut job = CommitLatency {
        clients: vec![1, 16, 64],
        seconds: 5,
        runs: 3,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments
            .next()
            .with_context(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--seconds" => job.seconds = value.parse()?,
            "--runs" => job.runs = value.parse()?,
            _ => anyhow::bail!("unknown flag {name}; known: --seconds, --runs"),
        }
    }
    let (_, bin) = servers()
        .into_iter()
        .find(|(major, _)| *major == 17)
        .context("PostgreSQL 17 is not installed; run `make install-tools`")?;
    let measured = job.measure(&bin, &|text| println!("{text}"))?;
    println!("\n{}", table(&measured));
    Ok(())
}
