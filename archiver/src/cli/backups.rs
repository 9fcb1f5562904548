//! `wal-archiver backup list|keep|release|annotate`: lists the base backups, and records what the
//! operator says about one of them.

use std::collections::BTreeMap;

use catalog::Catalog;
use repository::outcome_name;
use repository::{
    BackupNotes, ExitKind, Repository,
    config::{ClusterSettings, Settings},
};
use serde::Serialize;
use status::outcomes::ended;
use wal_format::{
    BACKUP_NOTE_FORMAT_VERSION, BackupId, BackupInfo, BackupNote, Branch, ClusterName, Lsn,
    NoteChange, ObjectKey, OutcomeKind, PgTimestamp,
};

use super::output;
use crate::{
    error::{Error, Result},
    upkeep::outcomes,
};

/// A backup in the list.
#[derive(Debug, Serialize)]
struct Listed {
    id: BackupId,
    label: String,
    branch: Branch,
    start_lsn: Lsn,
    stop_lsn: Lsn,
    started: PgTimestamp,
    finished: PgTimestamp,
    from_standby: bool,
    raw_bytes: u64,
    stored_bytes: u64,
    /// The reason why the operator keeps it. `null` if retention decides.
    kept: Option<String>,
    annotation: String,
    /// The damage that the last verification found, or an object that is missing now.
    problem: Option<String>,
    /// The server's warnings while it was taken.
    warnings: Vec<String>,
}

/// The JSON output for one cluster.
#[derive(Debug, Serialize)]
struct Document<'a> {
    cluster: &'a ClusterName,
    repository: String,
    backups: Vec<Listed>,
}

pub(super) fn list(settings: &Settings, json: bool) -> Result<()> {
    let mut documents = Vec::new();
    for cluster in &settings.clusters {
        let backups = listed(cluster)?;
        if !json {
            print(cluster, &backups);
        }
        documents.push(Document {
            cluster: &cluster.name,
            repository: cluster.repository.to_string(),
            backups,
        });
    }
    if json {
        output::json(&documents);
    }
    Ok(())
}

fn listed(settings: &ClusterSettings) -> Result<Vec<Listed>> {
    let repository = Repository::open_known(settings)?;
    let Some(identity) = repository.identity()? else {
        return Ok(Vec::new());
    };
    let system = identity.system_identifier;
    let catalog = Catalog::open_for_restore(Some(&settings.catalog), &repository)?;
    let mut notes = repository.backup_notes(system)?;
    let mut backups = catalog.backups()?;
    let (mut damaged, _) = repository.known_damage(system)?;
    damaged.extend(repository.incomplete_backups(system, &backups)?);
    let pinned = pinned(settings);
    let row = |backup: BackupInfo| {
        let notes = notes.remove(&backup.id).unwrap_or_default();
        let is_pinned = pinned.contains(&backup.id);
        let pinned = is_pinned.then(|| "named by keep_backups".to_owned());
        Listed {
            kept: notes.kept.or(pinned),
            annotation: notes.annotation,
            problem: damaged.remove(&backup.id).map(|damage| damage.to_string()),
            id: backup.id,
            label: backup.label,
            branch: backup.branch,
            start_lsn: backup.start_lsn,
            stop_lsn: backup.stop_lsn,
            started: backup.started,
            finished: backup.finished,
            from_standby: backup.from_standby,
            raw_bytes: backup.raw_bytes,
            stored_bytes: backup.stored_bytes,
            warnings: backup.warnings,
        }
    };
    // Names of the same second are in no order.
    backups.sort_by_key(|backup| (backup.finished, backup.start_lsn));
    Ok(backups.into_iter().map(row).collect())
}

/// Returns the backups that `keep_backups` names for any repository of the cluster.
fn pinned(settings: &ClusterSettings) -> Vec<BackupId> {
    let places = settings.repository.each();
    let policies = places.into_iter().filter_map(|place| place.retention);
    policies.flat_map(|policy| policy.pinned).collect()
}

fn print(cluster: &ClusterSettings, backups: &[Listed]) {
    output::line(&format!("cluster {}: {}", cluster.name, cluster.repository));
    if backups.is_empty() {
        output::line("  no backup: run `wal-archiver backup`, without one nothing can be restored");
    }
    for backup in backups {
        let mut text = format!(
            "  {}  {}  {}",
            backup.id,
            backup.finished,
            output::bytes(backup.stored_bytes)
        );
        for part in [&backup.label, &backup.annotation] {
            if !part.is_empty() {
                text += &format!("  {part}");
            }
        }
        match backup.kept.as_deref() {
            Some("") => text += "  KEPT",
            Some(reason) => text += &format!("  KEPT ({reason})"),
            None => {}
        }
        if let Some(problem) = &backup.problem {
            text += &format!("  DAMAGED: {problem}");
        }
        output::line(&text);
        for warning in &backup.warnings {
            output::line(&format!("    the server's warning: {warning}"));
        }
    }
}

/// Records a change in each repository that holds the backup.
pub(super) fn note(
    settings: &ClusterSettings,
    id: &BackupId,
    change: NoteChange,
    text: &str,
) -> Result<()> {
    let now = jiff::Timestamp::now();
    let note = BackupNote {
        format_version: BACKUP_NOTE_FORMAT_VERSION,
        id: outcome_name(now).ok_or_else(|| Error::Usage {
            message: "the clock gives no year of four digits; set it".to_owned(),
        })?,
        backup: id.clone(),
        made: PgTimestamp::from_jiff(now),
        change,
        text: text.to_owned(),
    };
    // Each repository decides on its own what expires, so each needs the note.
    let mut is_held = false;
    let said = match change {
        NoteChange::Keep => format!("backup {id} is kept: {text}"),
        NoteChange::Release => format!("backup {id} is released"),
        NoteChange::Annotate => format!("backup {id} is described as: {text}"),
    };
    let record = ended(OutcomeKind::Note, now, true, &said).map(|mut record| {
        record.backup = Some(id.clone());
        record
    });
    for place in settings.repository.each() {
        let repository = Repository::open_known_place(settings, &place)?;
        let Some(identity) = repository.identity()? else {
            continue;
        };
        let system = identity.system_identifier;
        let expired = repository.expired(system)?;
        let key = ObjectKey::BackupInfo(system, id.clone());
        if expired.backups().contains(id) {
            if change == NoteChange::Keep {
                return Err(Error::Expire {
                    problem: format!(
                        "backup {id} has expired in {place} and is not kept; `wal-archiver expire --undo` brings it back \
                         within expire_grace, then run this command again"
                    ),
                    kind: ExitKind::Failed,
                });
            }
            continue;
        }
        if repository.head(&key)?.is_none() {
            continue;
        }
        is_held = true;
        repository.put_backup_note(system, &note)?;
        if let Some(record) = &record {
            repository.put_outcome(system, record)?;
        }
        let notes = repository.backup_notes(system)?;
        output::line(&format!(
            "cluster {}: {place}: {}",
            settings.name,
            result(id, change, &notes)
        ));
    }
    if !is_held {
        return Err(Error::Usage {
            message: format!(
                "{} holds no backup {id} of cluster {}; `wal-archiver backup list` lists the backups",
                settings.repository, settings.name
            ),
        });
    }
    if change == NoteChange::Release && pinned(settings).contains(id) {
        output::line(&format!(
            "keep_backups in the configuration still names {id}: remove it there too"
        ));
    }
    outcomes::tell_the_daemon(settings, &note.id);
    Ok(())
}

/// Describes the state after a change.
fn result(id: &BackupId, change: NoteChange, notes: &BTreeMap<BackupId, BackupNotes>) -> String {
    let notes = notes.get(id).cloned().unwrap_or_default();
    match (change, notes.kept) {
        (NoteChange::Annotate, _) if notes.annotation.is_empty() => {
            format!("backup {id} has no description any more")
        }
        (NoteChange::Annotate, _) => format!("backup {id} is described as: {}", notes.annotation),
        (_, Some(_)) => {
            format!("backup {id} is kept until `wal-archiver backup release {id}`")
        }
        (_, None) => format!("retention decides about backup {id} again"),
    }
}
