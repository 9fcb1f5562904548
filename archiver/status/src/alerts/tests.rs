//! Compares the shipped monitoring files with the table of alerts.
//!
//! `TIDEMARK_WRITE_RULES=1` writes the files instead.

use std::{collections::BTreeSet, env, fmt::Write as _, fs, path::Path};

use super::*;

/// Returns `text` as a YAML scalar.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn rules() -> String {
    let mut file = String::from(
        "# Alerts of Tidemark, written from the table in archiver/status/src/alerts/table.rs. Thresholds\n\
         # are exported by the archiver. Unit tests: promtool test rules tidemark.tests.yml\n\
         # runbook_url assumes that Prometheus scrapes the archiver itself, without TLS.\n\
         groups:\n  - name: tidemark\n    rules:\n",
    );
    let down = (
        "PitrArchiverDown",
        "up == 0 and on(job, instance) count_over_time(pitr_build_info[30d]) > 0",
        60,
        "critical",
        "The archiver {{ $labels.instance }} cannot be scraped",
        "Is the process alive? `systemctl status tidemark`. The slot keeps WAL on the server \
         meanwhile.",
    );
    let of_table = RULES.iter().map(|rule| {
        (
            rule.name,
            rule.expression,
            rule.patience_seconds,
            rule.severity.name(),
            rule.rule_summary,
            rule.runbook,
        )
    });
    for (name, expression, patience, severity, summary, runbook) in of_table.chain([down]) {
        let url = format!("http://{{{{ $labels.instance }}}}/runbook#{name}");
        let _ = write!(
            file,
            "      - alert: {name}\n        expr: {}\n        for: {patience}s\n        \
             labels:\n          severity: {severity}\n        annotations:\n          \
             summary: {}\n          runbook: {}\n          runbook_url: {}\n",
            quoted(expression),
            quoted(summary),
            quoted(runbook),
            quoted(&url),
        );
    }
    file
}

fn inhibitions() -> String {
    let mut file = String::from(
        "# Inhibition for Alertmanager, written from the table in archiver/status/src/alerts/table.rs: one\n\
         # fault pages once. Copy the entries into alertmanager.yml.\ninhibit_rules:\n",
    );
    for rule in RULES.iter().filter(|rule| !rule.inhibited_by.is_empty()) {
        let _ = write!(
            file,
            "  - source_matchers: [ 'alertname=~\"{}\"' ]\n    \
             target_matchers: [ 'alertname=\"{}\"' ]\n    equal: [ cluster, instance ]\n",
            rule.inhibited_by.join("|"),
            rule.name,
        );
    }
    file
}

#[test]
fn the_shipped_files_are_those_of_the_table() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../monitoring");
    for (name, expected) in [
        ("tidemark.rules.yml", rules()),
        ("alertmanager-inhibit.yml", inhibitions()),
    ] {
        let path = directory.join(name);
        if env::var_os("TIDEMARK_WRITE_RULES").is_some() {
            fs::write(&path, &expected).expect("it is written");
        }
        let found = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            found == expected,
            "{name} differs from the table; write it with TIDEMARK_WRITE_RULES=1"
        );
    }
}

#[test]
fn the_table_is_consistent() {
    let names: BTreeSet<&str> = RULES.iter().map(|rule| rule.name).collect();
    assert_eq!(names.len(), RULES.len(), "each name occurs once");
    for rule in RULES {
        for cause in rule.inhibited_by {
            let cause = super::rule(cause).unwrap_or_else(|| panic!("{cause} is not an alert"));
            assert!(
                !cause.inhibited_by.contains(&rule.name),
                "{} and {} inhibit each other, so neither would be sent",
                rule.name,
                cause.name
            );
        }
        assert!(rule.runbook.ends_with('.'), "{}", rule.name);
        assert!(!rule.past.ends_with('.'), "{}", rule.name);
    }
}
