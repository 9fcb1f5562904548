//! Rules, board and documents name only metrics that `/metrics` has, and promtool accepts all of
//! them.

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use super::{archived, body};
use crate::support::succeed;

/// Returns every `pitr_…` name in a text.
fn names(text: &str) -> Vec<&str> {
    text.match_indices("pitr_")
        .map(|(at, _)| {
            let rest = &text[at..];
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            &rest[..end.unwrap_or(rest.len())]
        })
        .collect()
}

/// Returns the names in a text for which `/metrics` has no sample.
fn not_emitted<'a>(text: &'a str, metrics: &str) -> Vec<&'a str> {
    let emitted = |name: &str| {
        metrics.lines().any(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        })
    };
    let named = names(text).into_iter();
    named.filter(|name| !emitted(name)).collect()
}

#[test]
fn rules_board_and_documents_name_only_what_is_emitted() {
    let Some((_server, _place, archiver)) = archived() else {
        return;
    };
    let metrics = body(&archiver.get("/metrics"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut seen = 0;
    for file in [
        "monitoring/tidemark.rules.yml",
        "monitoring/tidemark.tests.yml",
        "monitoring/grafana-tidemark.json",
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "wal-format/FORMAT.md",
    ] {
        let text = fs::read_to_string(root.join(file)).expect(file);
        let missing = not_emitted(&text, &metrics);
        assert!(
            missing.is_empty(),
            "{file} names {missing:?}, which is not emitted"
        );
        seen += names(&text).len();
        // Each name with an additional letter is detected as missing.
        for name in names(&text).into_iter().collect::<BTreeSet<_>>() {
            let mistyped = format!("{name}x");
            let found = text.replace(name, &mistyped);
            assert!(
                not_emitted(&found, &metrics).contains(&mistyped.as_str()),
                "{mistyped} in {file} would not be found out"
            );
        }
    }
    assert!(seen > 50, "the files name metrics");
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
    input.write_all(metrics.as_bytes()).expect("it reads");
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
