//! The record of a drill: the outcome object in the repository, and the report in a directory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use repository::durable;
use serde::Serialize;
use wal_format::{
    CheckVerdict, ClusterName, DrillCheck, DrillRecord, Outcome, OutcomeKind, SystemIdentifier,
};

use crate::{Error, Result, inventory::Archive};

/// A drill that has ended, with what is known around it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) cluster: ClusterName,
    pub(crate) system_identifier: SystemIdentifier,
    pub(crate) repository: String,
    pub(crate) outcome: Outcome,
    /// The drill before; `None` if there is none.
    pub(crate) previous: Option<Outcome>,
    /// The differences from the drill before.
    pub(crate) changes: Vec<String>,
    /// True if the outcome is stored in the repository.
    pub(crate) recorded: bool,
    /// The file that holds the outcome instead, and the reason.
    pub(crate) recorded_locally: Option<(PathBuf, String)>,
    /// The directory of the copy, if it was kept.
    pub(crate) kept: Option<PathBuf>,
}

impl Report {
    /// Records the outcome in the repository, or else in a file in `local`.
    ///
    /// # Errors
    /// [`Error::Io`] if it can be recorded nowhere.
    pub(crate) fn record(
        archive: &Archive,
        system: SystemIdentifier,
        mut outcome: Outcome,
        local: &Path,
    ) -> Result<Self> {
        let repository = &archive.repository;
        let previous = repository
            .newest_outcome(system, OutcomeKind::Drill, |other| other.id != outcome.id)
            .unwrap_or_else(|error| {
                tracing::warn!(event = "drill_unreadable", %error, "the drill before cannot be read");
                None
            });
        let recorded_locally = match repository.put_outcome(system, &outcome) {
            Ok(id) => {
                outcome.id = id;
                None
            }
            Err(error) => {
                fs::create_dir_all(local).map_err(Error::io("create directory", local))?;
                let path = local.join(format!("tidemark-drill-{}.json", outcome.id));
                write_json(&path, &outcome)?;
                Some((path, error.to_string()))
            }
        };
        Ok(Self {
            cluster: repository.cluster().clone(),
            system_identifier: system,
            repository: repository.url(),
            changes: previous
                .as_ref()
                .map(|previous| changes(previous, &outcome))
                .unwrap_or_default(),
            previous,
            recorded: recorded_locally.is_none(),
            recorded_locally,
            outcome,
            kept: None,
        })
    }

    /// Writes the report as Markdown and JSON. Returns the path of the Markdown file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn write(&self, directory: &Path) -> Result<PathBuf> {
        fs::create_dir_all(directory).map_err(Error::io("create directory", directory))?;
        let name = format!("drill-{}-{}", self.cluster, self.outcome.id);
        write_json(&directory.join(format!("{name}.json")), self)?;
        let path = directory.join(format!("{name}.md"));
        durable::replace(&path, self.markdown().as_bytes()).map_err(Error::local)?;
        Ok(path)
    }

    fn markdown(&self) -> String {
        let mut text = String::new();
        let outcome = &self.outcome;
        let none = DrillRecord::default();
        let record = outcome.drill.as_deref().unwrap_or(&none);
        let verdict = if outcome.passed { "passed" } else { "FAILED" };
        macro_rules! say {
            ($($part:tt)*) => {{
                text.push_str(&format!($($part)*));
                text.push('\n');
            }};
        }
        say!("# Restore drill of cluster {}: {verdict}\n", self.cluster);
        say!("{}\n", cell(&outcome.message));
        say!("| tested | |\n|---|---|");
        let text_of =
            |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".to_owned());
        let seed = record.seed.map_or_else(String::new, |seed| {
            format!(" (--target random --seed {seed})")
        });
        let backup = outcome.backup.as_ref().map(ToString::to_string);
        let timeline = record.timeline.map(|timeline| timeline.to_string());
        for (name, value) in [
            ("drill", outcome.id.to_string()),
            ("system identifier", self.system_identifier.to_string()),
            ("repository", self.repository.clone()),
            ("target", format!("{}{seed}", record.target)),
            ("base backup", text_of(&backup)),
            ("recovery stopped", text_of(&record.stopped)),
            ("timeline", text_of(&timeline)),
            ("PostgreSQL", text_of(&record.server_version)),
            ("host of the drill", record.host.clone()),
        ] {
            say!("| {name} | {} |", cell(&value));
        }
        say!("\n## Objectives\n\n| objective | target | measured |\n|---|---|---|");
        for (name, target, measured) in objectives(outcome, record) {
            say!("| {name} | {} | {} |", seconds(target), seconds(measured));
        }
        say!("\n## Timeline\n\n| time (UTC) | after | step |\n|---|---|---|");
        for step in &record.steps {
            let after = step.at.micros_since(outcome.started) as f64 / 1e6;
            say!("| {} | {after:.1} s | {} |", step.at, cell(&step.step));
        }
        say!("\n## Checks\n\n| check | result | answer | duration |\n|---|---|---|---|");
        for check in &record.checks {
            say!(
                "| {} | {} | {} | {:.1} s |",
                cell(&check.name),
                check.verdict.word(),
                cell(&check.answer),
                check.seconds
            );
        }
        say!("\n## Changes since the drill before\n");
        match &self.previous {
            None => say!("This is the first recorded drill."),
            Some(previous) => {
                let verdict = if previous.passed { "passed" } else { "failed" };
                say!("The drill before, {}, {verdict}.\n", previous.id);
                for change in &self.changes {
                    say!("- {}", cell(change));
                }
                if self.changes.is_empty() {
                    say!("- nothing");
                }
            }
        }
        say!("\n## To sign\n");
        for item in [
            "The target and the base backup are those that this drill was to test.",
            "RTO and data loss are acceptable, or an action is recorded.",
            "Each failed or skipped check was judged.",
            "The keys and passwords that a restore needs can be reached without the lost host.",
            "The people who restore in an emergency know this report.",
        ] {
            say!("- [ ] {item}");
        }
        say!(
            "\nName: ______________________  Date: ______________  Signature: ______________________"
        );
        text
    }
}

/// Returns each objective with its target and its measured value in seconds.
fn objectives(
    outcome: &Outcome,
    record: &DrillRecord,
) -> [(&'static str, Option<f64>, Option<f64>); 4] {
    [
        (
            "RTO: until the first answer",
            record.rto_target_seconds,
            outcome.rto_seconds,
        ),
        (
            "RPO: commits lost",
            record.rpo_target_seconds,
            outcome.loss_seconds,
        ),
        ("fetch and unpack", None, outcome.fetch_seconds),
        ("start and replay", None, outcome.replay_seconds),
    ]
}

fn seconds(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.1} s"))
}

/// Returns text for a cell of a table.
fn cell(text: &str) -> String {
    let text = repository::printable(text);
    text.replace('|', "\\|").replace('\n', " ")
}

/// Returns the differences between two drills, in words.
pub(crate) fn changes(previous: &Outcome, now: &Outcome) -> Vec<String> {
    let mut changes = Vec::new();
    if previous.passed != now.passed {
        let verdict = |passed| if passed { "passed" } else { "failed" };
        changes.push(format!(
            "the drill has {}; the one before has {}",
            verdict(now.passed),
            verdict(previous.passed)
        ));
    }
    let none = DrillRecord::default();
    let record = |outcome: &'_ Outcome| outcome.drill.as_deref().cloned().unwrap_or(none.clone());
    let (before, after) = (record(previous), record(now));
    for ((name, _, old), (_, _, new)) in objectives(previous, &before)
        .into_iter()
        .zip(objectives(now, &after))
    {
        // Tenths of a second are noise.
        if seconds(old) != seconds(new) {
            changes.push(format!("{name}: {} after {}", seconds(new), seconds(old)));
        }
    }
    for (name, old, new) in [
        (
            "bytes of the base backup",
            previous.fetched_bytes,
            now.fetched_bytes,
        ),
        (
            "bytes of WAL replayed",
            previous.replayed_bytes,
            now.replayed_bytes,
        ),
    ] {
        if let (Some(old), Some(new)) = (old, new)
            && old != new
        {
            changes.push(format!("{name}: {new} after {old}"));
        }
    }
    let find = |checks: &[DrillCheck], name: &str| -> Option<CheckVerdict> {
        checks
            .iter()
            .find(|check| check.name == name)
            .map(|check| check.verdict)
    };
    for check in &after.checks {
        match find(&before.checks, &check.name) {
            None => changes.push(format!(
                "new check {}: {}",
                check.name,
                check.verdict.word()
            )),
            Some(old) if old != check.verdict => changes.push(format!(
                "check {}: {} after {}",
                check.name,
                check.verdict.word(),
                old.word()
            )),
            Some(_) => {}
        }
    }
    for check in &before.checks {
        if find(&after.checks, &check.name).is_none() {
            changes.push(format!("check {} was not made", check.name));
        }
    }
    changes
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let json =
        serde_json::to_vec_pretty(value).map_err(|error| Error::io("write", path)(error.into()))?;
    durable::replace(path, &json).map_err(Error::local)
}

#[cfg(test)]
mod tests {
    use wal_format::PgTimestamp;

    use super::*;

    fn outcome(passed: bool, rto: f64, checks: &[(&str, CheckVerdict)]) -> Outcome {
        let id = "20261121T101500Z-9f3c".parse().expect("an ID");
        let at = PgTimestamp(0);
        let mut outcome = Outcome::new(OutcomeKind::Drill, id, at, at, passed, "a | b".to_owned());
        outcome.rto_seconds = Some(rto);
        let checks = checks.iter().map(|(name, verdict)| DrillCheck {
            name: (*name).to_owned(),
            verdict: *verdict,
            answer: "t".to_owned(),
            seconds: 0.0,
        });
        outcome.drill = Some(Box::new(DrillRecord {
            checks: checks.collect(),
            ..DrillRecord::default()
        }));
        outcome
    }

    #[test]
    fn a_report_names_what_changed() {
        use CheckVerdict::{Failed, Passed};
        let before = outcome(true, 10.0, &[("a", Passed), ("gone", Passed)]);
        let now = outcome(false, 20.0, &[("a", Failed), ("new", Passed)]);
        let changed = changes(&before, &now);
        assert_eq!(
            changed,
            [
                "the drill has failed; the one before has passed",
                "RTO: until the first answer: 20.0 s after 10.0 s",
                "check a: FAILED after passed",
                "new check new: passed",
                "check gone was not made",
            ]
        );
        assert!(changes(&now, &now).is_empty());
        let report = Report {
            cluster: "main".parse().expect("a name"),
            system_identifier: SystemIdentifier(7),
            repository: "file:///r".to_owned(),
            outcome: now,
            previous: Some(before),
            changes: changed,
            recorded: true,
            recorded_locally: None,
            kept: None,
        };
        let text = report.markdown();
        for part in [
            "cluster main: FAILED",
            "a \\| b",
            "| RTO: until the first answer | – | 20.0 s |",
            "| a | FAILED | t |",
            "- check gone was not made",
            "- [ ] ",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
