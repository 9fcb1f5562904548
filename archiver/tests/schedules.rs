//! Base backups by `backup_schedule`. The schedule is yearly, so that a run is only due because it
//! was missed, and no test waits for a time of the clock.

use std::{
    fs::{self, Permissions},
    io::Read,
    os::unix::fs::PermissionsExt,
    process::Stdio,
};

use jiff::Timestamp;
use serde_json::Value;

use crate::support::{Archiver, Place, Server, postgres_bin, succeed, wait_until};

/// The lock of `base_backup::exclusive`: `tidemark` in ASCII.
const LOCK: u64 = u64::from_be_bytes(*b"tidemark");
/// 100 MiB per second.
const CONFIGURATION: &str = "backup_schedule = '0 0 1 1 *'\nbackup_time_zone = 'Europe/Berlin'\n\
    backup_rate_limit = 104857600\n";

fn body(archiver: &Archiver, path: &str) -> String {
    let answer = archiver.get(path);
    answer
        .split_once("\r\n\r\n")
        .expect("an answer")
        .1
        .to_owned()
}

fn report(archiver: &Archiver) -> Value {
    serde_json::from_str(&body(archiver, "/api/v1/clusters/main")).expect("JSON")
}

#[test]
fn a_missed_backup_is_retried_until_it_is_taken_once() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "log_replication_commands=on");
    let place = Place::new();
    let configuration = place.spool().with_extension("toml");
    fs::write(&configuration, CONFIGURATION).expect("a configuration");
    let command = || {
        let mut command = place.command(&server.conninfo());
        command.arg("--config").arg(&configuration);
        command
    };
    // The starts of the archiver share a log.
    let run = |start: usize| {
        let archiver = place.run_with(command());
        wait_until("it streams", || {
            archiver.log().matches("INFO streaming").count() == start
        });
        archiver
    };
    // Another backup of the server runs on another host.
    let mut other =
        postgres::Client::connect(&server.conninfo(), postgres::NoTls).expect("a session");
    let lock = |name: &str| format!("SELECT {name}({LOCK})");
    other
        .execute(&lock("pg_advisory_lock"), &[])
        .expect("it is free");
    let archiver = run(1);
    let schedule = |archiver: &Archiver| report(archiver)["backup_schedule"].clone();
    let says = |archiver: &Archiver, field: &str, text: &str| {
        wait_until(&format!("{field} is {text}"), || {
            let schedule = schedule(archiver);
            schedule[field]
                .as_str()
                .is_some_and(|found| found.contains(text))
        });
    };
    says(
        &archiver,
        "waits_for",
        "another base backup of this server runs (process ",
    );
    assert!(place.files_below("/backup/").is_empty());
    let unreadable = server.data().join("base/unreadable");
    fs::write(&unreadable, "x").expect("a file");
    fs::set_permissions(&unreadable, Permissions::from_mode(0o000)).expect("no permission");
    other
        .execute(&lock("pg_advisory_unlock"), &[])
        .expect("it is held");
    says(&archiver, "last_error", "could not open file");
    wait_until("the failure is recorded and raises its alert", || {
        report(&archiver)["alerts"]
            .to_string()
            .contains("PitrBackupFailed")
    });
    fs::remove_file(&unreadable).expect("it goes");
    wait_until("a retry succeeds", || {
        !place.files_below("backup.json").is_empty()
    });
    wait_until("the error is over", || {
        schedule(&archiver)["last_error"].is_null()
    });
    let mut recorded: Vec<Option<bool>> = Vec::new();
    wait_until("the failure and the backup are recorded", || {
        let records = place.files_below("/outcome/backup/");
        let passed = records.iter().map(|record| {
            let record: Value = serde_json::from_slice(&fs::read(record).ok()?).ok()?;
            record["passed"].as_bool()
        });
        recorded = passed.collect();
        recorded.len() > 1
    });
    assert_eq!(
        recorded,
        [Some(false), Some(true)],
        "one record for one error"
    );
    let taken = fs::read(&place.files_below("backup.json")[0]).expect("a backup");
    let taken: Value = serde_json::from_slice(&taken).expect("JSON");
    assert_eq!(taken["label"], "scheduled");
    let log = fs::read_to_string(server.directory().join("log")).expect("the server's log");
    assert!(log.contains("MAX_RATE 102400"), "{log}");

    // Midnight of New Year's Day in Berlin.
    let shown = schedule(&archiver)["next_run"].clone();
    let next: Timestamp = shown.as_str().expect("a time").parse().expect("a time");
    let local = next.in_tz("Europe/Berlin").expect("a zone");
    assert_eq!(local.strftime("%m-%d %H:%M").to_string(), "01-01 00:00");
    assert!(next > Timestamp::now());
    let metric = format!(
        "pitr_backup_next_run_timestamp_seconds{{cluster=\"main\"}} {:.1}",
        next.as_duration().as_secs_f64()
    );
    let metrics = body(&archiver, "/metrics");
    assert!(metrics.contains(&metric), "{metric} in {metrics}");
    let page = body(&archiver, "/");
    let (_, page) = page
        .split_once("id=\"schedules\"")
        .expect("the page has it");
    assert!(
        page.contains("<code>0 0 1 1 *</code> Europe/Berlin"),
        "{page}"
    );
    let mut status = command();
    status.args(["status", "--http", &archiver.address()]);
    let text = succeed("status", &status.output().expect("it runs"));
    let line = format!(
        "next backup   {} (0 0 1 1 * Europe/Berlin)",
        next.strftime("%Y-%m-%d %H:%M:%SZ")
    );
    assert!(text.contains(&line), "{line} in {text}");

    // A restart knows the backup.
    assert_eq!(archiver.terminate().code(), Some(0));
    let archiver = run(2);
    wait_until("the next run is known", || {
        schedule(&archiver)["next_run"] == shown
    });
    // A backup by a person waits for another one.
    other
        .execute(&lock("pg_advisory_lock"), &[])
        .expect("it is free");
    let mut backup = command();
    let mut backup = backup
        .arg("backup")
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut said = Vec::new();
    let mut errors = backup.stderr.take().expect("a pipe");
    let mut buffer = [0; 1024];
    while !String::from_utf8_lossy(&said).contains("other_backup_awaited") {
        let count = errors.read(&mut buffer).expect("a message");
        assert!(count > 0, "{}", String::from_utf8_lossy(&said));
        said.extend_from_slice(&buffer[..count]);
    }
    assert_eq!(place.files_below("backup.json").len(), 1);
    other
        .execute(&lock("pg_advisory_unlock"), &[])
        .expect("it is held");
    assert!(backup.wait().expect("it ends").success());
    assert_eq!(place.files_below("backup.json").len(), 2);
    assert_eq!(archiver.terminate().code(), Some(0));
}
