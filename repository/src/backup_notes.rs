//! Notes of the operator on base backups: which are kept, and descriptions.
//!
//! Invariant: a note that cannot be read keeps its backup.

use std::collections::BTreeMap;

use wal_format::{BackupId, BackupNote, NoteChange, ObjectKey, SystemIdentifier, checked_json};

use crate::{Repository, Result};

/// The operator's notes on one base backup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackupNotes {
    /// The reason why retention keeps the backup. It may be empty. `None` if retention decides.
    pub kept: Option<String>,
    /// The description. Empty if there is none.
    pub annotation: String,
}

impl BackupNotes {
    /// Returns the result of all notes about one backup.
    fn of(mut notes: Vec<BackupNote>) -> Self {
        notes.sort_by(|one, other| (one.made, &one.id).cmp(&(other.made, &other.id)));
        let mut result = Self::default();
        for note in notes {
            match note.change {
                NoteChange::Keep => result.kept = Some(note.text),
                NoteChange::Release => result.kept = None,
                NoteChange::Annotate => result.annotation = note.text,
            }
        }
        result
    }
}

impl Repository {
    /// Stores a note about a backup.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store), [`Error::S3`](crate::Error::S3).
    pub fn put_backup_note(&self, system: SystemIdentifier, note: &BackupNote) -> Result<()> {
        self.put_record(&note.key(system), note).map(drop)
    }

    /// Returns what the operator says about each backup that has notes.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store), [`Error::S3`](crate::Error::S3).
    pub fn backup_notes(
        &self,
        system: SystemIdentifier,
    ) -> Result<BTreeMap<BackupId, BackupNotes>> {
        let mut notes: BTreeMap<BackupId, Vec<BackupNote>> = BTreeMap::new();
        let mut unread = Vec::new();
        for (key, _) in self.list(&format!("{system}/note/"))? {
            let ObjectKey::BackupNote(_, backup, _) = &key else {
                continue;
            };
            match self.get(&key) {
                Ok(body) => match checked_json::from_slice::<BackupNote>(&body) {
                    Ok(note) if note.backup == *backup => {
                        notes.entry(backup.clone()).or_default().push(note);
                    }
                    _ => unread.push((backup.clone(), key)),
                },
                Err(crate::Error::Damaged { .. }) => unread.push((backup.clone(), key)),
                Err(error) => return Err(error),
            }
        }
        let of_each = notes.into_iter();
        let mut notes: BTreeMap<_, _> = of_each
            .map(|(backup, notes)| (backup, BackupNotes::of(notes)))
            .collect();
        for (backup, key) in unread {
            tracing::warn!(%key, "a note about a backup cannot be read; the backup is kept");
            let kept = &mut notes.entry(backup).or_default().kept;
            kept.get_or_insert_with(|| format!("{key} cannot be read"));
        }
        Ok(notes)
    }
}

#[cfg(test)]
mod tests {
    use wal_format::{BACKUP_NOTE_FORMAT_VERSION, PgTimestamp};

    use super::*;

    #[test]
    fn the_newest_note_of_each_kind_counts() {
        let note = |number: i64, change, text: &str| BackupNote {
            format_version: BACKUP_NOTE_FORMAT_VERSION,
            id: format!("20261121T101500Z-{number:04x}")
                .parse()
                .expect("a name"),
            backup: "20261120T101500Z-9f3c".parse().expect("a name"),
            made: PgTimestamp(number / 2),
            change,
            text: text.to_owned(),
        };
        let result = |notes: &[BackupNote]| {
            let mut reversed = notes.to_vec();
            reversed.reverse();
            let result = BackupNotes::of(notes.to_vec());
            assert_eq!(result, BackupNotes::of(reversed));
            (result.kept, result.annotation)
        };
        let mut notes = vec![
            note(1, NoteChange::Keep, "audit"),
            note(2, NoteChange::Annotate, "v2"),
        ];
        assert_eq!(result(&notes), (Some("audit".to_owned()), "v2".to_owned()));
        notes.push(note(4, NoteChange::Release, ""));
        notes.push(note(5, NoteChange::Annotate, ""));
        assert_eq!(result(&notes), (None, String::new()));
        // The same time: the name decides.
        notes.push(note(6, NoteChange::Release, ""));
        notes.push(note(7, NoteChange::Keep, ""));
        assert_eq!(result(&notes), (Some(String::new()), String::new()));
    }
}
