//! Compares the numbers and lights with the truth: in every state, what the page, the API, the
//! metrics, Nagios and the health route show is compared with what `pitr-restore` plans on the same
//! repository.

use std::{
    env, fs,
    path::Path,
    process::{Command, Output},
};

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use crate::{
    present::{body, metric, pitr_restore, report},
    support::{Archiver, Place, Server, store_goes_down, wait_flushed, wait_until},
};

mod scenes;

/// Returns a `wal-archiver` command with a configuration file in a directory whose name a shell
/// must quote.
pub(crate) fn configured(place: &Place, server: &Server) -> Command {
    let directory = place.spool().with_extension("of this test's own");
    fs::create_dir_all(&directory).expect("a directory");
    let file = directory.join("tidemark.toml");
    fs::write(&file, "gap_grace = '1s'\n").expect("a configuration");
    let mut command = place.command(&server.conninfo());
    command.arg("--config").arg(file);
    command
}

fn time(value: &Value) -> Option<Timestamp> {
    Some(value.as_str()?.parse().expect("a time"))
}

/// Returns true if a plan for `time`, or for the microsecond before, is accepted: the time of the
/// last commit itself is proved only by what follows it.
fn plans(place: &Place, time: Timestamp) -> bool {
    let before = time - SignedDuration::from_micros(1);
    [time, before].iter().any(|time| {
        let target = time.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string();
        let arguments = ["--dry-run", "--target-dir", "/nonexistent/restored"];
        let arguments = [&arguments[..], &["--target-time", &target]].concat();
        pitr_restore(&place.repository(), &arguments)
            .status
            .success()
    })
}

/// Runs a restore command that the archiver printed in a shell, with `--dry-run`.
fn run_printed(command: &str) -> Output {
    let programs = testbed::programs::ours("pitr-restore").expect("it is built");
    let programs = programs.parent().expect("a directory").to_owned();
    let path = env::var("PATH").unwrap_or_default();
    let output = Command::new("sh")
        .env("PATH", format!("{}:{path}", programs.display()))
        .args(["-c", &format!("{command} --dry-run --json")])
        .output();
    output.expect("sh runs")
}

pub(crate) fn locate(archiver: &Archiver, time: Timestamp) -> Value {
    let answer = archiver.get(&format!("/api/v1/clusters/main/locate?time={time}"));
    serde_json::from_str(body(&answer)).expect("JSON")
}

/// Asserts that a plan accepts a printed command. Returns the plan.
fn assert_accepted(command: &Value, scene: &str) -> Value {
    let command = command
        .as_str()
        .unwrap_or_else(|| panic!("{scene}: no command"));
    let planned = run_printed(command);
    assert!(planned.status.success(), "{scene}: {command}: {planned:?}");
    serde_json::from_slice(&planned.stdout).expect("JSON")
}

pub(crate) fn nagios(archiver: &Archiver, place: &Place) -> Option<i32> {
    let asking = place.spool().with_extension("nagios");
    fs::write(&asking, format!("http = '{}'\n", archiver.address())).expect("a configuration");
    let mut command = place.command("host=/nowhere");
    let output = command
        .arg("--config")
        .arg(&asking)
        .args(["status", "--nagios"]);
    output.output().expect("wal-archiver runs").status.code()
}

/// Compares everything that is shown with what a restore from the repository gives. Repeats this
/// while the state changes.
pub(crate) fn compare(scene: &str, archiver: &Archiver, place: &Place) {
    wait_until(&format!("{scene}: one state throughout"), || {
        let before = report(archiver);
        let problem = difference(scene, &before, archiver, place);
        let after = report(archiver);
        let of = |report: &Value| {
            let window = &report["window"];
            let numbers = ["earliest", "refusal", "gaps", "open_gaps"].map(|of| window[of].clone());
            (report["state"].clone(), report["looked"].clone(), numbers)
        };
        let is_stable = of(&before) == of(&after);
        if let (Some(problem), true) = (&problem, is_stable) {
            panic!("{scene}: {problem}\n{after}");
        }
        problem.is_none() && is_stable
    });
    let report = report(archiver);
    let window = &report["window"];
    for at in [&window["earliest"], &window["latest"]] {
        if let Some(at) = time(at) {
            assert!(plans(place, at), "{scene}: no plan for {at}: {report}");
            let located = locate(archiver, at);
            let plan = assert_accepted(&located["command"], scene);
            assert_eq!(
                located["plan"]["backup"], plan["backup"],
                "{scene}: {located}"
            );
        }
    }
    // Nothing proves an instant in the future.
    let beyond = locate(archiver, Timestamp::now() + SignedDuration::from_hours(1));
    assert!(beyond["command"].is_null(), "{scene}: {beyond}");
    assert!(beyond["refusal"].is_string(), "{scene}: {beyond}");
    for near in beyond["nearest"].as_array().expect("a list") {
        assert_accepted(&near["command"], scene);
    }
}

/// Returns a description of the first number or light that is not true. `None` if all are.
fn difference(scene: &str, shown: &Value, archiver: &Archiver, place: &Place) -> Option<String> {
    let window = &shown["window"];
    let (earliest, latest) = (time(&window["earliest"]), time(&window["latest"]));
    if earliest.zip(latest).is_some_and(|(from, to)| from > to) {
        return Some("the window runs backwards".to_owned());
    }
    for (name, value) in [("earliest", earliest), ("latest", latest)] {
        let name = format!("pitr_window_{name}_timestamp_seconds{{cluster=\"main\"}}");
        let seconds = value.map(|time| time.as_duration().as_secs_f64());
        let sample = metric(archiver, &name);
        // More WAL may have been archived since.
        if sample.is_some() != seconds.is_some() || sample.map(|one| one + 1e-3) < seconds {
            return Some(format!("{name} is {sample:?}"));
        }
    }
    let dry = ["--dry-run", "--target-dir", "/nonexistent/restored"];
    let is_planned = pitr_restore(&place.repository(), &dry).status.success();
    let is_shown = window["refusal"].is_null() && earliest.is_some();
    if is_planned != is_shown {
        return Some(format!("a restore is accepted: {is_planned}"));
    }
    // Of a repository that is not there, `list` has an error and no window.
    let listed = pitr_restore(&place.repository(), &["list", "--json"]);
    let document: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let is_listed = listed.status.success() && document["refusal"].is_null();
    if is_listed != is_shown {
        return Some(format!("`list` says {document}"));
    }
    let state = shown["state"].as_str().expect("a state");
    let remote = &shown["durable"]["remote"];
    let is_green = state == "ok";
    if is_green && (!is_shown || window["open_gaps"] != 0 || remote["rpo_seconds"].is_null()) {
        return Some("it is green".to_owned());
    }
    if remote["lag_bytes"] == 0 && state == "unknown" {
        return Some("a lag that nobody knows is 0".to_owned());
    }
    // Nagios polls a moment later, so the state is compared with the one before and after.
    let codes: &[i32] = match state {
        "ok" => &[0],
        "degraded" => &[1],
        "at_risk" | "broken" => &[2],
        _ => &[2, 3],
    };
    let code = nagios(archiver, place);
    if !code.is_some_and(|code| codes.contains(&code)) {
        return Some(format!("Nagios gets {code:?}"));
    }
    let health = archiver.get("/api/v1/clusters/main/health");
    let is_healthy = health.starts_with("HTTP/1.1 200");
    if is_healthy != matches!(state, "ok" | "degraded") {
        return Some(format!("the health route says {health}"));
    }
    let detailed = archiver.get("/health/detailed");
    let detailed: Value = serde_json::from_str(body(&detailed)).expect("JSON");
    let cluster = &detailed["clusters"]["main"];
    let restorable = &cluster["components"]["restorable"]["status"];
    if cluster["state"] != state || (restorable == "ok" && !is_shown) {
        return Some(format!("{scene}: /health/detailed says {cluster}"));
    }
    let page = archiver.get("/");
    let says_nothing_is_lost = page.contains("loses nothing that it had flushed");
    (says_nothing_is_lost && !is_shown)
        .then(|| "the page says that nothing would be lost".to_owned())
}

/// Damages a sealed segment in the middle of the archive. Returns the path of its object and a time
/// within its WAL.
pub(crate) fn damage_in_the_middle(
    place: &Place,
    server: &Server,
) -> (std::path::PathBuf, Timestamp) {
    let seal = || {
        server.write_wal(10);
        let sealed = place.sealed();
        let inside = server
            .sql("SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
        let name = server.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
        server.sql("SELECT pg_switch_wal()");
        server.write_wal(10);
        wait_until("a segment is sealed", || {
            place.sealed() > sealed && place.files_below(&format!("{name}.zst")).len() == 1
        });
        (name, inside.parse::<Timestamp>().expect("a time"))
    };
    seal();
    let (name, inside) = seal();
    seal();
    wait_flushed(server, server.lsn());
    let object = place.files_below(&format!("{name}.zst")).remove(0);
    flip(&object);
    (object, inside)
}

/// Flips a bit of an object's body. A second call restores the original.
pub(crate) fn flip(object: &Path) {
    let mut content = fs::read(object).expect("an object");
    content[100] ^= 1;
    fs::write(object, content).expect("it is written");
}

/// Returns the exit code of `wal-archiver verify`.
pub(crate) fn verify(place: &Place, server: &Server) -> Option<i32> {
    let output = place.command(&server.conninfo()).arg("verify").output();
    output.expect("wal-archiver runs").status.code()
}

#[test]
fn a_repository_that_is_away_is_not_reported_as_the_primary() {
    let place = Place::new();
    let _comes_back = store_goes_down(&place);
    let archiver = place.run("host=/nowhere user=postgres");
    archiver.wait_for_log("serving HTTP");
    wait_until("the repository is named", || {
        let report = report(&archiver);
        // The cluster is known a moment after HTTP is served.
        let reason = report["reason"].as_str().unwrap_or_default();
        report["state"] == "unknown" && reason.starts_with("the repository does not answer")
    });
    // A cluster that was never reached has no numbers, and is not healthy.
    let report = report(&archiver);
    for number in ["rpo_seconds", "lag_bytes"] {
        assert!(report["durable"]["remote"][number].is_null(), "{report}");
    }
    let health = archiver.get("/api/v1/clusters/main/health");
    assert!(health.starts_with("HTTP/1.1 503"), "{health}");
    let code = nagios(&archiver, &place);
    assert!(matches!(code, Some(2 | 3)), "{code:?}");
}
