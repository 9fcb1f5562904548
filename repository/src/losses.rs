//! [`Loss`]: an object that this host archived and that the repository lacks. [`record`] keeps the
//! losses in the spool.

mod newest;
mod record;

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use wal_format::{
    BackupId, BackupInfo, Branch, Lsn, ObjectKey, SegmentName, SegmentNo, SegmentSize,
    SystemIdentifier,
};

pub use self::record::{FoundLoss, LossRecord, RecordedLosses};
use crate::{Error, Repository, expire::Intervals};

/// The maximum number of losses that a message names.
const NAMED_MAX: usize = 5;

/// Objects that were archived and that the repository lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Loss {
    /// Consecutive sealed segments.
    Wal {
        /// The system identifier of the cluster.
        system: SystemIdentifier,
        /// The segment size of the cluster.
        segment_size: SegmentSize,
        /// The timeline.
        branch: Branch,
        /// The first byte of the first segment.
        from_lsn: Lsn,
        /// The first byte after the last segment.
        to_lsn: Lsn,
    },
    /// WAL of a segment that is not sealed: an upload between two segments.
    Tail {
        /// The system identifier of the cluster.
        system: SystemIdentifier,
        /// The segment size of the cluster.
        segment_size: SegmentSize,
        /// The timeline.
        branch: Branch,
        /// The first byte.
        from_lsn: Lsn,
        /// The first byte after the last one.
        to_lsn: Lsn,
    },
    /// The description of a base backup. Without it, the other objects of the backup cannot be
    /// used.
    Backup {
        /// The system identifier of the cluster.
        system: SystemIdentifier,
        /// The name of the backup.
        id: BackupId,
        /// The timeline on which the backup was taken.
        branch: Branch,
        /// The LSN at which redo begins.
        start_lsn: Lsn,
        /// The LSN at which the backup is consistent.
        stop_lsn: Lsn,
    },
    /// The manifest or a slice of a base backup. Without it, the backup cannot be restored.
    BackupPart {
        /// The name of the backup.
        id: BackupId,
        /// The missing object.
        #[serde(with = "as_text")]
        key: ObjectKey,
    },
}

impl Loss {
    /// Returns the loss of a part of a backup.
    #[must_use]
    pub fn of_part(backup: &BackupInfo, key: ObjectKey) -> Self {
        Self::BackupPart {
            id: backup.id.clone(),
            key,
        }
    }

    /// Returns the backup that cannot be restored because of this loss alone.
    #[must_use]
    pub fn backup(&self) -> Option<&BackupId> {
        match self {
            Self::Backup { id, .. } | Self::BackupPart { id, .. } => Some(id),
            Self::Wal { .. } | Self::Tail { .. } => None,
        }
    }

    /// Returns the system identifier of the cluster. `None` for a part of a backup.
    #[must_use]
    pub fn system(&self) -> Option<SystemIdentifier> {
        match self {
            Self::Wal { system, .. } | Self::Tail { system, .. } | Self::Backup { system, .. } => {
                Some(*system)
            }
            Self::BackupPart { .. } => None,
        }
    }

    /// Returns the segment size of the cluster. `None` for a backup or a part of it.
    #[must_use]
    pub fn segment_size(&self) -> Option<SegmentSize> {
        match self {
            Self::Wal { segment_size, .. } | Self::Tail { segment_size, .. } => Some(*segment_size),
            Self::Backup { .. } | Self::BackupPart { .. } => None,
        }
    }

    /// Returns the branch and the range of the missing WAL. `None` for a part of a backup.
    #[must_use]
    pub fn wal(&self) -> Option<(Branch, Lsn, Lsn)> {
        match self {
            Self::Wal {
                branch,
                from_lsn,
                to_lsn,
                ..
            }
            | Self::Tail {
                branch,
                from_lsn,
                to_lsn,
                ..
            } => Some((*branch, *from_lsn, *to_lsn)),
            Self::Backup { .. } | Self::BackupPart { .. } => None,
        }
    }

    /// Returns the key of the missing object; of several segments, the key of the first.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        match self {
            Self::Wal {
                system,
                segment_size,
                branch,
                from_lsn,
                ..
            } => segment_key(*system, *branch, *segment_size, *from_lsn),
            Self::Tail {
                system,
                segment_size: size,
                branch,
                from_lsn,
                to_lsn,
            } => {
                let name = SegmentName::new(branch.timeline, size.segment_of(*from_lsn), *size);
                ObjectKey::Tail(*system, *branch, name, *from_lsn, *to_lsn)
            }
            Self::Backup { system, id, .. } => ObjectKey::BackupInfo(*system, id.clone()),
            Self::BackupPart { key, .. } => key.clone(),
        }
    }

    /// Returns the key of the last missing object.
    #[must_use]
    pub fn last_key(&self) -> ObjectKey {
        match self {
            Self::Wal {
                system,
                segment_size,
                branch,
                to_lsn,
                ..
            } => {
                let last = Lsn(to_lsn.0.saturating_sub(1));
                segment_key(*system, *branch, *segment_size, last)
            }
            _ => self.key(),
        }
    }

    /// Returns the key of the sealed segment that replaces the missing object: a tail is removed
    /// when its segment is sealed. `None` for any other object.
    #[must_use]
    pub fn replaced_by(&self) -> Option<ObjectKey> {
        match self {
            Self::Tail {
                system,
                segment_size,
                branch,
                from_lsn,
                ..
            } => Some(segment_key(*system, *branch, *segment_size, *from_lsn)),
            _ => None,
        }
    }

    /// Returns true if this loss contains all of `other`.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        Known::new(vec![self.clone()]).left_of(other).is_empty()
    }

    /// Returns the keys of all missing objects.
    pub fn keys(&self) -> impl Iterator<Item = ObjectKey> {
        let (first, segments) = match self {
            Self::Wal {
                system,
                segment_size: size,
                branch,
                from_lsn,
                to_lsn,
            } => {
                let last = size.segment_of(Lsn(to_lsn.0.saturating_sub(1)));
                let rest = size.segment_of(*from_lsn).0 + 1..=last.0;
                (self.key(), Some((*system, *size, *branch, rest)))
            }
            _ => (self.key(), None),
        };
        let rest = segments
            .into_iter()
            .flat_map(|(system, size, branch, rest)| {
                rest.map(move |number| {
                    segment_key(system, branch, size, SegmentNo(number).start_lsn(size))
                })
            });
        std::iter::once(first).chain(rest)
    }
}

fn segment_key(system: SystemIdentifier, branch: Branch, size: SegmentSize, lsn: Lsn) -> ObjectKey {
    let name = SegmentName::new(branch.timeline, size.segment_of(lsn), size);
    ObjectKey::Segment(system, branch, name)
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.key();
        match self {
            Self::Wal {
                branch,
                from_lsn,
                to_lsn,
                ..
            }
            | Self::Tail {
                branch,
                from_lsn,
                to_lsn,
                ..
            } => {
                write!(
                    f,
                    "WAL {from_lsn} to {to_lsn} of timeline branch {branch} ({key}"
                )?;
                let last = self.last_key();
                if last != key {
                    write!(f, " to {last}")?;
                }
                f.write_str(")")
            }
            Self::Backup {
                start_lsn,
                stop_lsn,
                branch,
                ..
            } => write!(
                f,
                "{key} (the base backup from {start_lsn} to {stop_lsn} of timeline branch {branch})"
            ),
            Self::BackupPart { .. } => {
                write!(f, "{key} (without it the base backup cannot be restored)")
            }
        }
    }
}

impl Repository {
    /// Returns true if the repository holds at least one of these objects.
    ///
    /// # Errors
    /// Errors of the requests.
    pub fn holds_one_of(&self, keys: impl IntoIterator<Item = ObjectKey>) -> crate::Result<bool> {
        for key in keys {
            if self.head(&key)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns true if the repository holds the first object of a loss, or the sealed segment that
    /// replaces it.
    ///
    /// # Errors
    /// Errors of the requests.
    pub fn holds_lost(&self, loss: &Loss) -> crate::Result<bool> {
        self.holds_one_of([Some(loss.key()), loss.replaced_by()].into_iter().flatten())
    }
}

/// Returns a list of losses for a message. Of more than five losses, it names the first four and
/// the last.
#[must_use]
pub fn name_losses<'a>(losses: impl IntoIterator<Item = &'a Loss>) -> String {
    let mut names: Vec<String> = losses.into_iter().map(Loss::to_string).collect();
    if names.len() > NAMED_MAX {
        let left_out = names.len() - NAMED_MAX;
        let left_out_names = NAMED_MAX - 1..NAMED_MAX - 1 + left_out;
        names.splice(left_out_names, [format!("{left_out} more")]);
    }
    names.join("; ")
}

/// Objects that were archived and that a listing of the repository does not contain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// The missing objects.
    pub losses: Vec<Loss>,
    /// The newest sealed segment of the catalog, or the newest tail after it, if it is missing:
    /// then the place is an older state of the repository.
    pub newest: Option<Loss>,
}

impl Missing {
    /// Returns the error of a place that is an older state of the repository. `None` if it is not.
    #[must_use]
    pub fn older_state(&self, repository: &Repository) -> Option<Error> {
        let newest = self.newest.clone()?;
        Some(Error::OlderState {
            url: repository.url(),
            missing: name_losses(&self.losses),
            newest: Box::new(newest),
        })
    }
}

/// The text form of an object key, in JSON.
mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use wal_format::ObjectKey;

    pub(super) fn serialize<S: Serializer>(key: &ObjectKey, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(key)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<ObjectKey, D::Error> {
        let text = String::deserialize(from)?;
        text.parse()
            .map_err(|_| D::Error::custom("not an object key"))
    }
}

/// A set of losses that can be subtracted from other losses.
#[derive(Debug, Default)]
struct Known {
    wal: BTreeMap<Branch, Intervals>,
    others: Vec<Loss>,
}

impl Known {
    fn new(losses: Vec<Loss>) -> Self {
        let mut all = Self::default();
        for loss in losses {
            match loss {
                Loss::Wal {
                    branch,
                    from_lsn,
                    to_lsn,
                    ..
                } => all.wal.entry(branch).or_default().add(from_lsn, to_lsn),
                other => all.others.push(other),
            }
        }
        all
    }

    /// Returns the part of a loss that this set does not contain.
    fn left_of(&self, loss: &Loss) -> Vec<Loss> {
        let Loss::Wal {
            branch,
            from_lsn,
            to_lsn,
            system,
            segment_size,
        } = loss
        else {
            let is_known = self.others.contains(loss);
            return if is_known {
                Vec::new()
            } else {
                vec![loss.clone()]
            };
        };
        let Some(known) = self.wal.get(branch) else {
            return vec![loss.clone()];
        };
        let left = known.missing_in(*from_lsn, *to_lsn).into_iter();
        left.map(|(from_lsn, to_lsn)| Loss::Wal {
            system: *system,
            segment_size: *segment_size,
            branch: *branch,
            from_lsn,
            to_lsn,
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn wal(from: u64, to: u64) -> Loss {
        Loss::Wal {
            system: SystemIdentifier(7),
            segment_size: SegmentSize::DEFAULT,
            branch: Branch::FIRST,
            from_lsn: Lsn(from << 24),
            to_lsn: Lsn(to << 24),
        }
    }

    #[test]
    fn a_loss_names_every_segment() {
        let keys: Vec<String> = wal(2, 5).keys().map(|key| key.to_string()).collect();
        let names: Vec<&str> = keys
            .iter()
            .filter_map(|key| key.rsplit('/').next())
            .collect();
        assert_eq!(
            names,
            [2, 3, 4].map(|number| format!("00000001000000000000000{number}.zst"))
        );
        assert_eq!(wal(2, 3).keys().count(), 1);
        assert!(wal(2, 5).covers(&wal(3, 4)));
        assert!(!wal(2, 5).covers(&wal(3, 6)));
    }

    #[test]
    fn a_message_names_the_range_and_its_objects() {
        let said = wal(2, 4).to_string();
        for part in [
            "WAL 0/2000000 to 0/4000000 of timeline branch 00000001",
            "7/wal/00000001/00000000/000000010000000000000002.zst to ",
            "000000010000000000000003.zst",
        ] {
            assert!(said.contains(part), "{said}");
        }
        let many: Vec<Loss> = (0..9).map(|at| wal(at * 2, at * 2 + 1)).collect();
        let named = name_losses(&many);
        assert_eq!(named.split("; ").count(), 6, "{named}");
        assert!(
            named.contains("; 4 more; ") && named.ends_with("00000010.zst)"),
            "{named}"
        );
    }
}
