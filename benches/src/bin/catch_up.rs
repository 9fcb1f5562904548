//! `make bench`: compares catch-up streaming with `pg_receivewal` in one run, as ratios.
#![expect(clippy::print_stdout, reason = "it reports to a person")]

use anyhow::Result;
use benches::{catch_up::CatchUp, flags};
use testbed::tools::server;

fn main() -> Result<()> {
    let mut job = CatchUp {
        wal_bytes: 1_000_000_000,
        runs: 5,
        wal_compression: "off".to_owned(),
    };
    let mut major = 17;
    let known = ["--megabytes", "--runs", "--wal-compression", "--major"];
    flags::each(&known, |name, value| {
        match name {
            "--megabytes" => job.wal_bytes = value.parse::<u64>()? * 1_000_000,
            "--runs" => job.runs = value.parse()?,
            "--wal-compression" => job.wal_compression = value,
            _ => major = value.parse()?,
        }
        Ok(())
    })?;
    let measured = job.measure(&server(major)?, &|text| println!("{text}"))?;
    println!("\n{}\n{}", measured.figures(), measured.table()?);
    Ok(())
}
