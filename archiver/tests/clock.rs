//! An archiver whose host has a wrong clock: the displayed and archived times follow the server's
//! clock.

use std::process::Command;

use crate::support::{Place, Server, postgres_bin, store_goes_down, wait_flushed, wait_until};

/// The library that Debian's `faketime` preloads into a program with threads.
fn library() -> Option<String> {
    let folders = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"];
    let found = folders.map(|folder| format!("{folder}/faketime/libfaketimeMT.so.1"));
    let found = found
        .into_iter()
        .find(|path| std::path::Path::new(path).exists());
    if found.is_none() {
        assert!(
            std::env::var_os("CI").is_none(),
            "faketime is not installed; run `make install-tools`"
        );
        eprintln!("SKIPPED: faketime is not installed; run `make install-tools`");
    }
    found
}

/// Returns the archiver's report from an answer.
fn report(answer: &str) -> serde_json::Value {
    let (_, body) = answer.split_once("\r\n\r\n").expect("an answer");
    let all: serde_json::Value = serde_json::from_str(body).expect("JSON");
    let clusters = all["clusters"].as_array().or(all.as_array());
    clusters.expect("a list")[0].clone()
}

#[test]
fn the_rpo_and_the_window_follow_the_servers_clock() {
    let (Some(bin), Some(library)) = (postgres_bin(), library()) else {
        return;
    };
    for offset in ["-2h", "+2h"] {
        let server = Server::start(&bin, "");
        let place = Place::new();
        let command = || {
            let mut command: Command = place.command(&server.conninfo());
            command
                .env("LD_PRELOAD", &library)
                .env("FAKETIME", offset)
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            command
        };
        let backup = || command().arg("backup").output().expect("it runs");
        let archiver = place.run_with(command());
        archiver.wait_for_log("INFO streaming");
        crate::support::succeed("backup", &backup());
        server.write_wal(700);
        wait_flushed(&server, server.lsn());
        let shown = || report(&archiver.get("/api/v1/clusters"));
        let rpo = |report: &serde_json::Value| report["durable"]["remote"]["rpo_seconds"].as_f64();
        wait_until("nothing would be lost", || rpo(&shown()) == Some(0.0));
        wait_until("it says that a clock is wrong", || {
            shown()["alerts"].to_string().contains("PitrClockStep")
        });
        let log = archiver.log();
        let ours = log.lines().next().expect("a line")[..13].to_owned();
        let theirs = server.sql("SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24')");
        assert_ne!(ours, theirs, "the archiver's clock is not wrong");

        // The age of unstored WAL counts from the time when the server wrote it, not from the
        // difference between the clocks.
        let comes_back = store_goes_down(&place);
        server.write_wal(10);
        wait_until("something would be lost", || rpo(&shown()) > Some(0.0));
        let age = rpo(&shown()).expect("it is known");
        assert!(age < 1800.0, "{age} s with a clock {offset} off");
        comes_back();
        wait_until("it is stored", || rpo(&shown()) == Some(0.0));

        let commit = server.sql(
            "INSERT INTO load VALUES (1, 'x'); \
             SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24')",
        );
        wait_until("the window ends with the server's commit", || {
            let latest = shown()["window"]["latest_commit"].to_string();
            latest.contains(&commit[..13])
        });
        let earliest = shown()["window"]["earliest"].as_str().map(str::to_owned);
        let earliest = earliest.expect("there is a backup");
        let age = format!("SELECT now() - '{earliest}'::timestamptz BETWEEN '0' AND '10 min'");
        assert_eq!(server.sql(&age), "t", "the window begins at {earliest}");
        assert_eq!(archiver.terminate().code(), Some(0));
    }
}
