//! `make bench`: compares our `archive_command` and `restore_command` with pgBackRest's and `cp`.
#![expect(clippy::print_stdout, reason = "it reports to a person")]

use anyhow::Result;
use benches::{archive_commands::ArchiveCommands, flags};
use testbed::tools::server;

fn main() -> Result<()> {
    let mut job = ArchiveCommands {
        segments: 75,
        rounds: 3,
    };
    flags::each(&["--segments", "--rounds"], |name, value| {
        match name {
            "--segments" => job.segments = value.parse()?,
            _ => job.rounds = value.parse()?,
        }
        Ok(())
    })?;
    // The newest version that the pgBackRest of Debian 12 supports.
    let bin = server(15)?;
    let measured = job.measure(&bin, &|text| println!("{text}"))?;
    println!("\n{}", measured.tables());
    Ok(())
}
