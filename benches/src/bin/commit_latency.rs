//! `make bench`: compares the latency of a commit that waits for the archiver with `pg_receivewal
//! --synchronous`, as ratios.
#![expect(clippy::print_stdout, reason = "it reports to a person")]

use anyhow::Result;
use benches::{
    commit_latency::{CommitLatency, table},
    flags,
};
use testbed::tools::server;

fn main() -> Result<()> {
    let mut job = CommitLatency {
        clients: vec![1, 16, 64],
        seconds: 5,
        runs: 3,
    };
    flags::each(&["--seconds", "--runs"], |name, value| {
        match name {
            "--seconds" => job.seconds = value.parse()?,
            _ => job.runs = value.parse()?,
        }
        Ok(())
    })?;
    let measured = job.measure(&server(17)?, &|text| println!("{text}"))?;
    println!("\n{}", table(&measured));
    Ok(())
}
