//! The lights after promotions, restarts and outages. WAL that is not safe or not restorable is
//! never shown as such, and the page, the API, the metrics and `status` agree.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use serde_json::Value;
use wal_format::Lsn;

use crate::{
    support::{
        Archiver, Place, Server, postgres_bin, store_refuses, succeed, wait_flushed, wait_until,
    },
    truth,
};

pub(crate) fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").expect("a body").1
}

pub(crate) fn report(archiver: &Archiver) -> Value {
    let answer = archiver.get("/api/v1/clusters/main");
    serde_json::from_str(body(&answer)).expect("JSON")
}

/// Returns a sample of the cluster's metrics. `None` if it is NaN.
pub(crate) fn metric(archiver: &Archiver, name: &str) -> Option<f64> {
    let answer = archiver.get("/metrics");
    let sample = answer.lines().find_map(|line| line.strip_prefix(name));
    let sample = sample.unwrap_or_else(|| panic!("{name} is emitted"));
    let value: f64 = sample.trim().parse().expect("a number");
    (!value.is_nan()).then_some(value)
}

/// Returns the output of `wal-archiver status` with these arguments, from the daemon.
pub(crate) fn status(archiver: &Archiver, place: &Place, arguments: &[&str]) -> String {
    let asking = place.spool().with_extension("asking");
    fs::write(&asking, format!("http = '{}'\n", archiver.address())).expect("a configuration");
    let mut command = place.command("host=/nowhere");
    command.arg("--config").arg(&asking);
    let output = command.arg("status").args(arguments).output();
    succeed("status", &output.expect("wal-archiver runs"))
}

pub(crate) fn backup(place: &Place, server: &Server) {
    let output = place.command(&server.conninfo()).arg("backup").output();
    succeed("backup", &output.expect("wal-archiver runs"));
}

pub(crate) fn pitr_restore(repository: &Path, arguments: &[&str]) -> Output {
    let program = testbed::programs::ours("pitr-restore").expect("it is built");
    let mut command = Command::new(program);
    let url = format!("file://{}", repository.display());
    let output = command.args(["--repository", &url]).args(arguments);
    output.output().expect("pitr-restore runs")
}

fn is_ok(archiver: &Archiver) -> bool {
    report(archiver)["state"] == "ok"
}

/// Copies a directory and its content.
fn copy(from: &Path, to: &Path) {
    let output = Command::new("cp").arg("-a").args([from, to]).output();
    succeed("cp", &output.expect("cp runs"));
}

#[test]
fn a_lagging_standby_that_is_promoted_is_neither_safe_nor_restorable() {
    let Some(bin) = postgres_bin() else { return };
    let primary = Server::start(&bin, "");
    let standby = Server::standby_of(&primary);
    let place = Place::new();
    let list = primary.conninfo_with(&standby);
    let archiver = place.run(&list);
    archiver.wait_for_log("INFO streaming");
    primary.write_wal(300);

    // Without a base backup everything would be lost, even if all WAL is archived.
    wait_until("no backup is told", || {
        report(&archiver)["state"] == "at_risk"
    });
    let page = archiver.get("/");
    assert!(
        page.contains("Losing the primary now loses everything"),
        "{page}"
    );
    assert!(!page.contains("loses nothing"), "{page}");
    let said = status(&archiver, &place, &[]);
    assert!(said.contains("REFUSED: no base backup"), "{said}");
    // The report of a daemon with another configuration is ignored.
    let other = Place::new();
    let said = status(&archiver, &other, &[]);
    assert!(said.contains("no daemon answers"), "{said}");
    assert!(!said.contains("REFUSED"), "{said}");

    truth::compare("no backup", &archiver, &place);

    // The standby stops. The archive and its only backup advance without it.
    let lsn = primary.lsn();
    wait_until("the standby has replayed", || {
        standby.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'")) == "t"
    });
    standby.down("fast");
    primary.write_wal(2500);
    backup(&place, &primary);
    primary.write_wal(100);
    wait_flushed(&primary, primary.lsn());
    wait_until("all is well", || {
        is_ok(&archiver) && report(&archiver)["durable"]["remote"]["lag_bytes"] == 0
    });
    primary.down("immediate");
    standby.up();
    standby.promote();
    archiver.wait_for_log("INFO streaming cluster=\"main\" branch=00000002");
    let comes_back = store_refuses(&place);
    standby.write_wal(900);
    let written = standby.lsn();
    wait_until("the new timeline is in the spool", || {
        let report = report(&archiver);
        let local = report["durable"]["local"]["lsn"].as_str();
        let local = local.and_then(|lsn| lsn.parse::<Lsn>().ok());
        report["source"]["timeline"] == 2 && local >= Some(written)
    });

    // Less WAL was written on the new timeline than the archive has of the old one after the fork.
    wait_until("no backup leads to the new timeline", || {
        let report = report(&archiver);
        let queue = report["counters"]["upload_queue_bytes"].as_u64();
        assert!(queue > Some(0), "{report}");
        let remote = &report["durable"]["remote"];
        // The lag is unknown only until the new primary is polled.
        let lag = &remote["lag_bytes"];
        assert!(lag.is_null() || lag.as_u64() >= queue, "{report}");
        assert!(remote["rpo_seconds"].as_f64() > Some(0.0), "{report}");
        assert_ne!(report["state"], "ok", "{report}");
        report["state"] == "broken"
    });
    let refused = "no base backup leads to timeline 00000002";
    let told: Value = serde_json::from_str(&status(&archiver, &place, &["--json"])).expect("JSON");
    for report in [&report(&archiver), &told[0]] {
        let reason = report["reason"].as_str().expect("a reason");
        assert!(reason.contains(refused), "{reason}");
        assert_eq!(report["window"]["refusal"], report["reason"]);
    }
    let page = archiver.get("/");
    assert!(!page.contains("loses nothing"), "{page}");
    assert!(
        page.contains("BROKEN") && page.to_lowercase().contains(refused),
        "{page}"
    );
    let window = archiver.get("/api/v1/clusters/main/window");
    assert!(window.contains(refused), "{window}");
    let state = "pitr_state{cluster=\"main\",state=\"broken\"}";
    assert_eq!(metric(&archiver, state), Some(1.0));
    for name in ["pitr_rpo_seconds", "pitr_lag_bytes"] {
        let name = format!("{name}{{cluster=\"main\",tier=\"remote\"}}");
        wait_until(&name, || metric(&archiver, &name) > Some(0.0));
    }
    assert!(metric(&archiver, "pitr_upload_queue_bytes{cluster=\"main\"}") > Some(0.0));
    let health = archiver.get("/api/v1/clusters/main/health?max_rpo=1d");
    assert!(health.starts_with("HTTP/1.1 503"), "{health}");

    // When the repository is back, the daemon takes one base backup, which repairs this.
    comes_back();
    // The failover's loss keeps the state at risk for a day.
    wait_until("a backup leads to the new timeline", || {
        let report = report(&archiver);
        let alerts = report["alerts"].to_string();
        report["window"]["refusal"].is_null()
            && report["state"] == "at_risk"
            && alerts.contains("PitrFailoverLoss")
    });
    standby.write_wal(100);
    wait_flushed(&standby, standby.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    let mut backups = place.files_below("backup.json");
    assert_eq!(backups.len(), 2, "{backups:?}");

    // The plan agrees with both lights: without that backup it refuses, and with it it does not.
    let repository = place.repository();
    let before = repository.with_extension("before");
    copy(&repository, &before);
    let taken = backups.pop().expect("a backup");
    let taken = before.join(taken.strip_prefix(&repository).expect("it is inside"));
    fs::remove_dir_all(taken.parent().expect("a directory")).expect("it goes");
    let dry = ["--dry-run", "--target-dir", "/nonexistent/restored"];
    for (repository, code) in [(&before, 3), (&repository, 0)] {
        let planned = pitr_restore(repository, &dry);
        assert_eq!(planned.status.code(), Some(code), "{planned:?}");
        let listed = succeed("list", &pitr_restore(repository, &["list", "--json"]));
        let listed: Value = serde_json::from_str(&listed).expect("JSON");
        assert_eq!(listed["refusal"].is_string(), code == 3, "{listed}");
        let restorable = listed["restorable"].as_array().expect("a list");
        let by_default = restorable.iter().any(|one| one["by_default"] == true);
        assert_eq!(by_default, code == 0, "{listed}");
    }
}

#[test]
fn what_was_proved_survives_a_restart_and_what_is_not_seen_is_unknown() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "max_slot_wal_keep_size=1GB");
    let place = Place::new();
    let archiver = place.run_with(truth::configured(&place, &server));
    archiver.wait_for_log("INFO streaming");
    server.write_wal(200);
    backup(&place, &server);
    wait_flushed(&server, server.lsn());
    wait_until("all is well", || is_ok(&archiver));
    truth::compare("idle after a backup", &archiver, &place);

    // WAL that is damaged in the middle of the window is cut out of it, and a new backup follows.
    let (object, inside) = truth::damage_in_the_middle(&place, &server);
    assert_eq!(truth::verify(&place, &server), Some(4));
    wait_until("the damage is cut out", || {
        let report = report(&archiver);
        let window = &report["window"];
        report["state"] == "broken" && window["refusal"].is_null() && window["gaps"] == 1
    });
    truth::compare("a damaged segment", &archiver, &place);
    let name = object.file_name().and_then(|name| name.to_str());
    let name = name.expect("a name").trim_end_matches(".zst");
    let reason = report(&archiver)["reason"].to_string();
    assert!(reason.contains(name), "{reason}");
    let window = archiver.get("/api/v1/clusters/main/window");
    let window: Value = serde_json::from_str(body(&window)).expect("JSON");
    let gap = &window["gaps"][0];
    assert!(gap["cause"].to_string().contains(name), "{window}");
    let file = format!(
        "SELECT pg_walfile_name('{}'::pg_lsn + 1)",
        gap["from_lsn"].as_str().expect("an LSN")
    );
    assert_eq!(server.sql(&file), name);
    assert!(
        gap["after"].is_string() && gap["before"].is_string(),
        "{gap}"
    );
    let refused = truth::locate(&archiver, inside);
    assert!(refused["command"].is_null(), "{refused}");
    assert_eq!(
        refused["nearest"].as_array().map(Vec::len),
        Some(2),
        "{refused}"
    );
    let at = inside.to_string();
    let dry = ["--dry-run", "--target-dir", "/nonexistent/restored"];
    let planned = pitr_restore(
        &place.repository(),
        &[&dry[..], &["--target-time", &at]].concat(),
    );
    assert_eq!(planned.status.code(), Some(4), "{planned:?}");
    assert!(
        String::from_utf8_lossy(&planned.stderr).contains(name),
        "{planned:?}"
    );
    let picked = archiver.get(&format!("/?at={inside}"));
    assert!(
        picked.contains("This instant cannot be restored"),
        "{picked}"
    );
    wait_until("it is kept", || {
        place.spool().join("main/caught_up.json").exists()
    });
    assert_eq!(archiver.terminate().code(), Some(0));
    let stopped = Instant::now();

    // The age of WAL that is written while nothing archives counts from the last proof.
    let comes_back = store_refuses(&place);
    server.write_wal(100);
    std::thread::sleep(Duration::from_secs(4));
    let archiver = place.run_with(truth::configured(&place, &server));
    wait_until("it serves", || {
        archiver.log().matches("serving HTTP").count() == 2
    });
    wait_until("the gap is known again", || {
        let report = report(&archiver);
        let gaps = &report["window"]["gaps"];
        assert!(gaps.is_null() || *gaps == 1, "{report}");
        *gaps == 1
    });
    wait_until("the server is seen", || {
        report(&archiver)["durable"]["remote"]["lag_bytes"].as_u64() > Some(0)
    });
    let least = stopped.elapsed().as_secs_f64();
    let shown = report(&archiver)["durable"]["remote"]["rpo_seconds"].as_f64();
    assert!(
        shown >= Some(least),
        "{shown:?} shown, {least} since the stop"
    );
    assert!(
        shown <= Some(least + 10.0),
        "{shown:?} shown, {least} since the stop"
    );
    comes_back();
    truth::flip(&object);
    assert_eq!(truth::verify(&place, &server), Some(0));
    wait_until("all is well again", || {
        is_ok(&archiver) && report(&archiver)["window"]["gaps"] == 0
    });

    server.down("immediate");
    wait_until("the primary is unknown", || {
        let report = report(&archiver);
        assert_ne!(report["durable"]["remote"]["rpo_seconds"], Value::Null);
        report["state"] == "unknown"
    });
    let report = report(&archiver);
    for tier in ["local", "remote"] {
        assert_eq!(
            report["durable"][tier]["lag_bytes"],
            Value::Null,
            "{report}"
        );
        let name = format!("pitr_lag_bytes{{cluster=\"main\",tier=\"{tier}\"}}");
        assert_eq!(metric(&archiver, &name), None);
    }
    let rpo = "pitr_rpo_seconds{cluster=\"main\",tier=\"remote\"}";
    let counted = metric(&archiver, rpo);
    assert!(counted > Some(0.0), "{counted:?}");
    wait_until("it counts up", || metric(&archiver, rpo) > counted);
    let page = archiver.get("/");
    assert!(page.contains("The primary was last proved safe"), "{page}");
    assert!(!page.contains("sets no limit"), "{page}");
    let said = status(&archiver, &place, &[]);
    assert!(said.contains("its limit is unknown"), "{said}");
}

/// Writes a configuration with encryption. Returns its path.
fn encrypted(place: &Place) -> std::path::PathBuf {
    let configuration = place.spool().with_extension("toml");
    let key = "1111111111111111111111111111111111111111111111111111111111111111";
    let text = format!("encryption_key_command = 'printf {key}'\n");
    fs::write(&configuration, text).expect("a configuration");
    configuration
}

/// Checks that `backup list`, `pitr-restore list` and a plan know that the newest of two backups
/// lacks `part`.
fn assert_only_the_newest_backup_is_damaged(
    place: &Place,
    configuration: &Path,
    run: &dyn Fn(&[&str]) -> Output,
    part: &Path,
) {
    let json = |output: Output| {
        let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        document
    };
    let of_part = |text: &Value| {
        let name = part.file_stem().expect("a name").to_string_lossy();
        text.as_str().is_some_and(|text| text.contains(&*name))
    };
    let listed = json(run(&["backup", "list", "--json"]));
    let backups = &listed[0]["backups"];
    assert_eq!(backups[0]["problem"], Value::Null, "{listed}");
    assert!(of_part(&backups[1]["problem"]), "{listed}");
    let configuration = configuration.to_str().expect("a path");
    let restore = |arguments: &[&str]| {
        let of_place = ["--config", configuration];
        json(pitr_restore(
            &place.repository(),
            &[&of_place[..], arguments].concat(),
        ))
    };
    let listed = restore(&["list", "--json"]);
    assert!(of_part(&listed["backups"][1]["damage"]), "{listed}");
    let dry = [
        "--dry-run",
        "--json",
        "--target-dir",
        "/nonexistent/restored",
    ];
    let planned = restore(&dry);
    assert_eq!(planned["backup"], backups[0]["id"], "{planned}");
}

/// Accepts the loss of two objects.
fn accept(run: &dyn Fn(&[&str]) -> Output) {
    let output = run(&["verify", "--accept-loss"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said.matches("accepted as lost: ").count(), 2, "{said}");
}

#[test]
fn what_the_archive_lost_is_red_until_it_is_back_or_accepted() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let configuration = encrypted(&place);
    let command = || {
        let mut command = place.command(&server.conninfo());
        command.arg("--config").arg(&configuration);
        command
    };
    let run = |arguments: &[&str]| command().args(arguments).output().expect("it runs");
    let archiver = place.run_with(command());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    succeed("backup", &run(&["backup"]));
    server.down("fast");
    fs::write(server.data().join("standby.signal"), "").expect("a file");
    server.up();
    server.promote();
    server.write_wal(2500);
    wait_flushed(&server, server.lsn());
    succeed("backup", &run(&["backup"]));
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    wait_until("all is well", || is_ok(&archiver));

    // The daemon stores both copies of a history file again, from the catalog, and reports it as an
    // event.
    let histories = place.files_below("/history");
    assert_eq!(histories.len(), 2, "{histories:?}");
    for file in &histories {
        fs::remove_file(file).expect("it goes");
    }
    wait_until("the history file is back", || {
        histories.iter().all(|file| file.is_file())
    });
    let events = || archiver.get("/api/v1/clusters/main/events");
    wait_until("it is an event", || {
        events().contains("of the two copies of this history file had been lost")
    });

    // It stores both copies of the wrapped keys again, from memory.
    let keys = place.files_below("/main/keys");
    assert_eq!(keys.len(), 2, "{keys:?}");
    for key in &keys {
        fs::remove_file(key).expect("it goes");
    }
    wait_until("the keys are back", || keys.iter().all(|key| key.is_file()));
    wait_until("it is an event", || {
        events().contains("this wrapped data key had been lost")
    });

    // A tail is missed although it is not the newest one.
    let tails = || place.files_below("/tail/");
    wait_until("two tails are stored", || {
        server.sql("SELECT pg_logical_emit_message(true, '', 'some more WAL')");
        tails().len() > 1
    });
    let tail = tails().remove(0);
    let content = fs::read(&tail).expect("it reads");
    fs::remove_file(&tail).expect("it goes");
    wait_until("the tail is named", || {
        let report = report(&archiver);
        report["lost_objects"].to_string().contains("/tail/") && report["state"] == "broken"
    });
    fs::write(&tail, content).expect("it is back");
    wait_until("all is well with it", || {
        is_ok(&archiver) && report(&archiver)["lost_objects"] == serde_json::json!([])
    });

    // No program can tell whose archive it is: nothing can be restored meanwhile.
    let stray = place.repository().join("main/epoch/00000009.json.enc");
    fs::write(&stray, "hello").expect("it is written");
    wait_until("the damaged epoch is named", || {
        let report = report(&archiver);
        let reason = report["reason"].to_string();
        reason.contains("epoch/00000009.json") && report["state"] == "broken"
    });
    fs::remove_file(stray).expect("it goes");
    wait_until("all is well without it", || is_ok(&archiver));

    // A part of the newest backup is missed, too.
    let parts = place.files_below(".tar.zst");
    let part = parts.last().expect("a slice");
    let content = fs::read(part).expect("it reads");
    fs::remove_file(part).expect("it goes");
    wait_until("the part is named", || {
        let report = report(&archiver);
        let name = part.file_stem().expect("a name").to_string_lossy();
        report["lost_objects"].to_string().contains(&*name) && report["state"] == "broken"
    });
    // After the loss is accepted, the backup is marked and no plan uses it.
    let output = run(&["verify", "--accept-loss"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said.matches("accepted as lost: ").count(), 1, "{said}");
    assert_only_the_newest_backup_is_damaged(&place, &configuration, &run, part);
    fs::write(part, content).expect("it is back");
    wait_until("all is well with it", || {
        is_ok(&archiver) && report(&archiver)["lost_objects"] == serde_json::json!([])
    });

    // The newest backup and segment stay, so archiving continues.
    let aside = tempfile::tempdir().expect("a directory");
    let mut lost = vec![place.files_below("backup.json").remove(0)];
    lost.push(place.files_below("/wal/").remove(0));
    let take = || {
        for (number, file) in lost.iter().enumerate() {
            fs::copy(file, aside.path().join(number.to_string())).expect("a copy");
            fs::remove_file(file).expect("it goes");
        }
    };
    let put_back = || {
        for (number, file) in lost.iter().enumerate() {
            fs::copy(aside.path().join(number.to_string()), file).expect("it is back");
        }
    };
    let name = |file: &Path| {
        file.strip_prefix(place.repository().join("main"))
            .map(Path::to_owned)
    };
    let is_named = |archiver: &Archiver| {
        let report = report(archiver);
        let said = report["lost_objects"].to_string();
        let named = |file: &std::path::PathBuf| {
            let name = name(file).expect("inside").with_extension("");
            said.contains(&*name.to_string_lossy())
        };
        lost.iter().all(named) && report["state"] == "broken"
    };
    take();
    wait_until("the losses are named", || is_named(&archiver));
    let shown = report(&archiver);
    let reason = shown["reason"].as_str().expect("a reason");
    assert!(reason.contains("--accept-loss"), "{reason}");
    assert!(metric(&archiver, "pitr_corrupt_objects{cluster=\"main\"}") > Some(1.0));
    wait_until("it is an alert", || {
        archiver
            .get("/api/v1/clusters/main")
            .contains("PitrCorruptObject")
    });
    let health = archiver.get("/api/v1/clusters/main/health");
    assert!(health.starts_with("HTTP/1.1 503"), "{health}");
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());

    // The losses are known after a restart.
    archiver.kill();
    let archiver = place.run_with(command());
    wait_until("it serves", || {
        archiver.log().matches("serving HTTP").count() == 2
    });
    wait_until("it is still known", || is_named(&archiver));
    put_back();
    wait_until("all is well again", || {
        is_ok(&archiver) && report(&archiver)["lost_objects"] == serde_json::json!([])
    });

    take();
    wait_until("the losses are named again", || is_named(&archiver));
    accept(&run);
    wait_until("it is accepted", || {
        report(&archiver)["lost_objects"] == serde_json::json!([]) && is_ok(&archiver)
    });

    // The acceptance ends when the objects are back.
    put_back();
    let record = place.spool().join("main/losses.json");
    wait_until("the daemon knows that they are back", || {
        let record: Value =
            serde_json::from_slice(&fs::read(&record).expect("a record")).expect("JSON");
        record["returned"].as_array().map(Vec::len) == Some(3)
    });
    take();
    wait_until("the losses are named once more", || is_named(&archiver));
    put_back();
    wait_until("all is well once more", || is_ok(&archiver));

    // A record that cannot be read is not an empty one.
    fs::write(&record, "").expect("it is torn");
    wait_until("the record is named", || {
        let report = report(&archiver);
        let reason = report["reason"].as_str().expect("a reason");
        report["state"] == "broken" && reason.contains("record of lost objects")
    });
    let verified = run(&["verify"]);
    assert_eq!(verified.status.code(), Some(4), "{verified:?}");
    let said = String::from_utf8_lossy(&verified.stdout).into_owned();
    assert!(said.contains("record of lost objects"), "{said}");
    // The daemon sets it aside when it records something.
    wait_until("the record is removed", || {
        drop(fs::remove_file(&record));
        drop(fs::remove_file(record.with_extension("damaged")));
        !report(&archiver)["reason"]
            .to_string()
            .contains("record of lost objects")
    });
    wait_until("all is well without it", || is_ok(&archiver));

    // A declared loss whose record is damaged stops nothing. What a verdict found that cannot be
    // read any more is not known.
    let gaps = place.files_below("/gap/");
    fs::write(&gaps[0], "damaged").expect("it is damaged");
    let verdict = place.files_below("/outcome/verify/").pop();
    fs::write(verdict.expect("a verdict"), "torn").expect("it is damaged");
    archiver.kill();
    let archiver = place.run_with(command());
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    wait_until("the record of the loss is named", || {
        let report = report(&archiver);
        let causes = report["causes"].as_array().expect("a list");
        let is_unknown = causes.iter().any(|cause| {
            cause["state"] == "unknown" && cause["reason"].to_string().contains("/outcome/verify/")
        });
        is_unknown && report["reason"].to_string().contains("/gap/")
    });
    assert_eq!(archiver.terminate().code(), Some(0));
}
