//! The choice of the backup, and the reason why no newer one was chosen.

use repository::Damage;
use serde::{Deserialize, Serialize};
use wal_format::{BackupId, BackupInfo, PgTimestamp};

use super::{PathPart, Wishes};
use crate::{Error, Result, inventory::Inventory};

/// A newer backup that would have been chosen but cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotChosen {
    /// The backup.
    pub backup: BackupId,
    /// The reason.
    pub reason: String,
}

/// The state of the choice, which considers backups from the newest to the oldest.
#[derive(Debug)]
pub(super) struct Choice {
    /// All backups: name, end and timeline.
    all: Vec<(BackupId, PgTimestamp, wal_format::Branch)>,
    /// Backups whose description cannot be read.
    unreadable: Vec<(BackupId, String)>,
    /// The newest damaged backup that would have been chosen.
    damaged: Option<(BackupId, Damage)>,
    pub(super) not_chosen: Vec<NotChosen>,
    pub(super) reason: String,
}

impl Choice {
    pub(super) fn of(inventory: &dyn Inventory, backups: &[BackupInfo]) -> Self {
        let one = |backup: &BackupInfo| (backup.id.clone(), backup.finished, backup.branch);
        let is_known = |id: &BackupId| backups.iter().any(|backup| backup.id == *id);
        let damaged = inventory.damaged_backups().iter();
        Self {
            all: backups.iter().map(one).collect(),
            unreadable: damaged
                .filter(|(id, _)| !is_known(id))
                .map(|(id, damage)| (id.clone(), damage.to_string()))
                .collect(),
            damaged: None,
            not_chosen: Vec::new(),
            reason: String::new(),
        }
    }

    pub(super) fn pass_over(&mut self, backup: &BackupInfo, reason: String) {
        self.not_chosen.push(NotChosen {
            backup: backup.id.clone(),
            reason,
        });
    }

    pub(super) fn pass_over_damaged(&mut self, backup: &BackupInfo, damage: Damage) {
        self.pass_over(backup, damage.to_string());
        self.damaged
            .get_or_insert_with(|| (backup.id.clone(), damage));
    }

    /// Records why `backup` was chosen. "The newest" is used only for the newest of all backups.
    pub(super) fn choose(&mut self, backup: &BackupInfo, path: &[PathPart], wishes: &Wishes) {
        if wishes.backup.is_some() {
            "the one that --backup names".clone_into(&mut self.reason);
            return;
        }
        // When such a backup ended is unknown, because its description cannot be read. But its ID
        // begins with the second in which it started, so IDs compare by time.
        for (id, reason) in &self.unreadable {
            if *id > backup.id {
                self.not_chosen.push(NotChosen {
                    backup: id.clone(),
                    reason: reason.clone(),
                });
            }
        }
        let newer = self.all.iter().filter(|one| one.1 > backup.finished);
        let newest = newer.max_by_key(|one| one.1);
        let is_elsewhere = |branch| !path.iter().any(|part| part.branch == branch);
        self.reason = match newest {
            None if self.not_chosen.is_empty() => "the newest backup",
            _ if !self.not_chosen.is_empty() => {
                "the newest usable backup that ends before the stop"
            }
            Some((id, _, branch)) if is_elsewhere(*branch) => {
                self.not_chosen.push(NotChosen {
                    backup: id.clone(),
                    reason: format!("it was taken on timeline {branch}, which is not on the way"),
                });
                "the newest backup on the way that ends before the stop"
            }
            _ => "the newest backup that ends before the stop",
        }
        .to_owned();
    }

    /// Refuses the restore if a damaged backup would have been chosen and no other one was.
    /// `refusal` is the reason why an older one cannot be used.
    ///
    /// # Errors
    /// [`Error::Damaged`] with the object.
    pub(super) fn refuse_damaged(self, wishes: &Wishes, refusal: Option<&Error>) -> Result<()> {
        let Some((id, Damage { object, problem })) = self.damaged else {
            return Ok(());
        };
        let others = match (&wishes.backup, refusal) {
            (Some(_), _) => {
                "leave out --backup for an older one, or use it nevertheless with --force"
                    .to_owned()
            }
            (None, None) => "no other backup leads to the target".to_owned(),
            (None, Some(refusal)) => format!("no other backup leads to the target: {refusal}"),
        };
        Err(Error::Damaged {
            object,
            problem: format!("{problem}; backup {id} is damaged, {others}"),
        })
    }
}
