//! The page, the API and `status` agree; an idle hour shows an RPO of zero; no answer contains a
//! secret.

use std::{fs, process::Command};

use serde_json::Value;
use status::rpo::RpoEstimator;
use wal_format::{Lsn, OutcomeKind};

use super::{archived, body, outcome, record, report};
use crate::{
    certificates::private_file,
    support::{Archiver, Place, Server, postgres_bin, succeed, wait_flushed, wait_until},
};

/// Returns the output of `status`, with a configuration that names the daemon's address.
fn status(archiver: &Archiver, place: &Place, server: &Server, arguments: &[&str]) -> String {
    let asking = place.spool().with_extension("asking");
    fs::write(&asking, format!("http = '{}'\n", archiver.address())).expect("a configuration");
    let mut command = place.command(&server.conninfo());
    command
        .arg("--config")
        .arg(&asking)
        .arg("status")
        .args(arguments);
    succeed("status", &command.output().expect("wal-archiver runs"))
}

/// Returns the text of the elements that begin with `opening`, without tags.
fn texts(page: &str, opening: &str, closing: &str) -> Vec<String> {
    let parts = page.split(opening).skip(1);
    let inner = parts
        .filter_map(|part| part.split_once(closing))
        .map(|(inner, _)| inner);
    let text = inner.map(|html| {
        let outside = html
            .split('<')
            .enumerate()
            .map(|(number, piece)| match number {
                0 => piece,
                _ => piece.split_once('>').map_or("", |(_, text)| text),
            });
        outside.collect::<Vec<_>>().join(" ").trim().to_owned()
    });
    text.filter(|text| !text.is_empty()).collect()
}

/// Returns the numbers with their units, the times and the positions in a text.
fn numbers(text: &str) -> Vec<String> {
    const UNITS: [&str; 12] = [
        "B", "KiB", "MiB", "GiB", "TiB", "KiB/s", "MiB/s", "s", "min", "h", "d", "segments",
    ];
    let punctuation = [',', ';', '.', ':'];
    let words: Vec<&str> = text
        .split_whitespace()
        .map(|word| word.trim_end_matches(punctuation))
        .collect();
    (words.iter().zip(words.iter().skip(1).chain(&[""])))
        .filter(|(word, _)| word.starts_with(|c: char| c.is_ascii_digit()))
        .map(|(word, next)| match UNITS.contains(next) {
            true => format!("{word} {next}"),
            false => (*word).to_owned(),
        })
        .collect()
}

#[test]
fn status_says_what_the_page_says() {
    let Some((server, place, archiver)) = archived() else {
        return;
    };
    record(&place, &outcome(OutcomeKind::Drill, true));
    let verify = place.command(&server.conninfo()).arg("verify").output();
    succeed("verify", &verify.expect("wal-archiver runs"));
    wait_until("drill and verification are seen", || {
        let report = report(&archiver);
        report["corrupt_objects"] == 0
            && report["last_drill"]["passed"] == true
            && report["state"] == "ok"
    });
    let of_page = || {
        let page = body(&archiver.get("/"));
        let mut said = texts(&page, "<b class=\"value\">", "</b>");
        said.extend(texts(&page, "<span class=\"notes\">", "</span></dd>"));
        let flow = page.split_once("id=\"flow\"").expect("a section").1;
        let flow = flow.split_once("</section>").expect("it ends").0;
        said.extend(texts(flow, "<p class=\"value\">", "</p>"));
        said.extend(texts(flow, "<div class=\"notes\">", "</div>"));
        said.extend(texts(&page, "<p class=\"facts\">", "</p>"));
        said.extend(texts(&page, "id=\"backups\"", "</section>"));
        said.iter()
            .flat_map(|text| numbers(text))
            .collect::<Vec<_>>()
    };
    // Values that change between two requests are compared at the next one.
    let mut compared = 0;
    wait_until("every number of the page is in status", || {
        let before = of_page();
        let told = status(&archiver, &place, &server, &[]);
        let after = of_page();
        let missing: Vec<_> = before
            .iter()
            .filter(|number| after.contains(number) && !told.contains(number.as_str()))
            .collect();
        compared = before
            .iter()
            .filter(|number| after.contains(number))
            .count();
        if !missing.is_empty() {
            eprintln!("{missing:?} of the page is not in\n{told}");
        }
        missing.is_empty()
    });
    assert!(compared >= 15, "the page shows numbers: {compared}");
    // The document behind both is the API's.
    let json: Value =
        serde_json::from_str(&status(&archiver, &place, &server, &["--json"])).expect("JSON");
    let (mut told, mut api) = (json[0].clone(), report(&archiver));
    for document in [&mut told, &mut api] {
        let document = document.as_object_mut().expect("an object");
        let keys: Vec<String> = document.keys().cloned().collect();
        document.clear();
        document.insert("keys".to_owned(), keys.into());
    }
    assert_eq!(told, api);
}

/// Feeds 3600 answers of a real idle server, one second apart, to the estimator, and compares the
/// daemon's own number each time.
#[test]
fn an_idle_hour_shows_zero_throughout() {
    let Some((server, place, archiver)) = archived() else {
        return;
    };
    wait_flushed(&server, server.lsn());
    wait_until("it is OK", || report(&archiver)["state"] == "ok");
    let mut client = testbed::cluster::connect(&server.conninfo()).expect("SQL");
    let mut estimator = RpoEstimator::default();
    let mut exposed = |second: u64, client: &mut postgres::Client| {
        let row = client
            .query_one("SELECT pg_current_wal_flush_lsn()::text", &[])
            .expect("an answer");
        let flushed: Lsn = row.get::<_, String>(0).parse().expect("an LSN");
        let held = report(&archiver)["durable"]["remote"]["lsn"]
            .as_str()
            .and_then(|lsn| lsn.parse().ok());
        estimator.source_seen(std::time::Duration::from_secs(second), flushed);
        estimator.held(held.expect("an LSN"));
        estimator.exposure(std::time::Duration::from_millis(second * 1000 + 999))
    };
    // WAL that PostgreSQL itself writes after the last transaction (such as a snapshot of running
    // ones) means that it is not idle yet.
    let mut written = server.lsn();
    wait_until("it is idle", || {
        std::thread::sleep(std::time::Duration::from_secs(3));
        std::mem::replace(&mut written, server.lsn()) == written
    });
    let remote = "pitr_rpo_seconds{cluster=\"main\",tier=\"remote\"} 0.0\n";
    for second in 0..3600 {
        let exposure = exposed(second, &mut client);
        assert_eq!(
            (exposure.rpo, exposure.lag_bytes),
            (Some(std::time::Duration::ZERO), Some(0)),
            "second {second}"
        );
        if second % 10 == 0 {
            assert!(archiver.get("/metrics").contains(remote), "second {second}");
            let report = report(&archiver);
            assert_eq!(
                report["durable"]["remote"]["rpo_seconds"], 0.0,
                "second {second}: {report}"
            );
            assert_eq!(report["state"], "ok");
        }
    }
    assert_eq!(server.lsn(), written, "the server was idle");
    // The zero is a measurement: one transaction that the store does not accept ends it.
    let aside = place.repository().with_extension("aside");
    repository::durable::rename(&place.repository(), &aside).expect("the repository goes");
    fs::write(place.repository(), "a file is no folder").expect("in its place");
    server.write_wal(1);
    assert!(exposed(3600, &mut client).rpo > Some(std::time::Duration::ZERO));
    wait_until("the daemon says so", || {
        !archiver.get("/metrics").contains(remote)
    });
}

/// Secrets that must not appear anywhere, each in the place where an operator would configure it.
const SECRETS: [&str; 6] = [
    "planted-password",
    "planted-read-token-0123456789",
    "planted-operate-token-0123456789",
    "planted-webhook",
    "planted-store-key",
    "planted-routing-key",
];

#[test]
fn no_answer_holds_a_secret() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let [password, read, operate, webhook, store, routing] = SECRETS;
    let at = |name: &str| place.spool().with_extension(name);
    private_file(&at("read"), read);
    private_file(&at("operate"), operate);
    let configuration = at("toml");
    private_file(
        &configuration,
        &format!(
            "http_token_file = '{}'\nhttp_operate_token_file = '{}'\ns3_secret_key = '{store}'\ns3_access_key = 'x'\n\
             [cluster.main]\nconninfo = '{} password={password}'\nheal_from = ['host=127.0.0.1 port=1 password={password}']\n\
             [notify.a]\ntype = 'webhook'\nurl = 'http://127.0.0.1:1/{webhook}'\n\
             [notify.b]\ntype = 'pagerduty'\nurl = 'http://127.0.0.1:1/{webhook}'\nrouting_key = '{routing}'\n",
            at("read").display(),
            at("operate").display(),
            server.conninfo()
        ),
    );
    let command = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wal-archiver"));
        let url = format!("file://{}", place.repository().display());
        command
            .arg("--config")
            .arg(&configuration)
            .args(["--repository", &url]);
        command.arg("--spool").arg(place.spool());
        command
    };
    let archiver = place.run_with(command());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(100);
    succeed(
        "backup",
        &command().arg("backup").output().expect("it runs"),
    );
    let mut seen = Vec::new();
    let mut look = || {
        let operates = format!("Authorization: Bearer {operate}\r\n");
        for (method, path) in [
            ("GET", "/"),
            ("GET", "/clusters/main"),
            ("GET", "/?at=2026-11-21T10:00:00Z"),
            ("GET", "/login"),
            ("GET", "/metrics"),
            ("GET", "/api/v1/clusters"),
            ("GET", "/api/v1/clusters/main"),
            ("GET", "/api/v1/clusters/main/window"),
            ("GET", "/api/v1/clusters/main/backups"),
            ("GET", "/api/v1/clusters/main/drills"),
            ("GET", "/api/v1/clusters/main/events"),
            ("GET", "/api/v1/clusters/main/series"),
            ("GET", "/api/v1/clusters/main/health?max_rpo=1s"),
            (
                "GET",
                "/api/v1/clusters/main/locate?time=2026-11-21T10:00:00Z",
            ),
            ("GET", "/api/v1/openapi.json"),
            ("GET", "/healthz"),
            ("GET", "/readyz"),
            ("GET", "/none"),
            ("GET", "/app.js"),
            ("POST", "/api/v1/notify/test"),
            ("POST", "/login"),
            ("DELETE", "/"),
        ] {
            for who in ["", operates.as_str()] {
                seen.push((path.to_owned(), archiver.ask(method, path, who)));
            }
        }
        for arguments in [
            &["status"][..],
            &["status", "--json"],
            &["check"],
            &["config", "show"],
        ] {
            let output = command().args(arguments).output().expect("it runs");
            seen.push((arguments.join(" "), format!("{output:?}")));
        }
    };
    look();
    // The same while everything fails, since error messages may print more.
    server.down("fast");
    repository::durable::rename(&place.repository(), &at("aside")).expect("the store goes");
    wait_until("it fails", || archiver.log().contains("not streaming"));
    wait_until("people were told in vain", || {
        archiver.log().contains("notif")
    });
    look();
    seen.push(("log".to_owned(), archiver.log()));
    for (place, answer) in &seen {
        for secret in SECRETS {
            assert!(!answer.contains(secret), "{secret} is in {place}: {answer}");
        }
    }
    let answered = seen
        .iter()
        .filter(|(_, answer)| answer.starts_with("HTTP/1.1 200"))
        .count();
    assert!(answered > 30, "the routes were answered: {answered}");
}
