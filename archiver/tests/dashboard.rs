//! The dashboard over a real archiver and server: every light is broken once and recovers, the page is driven in a browser,
//! the rules and the board name only what is emitted, and strangers' connections do not disturb the stream.

use std::{
    env, fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use repository::Repository;
use serde_json::Value;
use wal_format::{OUTCOME_FORMAT_VERSION, Outcome, OutcomeKind, PgTimestamp};

use crate::support::{Archiver, Place, Server, postgres_bin, succeed, wait_flushed, wait_until};

fn body(answer: &str) -> String {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    body.to_owned()
}

fn report(archiver: &Archiver) -> Value {
    serde_json::from_str(&body(&archiver.get("/api/v1/clusters/main"))).expect("JSON")
}

fn state(archiver: &Archiver) -> String {
    report(archiver)["state"]
        .as_str()
        .expect("a state")
        .to_owned()
}

/// Waits until page, API, metric and alert say so together: `alert` fires, or none does.
fn wait_for_light(archiver: &Archiver, alert: Option<&str>) {
    wait_until(&format!("the light shows {alert:?}"), || {
        let report = report(archiver);
        let page = body(&archiver.get("/"));
        let metrics = body(&archiver.get("/metrics"));
        let fires = |name: &str| {
            metrics.contains(&format!(
                "pitr_alert_firing{{cluster=\"main\",alert=\"{name}\"}} 1.0"
            ))
        };
        let alerts = report["alerts"].as_array().expect("a list");
        match alert {
            Some(name) => {
                alerts.iter().any(|one| one["name"] == name) && fires(name) && page.contains(name)
            }
            None => {
                alerts.is_empty() && page.contains("Nothing needs you.") && report["state"] == "ok"
            }
        }
    });
}

fn outcome(kind: OutcomeKind, passed: bool) -> Outcome {
    let now = jiff::Timestamp::now();
    let id = format!(
        "{}-{:04x}",
        now.strftime("%Y%m%dT%H%M%SZ"),
        now.subsec_microsecond() & 0xffff
    );
    let finished = PgTimestamp::from_jiff(now);
    Outcome {
        format_version: OUTCOME_FORMAT_VERSION,
        kind,
        id: id.parse().expect("a name"),
        started: PgTimestamp(finished.0 - 9_000_000),
        finished,
        passed,
        message: if passed {
            "PostgreSQL answered"
        } else {
            "PostgreSQL did not start"
        }
        .to_owned(),
        backup: None,
        rto_seconds: passed.then_some(9.0),
        fetched_bytes: passed.then_some(50 << 20),
        fetch_seconds: passed.then_some(5.0),
        replayed_bytes: passed.then_some(20 << 20),
        replay_seconds: passed.then_some(2.0),
        loss_seconds: passed.then_some(0.0),
        damaged: Vec::new(),
    }
}

/// Leaves an outcome in the repository, as whoever drills will.
fn record(place: &Place, outcome: &Outcome) {
    let url = format!("file://{}", place.repository().display());
    let repository = Repository::open(
        &repository::config::RepositoryPlace::from(
            url.parse::<repository::config::RepositoryUrl>()
                .expect("a URL"),
        ),
        &"main".parse().expect("a name"),
    )
    .expect("a repository");
    let system = repository
        .identity()
        .expect("it is read")
        .expect("it is claimed")
        .system_identifier;
    repository
        .put_outcome(system, outcome)
        .expect("it is stored");
}

fn archived() -> Option<(Server, Place, Archiver)> {
    let bin = postgres_bin()?;
    let server = Server::start(&bin, "max_slot_wal_keep_size=1GB");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(200);
    let backup = place.command(&server.conninfo()).arg("backup").output();
    succeed("backup", &backup.expect("wal-archiver runs"));
    server.sql("SELECT pg_create_restore_point('before_release')");
    server.write_wal(200);
    wait_flushed(&server, server.lsn());
    Some((server, place, archiver))
}

#[test]
fn every_light_can_be_broken_and_recovers() {
    let Some((server, place, archiver)) = archived() else {
        return;
    };
    wait_for_light(&archiver, None);
    assert_eq!(report(&archiver)["rto"]["estimate_seconds"], Value::Null);

    // A failed drill, then one that passes: both through the repository.
    record(&place, &outcome(OutcomeKind::Drill, false));
    wait_for_light(&archiver, Some("PitrDrillFailed"));
    assert_eq!(state(&archiver), "broken");
    std::thread::sleep(Duration::from_millis(1100));
    record(&place, &outcome(OutcomeKind::Drill, true));
    wait_for_light(&archiver, None);
    let estimate = report(&archiver)["rto"]["estimate_seconds"].as_f64();
    assert!(
        estimate.is_some_and(|seconds| seconds > 2.0),
        "{estimate:?}"
    );
    let drills = body(&archiver.get("/api/v1/clusters/main/drills"));
    assert!(drills.contains("PostgreSQL did not start"), "{drills}");

    // A corrupt object, found by `verify`; then whole again.
    let object = place.files_below("base.000001").pop().expect("a slice");
    let whole = fs::read(&object).expect("an object");
    let mut damaged = whole.clone();
    damaged[100] ^= 1;
    fs::write(&object, &damaged).expect("it is damaged");
    let verify = || {
        let output = place.command(&server.conninfo()).arg("verify").output();
        output.expect("wal-archiver runs").status.code()
    };
    assert_eq!(verify(), Some(4));
    wait_for_light(&archiver, Some("PitrCorruptObject"));
    fs::write(&object, &whole).expect("it is whole");
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(verify(), Some(0));
    wait_for_light(&archiver, None);

    // The store is down.
    let aside = place.repository().with_extension("aside");
    repository::durable::rename(&place.repository(), &aside).expect("the repository goes");
    fs::write(place.repository(), "a file is no folder").expect("in its place");
    server.write_wal(100);
    wait_for_light(&archiver, Some("PitrRepositoryFailing"));
    fs::remove_file(place.repository()).expect("the file goes");
    repository::durable::rename(&aside, &place.repository()).expect("it is back");
    wait_for_light(&archiver, None);

    // The server is gone: the stream is down, and the RPO counts up instead of showing zero.
    server.down("fast");
    wait_for_light(&archiver, Some("PitrStreamDown"));
    wait_for_light(&archiver, Some("PitrRpoOverTarget"));
    let output = place
        .command(&server.conninfo())
        .args(["status", "--nagios"])
        .output();
    let line = String::from_utf8(output.expect("it runs").stdout).expect("UTF-8");
    assert!(line.starts_with("TIDEMARK CRITICAL"), "{line}");
    server.up();
    wait_for_light(&archiver, None);
    let events = body(&archiver.get("/api/v1/clusters/main/events"));
    for name in [
        "PitrDrillFailed",
        "PitrCorruptObject",
        "PitrRepositoryFailing",
        "PitrStreamDown",
    ] {
        let said = events.matches(&format!("{name}: ")).count();
        assert!(said >= 2, "{name} is told and resolved in {events}");
    }
    assert_eq!(archiver.terminate().code(), Some(0));
}

/// Every `pitr_…` name in a text.
fn names(text: &str) -> Vec<&str> {
    text.match_indices("pitr_")
        .map(|(at, _)| {
            let rest = &text[at..];
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            &rest[..end.unwrap_or(rest.len())]
        })
        .collect()
}

/// What promtool reads: no end mark, and a counter's help under its full name.
fn prometheus_text(openmetrics: &str) -> String {
    let mut text = openmetrics.replace("# EOF\n", "");
    for line in openmetrics.lines() {
        let counter = line
            .strip_prefix("# TYPE ")
            .and_then(|rest| rest.strip_suffix(" counter"));
        if let Some(name) = counter {
            for word in ["HELP", "TYPE"] {
                let (short, full) = (
                    format!("# {word} {name} "),
                    format!("# {word} {name}_total "),
                );
                text = text.replace(&short, &full);
            }
        }
    }
    text
}

#[test]
fn rules_board_and_documents_name_only_what_is_emitted() {
    let Some((_server, _place, archiver)) = archived() else {
        return;
    };
    let metrics = body(&archiver.get("/metrics"));
    let emitted = |name: &str| {
        metrics.lines().any(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        })
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut seen = 0;
    for file in [
        "monitoring/tidemark.rules.yml",
        "monitoring/tidemark.tests.yml",
        "monitoring/grafana-tidemark.json",
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
    ] {
        let text = fs::read_to_string(root.join(file)).expect(file);
        for name in names(&text) {
            assert!(emitted(name), "{file} names {name}, which is not emitted");
            seen += 1;
        }
    }
    assert!(seen > 50, "the files name metrics");
    let rules = fs::read_to_string(root.join("monitoring/tidemark.rules.yml")).expect("rules");
    for (alert, ..) in archiver::alerts::RUNBOOK {
        assert!(
            rules.contains(&format!("alert: {alert}\n")),
            "{alert} has no rule"
        );
    }
    if Command::new("promtool").arg("--version").output().is_err() {
        assert!(
            env::var_os("CI").is_none(),
            "promtool is not installed; run `make install-tools`"
        );
        eprintln!("SKIPPED: promtool is not installed; run `make install-tools`");
        return;
    }
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool runs");
    let mut input = promtool.stdin.take().expect("a pipe");
    input
        .write_all(prometheus_text(&metrics).as_bytes())
        .expect("it reads");
    drop(input);
    succeed(
        "promtool check metrics",
        &promtool.wait_with_output().expect("it ends"),
    );
    let test = Command::new("promtool")
        .args(["test", "rules", "tidemark.tests.yml"])
        .current_dir(root.join("monitoring"))
        .output();
    succeed("promtool test rules", &test.expect("promtool runs"));
}

#[test]
fn idle_and_malformed_connections_disturb_neither_the_page_nor_the_stream() {
    let Some((server, _place, archiver)) = archived() else {
        return;
    };
    let count = if env::var_os("TIDEMARK_LONG").is_some() {
        10_000
    } else {
        1_500
    };
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit {
            current: limit.maximum,
            ..limit
        },
    )
    .expect("more files");
    let reconnects = server.sql("SELECT pid FROM pg_stat_replication");
    let address = archiver.address();
    let mut idle = Vec::new();
    for number in 0..count {
        let mut stream = TcpStream::connect(&address).expect("it listens");
        // Some say nothing, some half a request, some what is none.
        let said: &[u8] = match number % 4 {
            0 => b"",
            1 => b"GET /metr",
            2 => b"\x16\x03\x01\xff\xff\0\0garbage",
            _ => b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nx",
        };
        drop(stream.write_all(said));
        idle.push(stream);
        if number % 500 == 499 {
            assert!(archiver.get("/metrics").contains("pitr_stream_connected"));
            server.write_wal(10);
        }
    }
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(
        server.sql("SELECT pid FROM pg_stat_replication"),
        reconnects
    );
    // The backup is seen at the next look into the catalog.
    wait_until("it is OK", || state(&archiver) == "ok");
    drop(idle);
    assert_eq!(archiver.terminate().code(), Some(0));
}

#[test]
fn the_stream_of_events_is_live() {
    let Some((server, _place, archiver)) = archived() else {
        return;
    };
    let mut stream = TcpStream::connect(archiver.address()).expect("it listens");
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .expect("a limit");
    stream
        .write_all(b"GET /api/v1/events/stream HTTP/1.1\r\nHost: x\r\n\r\n")
        .expect("a request");
    server.write_wal(10);
    let mut text = String::new();
    let mut buffer = [0; 8192];
    while text
        .matches("event: status\ndata: {\"schema\":\"v1\",\"cluster\":\"main\"")
        .count()
        < 3
    {
        let read = stream.read(&mut buffer).expect("messages come");
        assert!(read > 0, "it ended: {text}");
        text += &String::from_utf8_lossy(&buffer[..read]);
    }
    assert!(text.contains("content-type: text/event-stream"), "{text}");
}

/// Where the modules of the page test are: `benches/tools/install.sh` puts them there.
fn browser_modules() -> Option<PathBuf> {
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/tidemark"));
    let roots = [Some(PathBuf::from("/var/cache/tidemark")), home];
    let modules = roots
        .into_iter()
        .flatten()
        .map(|root| root.join("browser"))
        .find(|root| root.join("node_modules/playwright-core").exists());
    let chromium = [
        "/usr/bin/chromium",
        "/usr/bin/chromium-browser",
        "/usr/bin/google-chrome",
    ];
    let found = modules.filter(|_| chromium.iter().any(|path| Path::new(path).exists()));
    if found.is_none() {
        assert!(
            env::var_os("CI").is_none(),
            "no browser is installed; run `make install-tools`"
        );
        eprintln!("SKIPPED: no browser is installed; run `make install-tools`");
    }
    found
}

#[test]
fn the_page_works_in_a_browser() {
    let Some(modules) = browser_modules() else {
        return;
    };
    let Some((server, place, archiver)) = archived() else {
        return;
    };
    record(&place, &outcome(OutcomeKind::Drill, true));
    // The picker moves by whole seconds: a commit has to lie some of them before the end of the strip.
    std::thread::sleep(Duration::from_secs(4));
    server.write_wal(50);
    let address = archiver.address();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let artefacts = here.join("../artefacts");
    fs::create_dir_all(&artefacts).expect("a directory");
    let steps = tempfile::tempdir().expect("a directory");
    let mut script = Command::new("node")
        .arg(here.join("tests/dashboard/page.mjs"))
        .arg(&modules)
        .arg(format!("http://{address}/"))
        .arg(&artefacts)
        .arg(steps.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("node runs");
    let mut archiver = Some(archiver);
    wait_until("the browser is done", || {
        let asked = |name: &str| {
            let file = |end: &str| steps.path().join(format!("{name}.{end}"));
            (file("asked").exists() && !file("done").exists()).then(|| file("done"))
        };
        if let Some(done) = asked("write") {
            server.write_wal(50);
            fs::write(done, "").expect("written");
        }
        if let Some(done) = asked("stop") {
            archiver.take().expect("it runs").kill();
            fs::write(done, "").expect("written");
        }
        if let Some(done) = asked("start") {
            let again = place.command(&server.conninfo());
            archiver = Some(place.run_at(again, &address));
            fs::write(done, "").expect("written");
        }
        script.try_wait().expect("a child").is_some()
    });
    succeed("page.mjs", &script.wait_with_output().expect("it ended"));
}
