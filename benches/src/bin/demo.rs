//! `make demo`: runs the main job for a person to watch. Ends automatically and removes its files.
#![expect(clippy::print_stdout, reason = "it is a demonstration")]

use std::{
    io::IsTerminal,
    net::TcpListener,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use testbed::{
    main_job::{Job, run},
    tools::servers,
};

/// The number of steps that the job reports.
const STEPS: u64 = 12;

fn main() -> Result<()> {
    let (major, bin) = servers()
        .pop()
        .context("no PostgreSQL server is installed; run `make install-tools`")?;
    println!("Tidemark: the main job on PostgreSQL {major}");
    let job = Job {
        bin,
        segment_mib: 16,
        checksums: true,
        wal_compression: "off",
        clients: 4,
        load: Duration::from_secs(10),
        kill_archiver: false,
        kills: 0,
        standbys: "tidemark",
        synchronous_commit: "on",
        http: http_address().to_owned(),
    };
    let began = Instant::now();
    let terminal = std::io::stderr().is_terminal();
    let bar = if terminal {
        ProgressBar::new(STEPS)
    } else {
        ProgressBar::hidden()
    };
    bar.set_style(ProgressStyle::with_template(
        "{bar:30} {pos}/{len} {elapsed} {msg}",
    )?);
    bar.enable_steady_tick(Duration::from_millis(100));
    let say = |text: &str| {
        let line = format!("{:6.1} s  {text}", began.elapsed().as_secs_f64());
        if terminal {
            bar.println(&line);
            bar.set_message(text.to_owned());
            bar.inc(1);
        } else {
            println!("{line}");
        }
    };
    let outcome = run(&job, &say)?;
    bar.finish_and_clear();
    println!();
    println!(
        "last commit: {} acknowledged, {} restored, 0 acknowledged transfers lost, the books balance",
        outcome.latest.acknowledged, outcome.latest.present
    );
    println!(
        "middle:      {} acknowledged by then, {} restored, none lost, nothing later is there",
        outcome.middle.acknowledged, outcome.middle.present
    );
    println!(
        "recovery:    {:.1} s from the kill until the restored server answered",
        outcome.recovery.as_secs_f64()
    );
    println!();
    println!("On your own server:");
    println!(
        "  wal-archiver run     --conninfo 'host=… user=…' --repository file:///backup --spool /var/spool/tidemark"
    );
    println!("  wal-archiver backup  --conninfo 'host=… user=…' --repository file:///backup");
    println!("  pitr-restore --repository file:///backup --target-time '10 minutes ago' --dry-run");
    Ok(())
}

/// The dashboard's usual address, or any other if that is in use.
fn http_address() -> &'static str {
    const USUAL: &str = "127.0.0.1:8432";
    match TcpListener::bind(USUAL) {
        Ok(_) => USUAL,
        Err(_) => "127.0.0.1:0",
    }
}
