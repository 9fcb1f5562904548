//! `wal-archiver audit`: prints the records of the audit trail, as a table, JSON or CSV.

use std::io;

use repository::{AuditTrail, Repository, config::Settings, parse_time, printable};
use serde::Serialize;
use wal_format::{ClusterName, Outcome, OutcomeKind, PgTimestamp, SystemIdentifier};

use super::output;
use crate::error::{Error, Result};

/// The header of the CSV document.
const COLUMNS: [&str; 19] = [
    "cluster",
    "system_identifier",
    "id",
    "kind",
    "started",
    "finished",
    "passed",
    "user",
    "sudo_user",
    "host",
    "program",
    "version",
    "backup",
    "branch",
    "target",
    "directory",
    "stop",
    "exit_code",
    "message",
];

/// The form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Table,
    Json,
    Csv,
}

/// The records of one cluster.
#[derive(Serialize)]
struct Document<'a> {
    cluster: &'a ClusterName,
    repository: String,
    records: Vec<Record<'a>>,
    /// The names of the records that cannot be read, with the problem.
    unreadable: Vec<String>,
}

#[derive(Serialize)]
struct Record<'a> {
    system_identifier: SystemIdentifier,
    #[serde(flatten)]
    outcome: &'a Outcome,
}

/// Parses the argument of `--kind`.
pub(super) fn kind(text: &str) -> std::result::Result<OutcomeKind, String> {
    text.parse().map_err(|_| {
        let names = OutcomeKind::ALL.map(OutcomeKind::name).join(", ");
        format!("no kind of record; one of {names}")
    })
}

pub(super) fn audit(
    settings: &Settings,
    since: Option<&str>,
    kind: Option<OutcomeKind>,
    form: Form,
) -> Result<()> {
    let now = jiff::Timestamp::now();
    let since = since.map(|text| parse_time(text, None, now)).transpose();
    let since = since.map_err(|error| Error::Usage {
        message: format!("--since: {error}"),
    })?;
    let mut trails = Vec::new();
    for cluster in &settings.clusters {
        let repository = Repository::open_known(cluster)?;
        trails.push((cluster, repository.audit_trail(since, kind)?));
    }
    let documents: Vec<Document<'_>> = trails
        .iter()
        .map(|(cluster, trail)| Document::of(&cluster.name, cluster.repository.to_string(), trail))
        .collect();
    match form {
        Form::Json => output::json(&documents),
        Form::Csv => write_csv(&documents, io::stdout().lock())?,
        Form::Table => documents.iter().for_each(Document::print),
    }
    let unreadable = documents.iter().flat_map(|one| &one.unreadable);
    let unreadable: Vec<&str> = unreadable.map(String::as_str).collect();
    if unreadable.is_empty() {
        return Ok(());
    }
    Err(Error::Audit {
        problem: unreadable.join("; "),
    })
}

impl<'a> Document<'a> {
    fn of(cluster: &'a ClusterName, repository: String, trail: &'a AuditTrail) -> Self {
        let records = trail.records.iter();
        Self {
            cluster,
            repository,
            records: records
                .map(|(system_identifier, outcome)| Record {
                    system_identifier: *system_identifier,
                    outcome,
                })
                .collect(),
            unreadable: trail.unreadable.iter().map(ToString::to_string).collect(),
        }
    }

    fn print(&self) {
        output::line(&format!("cluster {}: {}", self.cluster, self.repository));
        if self.records.is_empty() {
            output::line("  no record");
        }
        for Record { outcome, .. } in &self.records {
            let verdict = if outcome.passed { "ok" } else { "FAILED" };
            let (kind, who) = (outcome.kind.name(), who(outcome));
            output::line(&format!(
                "  {}  {kind:<8}  {verdict:<6}  {who}  {}",
                seconds(outcome.started),
                outcome.message
            ));
        }
    }
}

/// Returns `USER@HOST`.
fn who(outcome: &Outcome) -> String {
    let Some(actor) = &outcome.actor else {
        // A build before the audit trail recorded it.
        return "unknown".to_owned();
    };
    let sudo = actor.sudo_user.as_ref();
    let sudo = sudo.map_or_else(String::new, |user| format!(" (sudo by {user})"));
    format!("{}@{}{sudo}", actor.user, actor.host)
}

/// Returns a time to the second.
fn seconds(time: PgTimestamp) -> String {
    time.to_jiff().map_or_else(
        || time.to_string(),
        |time| time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
    )
}

/// Writes one line for each record, with a header. Control characters are escaped.
fn write_csv(documents: &[Document<'_>], target: impl io::Write) -> Result<()> {
    let mut writer = csv::Writer::from_writer(target);
    let written = (|| -> csv::Result<()> {
        writer.write_record(COLUMNS)?;
        for document in documents {
            for record in &document.records {
                let cells = record.cells(document.cluster);
                writer.write_record(cells.iter().map(|cell| printable(cell).into_owned()))?;
            }
        }
        writer.flush()?;
        Ok(())
    })();
    match written.map_err(csv::Error::into_kind) {
        Ok(()) => Ok(()),
        // A closed pipe (`| head`) is not an error.
        Err(csv::ErrorKind::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(csv::ErrorKind::Io(error)) => Err(Error::io("write", "standard output")(error)),
        Err(other) => Err(Error::io("write", "standard output")(io::Error::other(
            format!("{other:?}"),
        ))),
    }
}

impl Record<'_> {
    fn cells(&self, cluster: &ClusterName) -> [String; COLUMNS.len()] {
        let outcome = self.outcome;
        let actor = outcome.actor.as_ref();
        let of_actor =
            |part: fn(&wal_format::Actor) -> &String| actor.map(part).cloned().unwrap_or_default();
        let restore = outcome.restore.as_deref();
        let of_restore = |part: fn(&wal_format::RestoreRecord) -> &String| {
            restore.map(part).cloned().unwrap_or_default()
        };
        let sudo_user = actor.and_then(|actor| actor.sudo_user.clone());
        let drill_target = outcome.drill.as_ref().map(|drill| drill.target.clone());
        let exit_code = restore.map(|restore| restore.exit_code.to_string());
        let text = |value: Option<String>| value.unwrap_or_default();
        [
            cluster.to_string(),
            self.system_identifier.to_string(),
            outcome.id.to_string(),
            outcome.kind.to_string(),
            outcome.started.to_string(),
            outcome.finished.to_string(),
            outcome.passed.to_string(),
            of_actor(|actor| &actor.user),
            text(sudo_user),
            of_actor(|actor| &actor.host),
            of_actor(|actor| &actor.program),
            of_actor(|actor| &actor.version),
            text(outcome.backup.as_ref().map(ToString::to_string)),
            text(outcome.branch.map(|branch| branch.to_string())),
            drill_target.unwrap_or_else(|| of_restore(|restore| &restore.target)),
            of_restore(|restore| &restore.directory),
            of_restore(|restore| &restore.stop),
            text(exit_code),
            outcome.message.clone(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_has_a_header_and_quotes_what_would_end_a_cell() {
        let at = PgTimestamp::from_jiff("2026-11-21T10:15:00Z".parse().expect("a time"));
        let id = "20261121T101500Z-9f3c".parse().expect("a name");
        let message = "kept: \"a\", b\n\u{1b}[2J".to_owned();
        let outcome = Outcome::new(OutcomeKind::Note, id, at, at, true, message);
        let trail = AuditTrail {
            records: vec![(SystemIdentifier(7), outcome)],
            unreadable: Vec::new(),
        };
        let cluster = "main".parse().expect("a name");
        let document = Document::of(&cluster, String::new(), &trail);
        let mut text = Vec::new();
        write_csv(&[document], &mut text).expect("memory");
        let text = String::from_utf8(text).expect("UTF-8");
        let (header, line) = text.split_once('\n').expect("a header");
        assert_eq!(header, COLUMNS.join(","));
        assert!(
            line.ends_with("\"kept: \"\"a\"\", b\\n\\u{1b}[2J\"\n"),
            "{line}"
        );
        assert!(
            line.starts_with("main,7,20261121T101500Z-9f3c,note,"),
            "{line}"
        );
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let cells = reader.records().next().expect("a record").expect("CSV");
        assert_eq!(cells.len(), COLUMNS.len());
    }

    #[test]
    fn an_unknown_kind_is_refused_with_the_list() {
        assert_eq!(kind("restore"), Ok(OutcomeKind::Restore));
        let refused = kind("restores").expect_err("no kind");
        assert!(
            refused.contains("backup, delete, drill, epoch"),
            "{refused}"
        );
    }
}
