//! [`LossRecord`]: objects that this host archived and that the repository lacks.
//!
//! The daemon writes `{spool}/{cluster}/losses.json` when it finds that the repository lacks
//! objects of its catalog, before the catalog removes their entries. `catalog rebuild` does the
//! same while no daemon has the catalog open. `wal-archiver verify --accept-loss` writes
//! `accepted_losses.json`. Each file has one writer at a time, so no change is lost.
//! Invariant: a loss stays in the first file until its objects are back or it is in the second
//! file.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use wal_format::{
    BackupId, Branch, Lsn, ObjectKey, PgTimestamp, SegmentName, SegmentNo, SegmentSize,
    SystemIdentifier,
};

use crate::{Error, Result, config::ClusterSettings, durable, expire::Intervals};

const FOUND_FILE: &str = "losses.json";
const ACCEPTED_FILE: &str = "accepted_losses.json";
/// The version of both files.
const FORMAT_VERSION: u32 = 1;
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
}

impl Loss {
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
            Self::Backup { system, id, .. } => ObjectKey::BackupInfo(*system, id.clone()),
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
            Self::Backup { .. } => (self.key(), None),
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
                system,
                segment_size,
                branch,
                from_lsn,
                to_lsn,
            } => {
                let last = Lsn(to_lsn.0.saturating_sub(1));
                let last = segment_key(*system, *branch, *segment_size, last);
                write!(
                    f,
                    "WAL {from_lsn} to {to_lsn} of timeline branch {branch} ({key}"
                )?;
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
        }
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
    /// The newest sealed segment of the catalog, if it is missing: then the place is an older state
    /// of the repository.
    pub newest: Option<Loss>,
}

/// A loss and the time at which it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundLoss {
    /// The missing objects.
    #[serde(flatten)]
    pub loss: Loss,
    /// The time, by this host's clock.
    pub found: PgTimestamp,
}

#[derive(Debug, Serialize, Deserialize)]
struct File<T> {
    /// Always [`FORMAT_VERSION`].
    format_version: u32,
    losses: Vec<T>,
}

/// The record of the objects that a cluster's repository has lost.
#[derive(Clone, Debug)]
pub struct LossRecord {
    directory: PathBuf,
}

impl LossRecord {
    /// Returns the record of the cluster with these settings.
    #[must_use]
    pub fn of(settings: &ClusterSettings) -> Self {
        Self::below(&settings.spool.join(settings.name.as_str()))
    }

    /// Returns the record in `directory`, which is `{spool}/{cluster}`.
    #[must_use]
    pub fn below(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    /// Returns the losses that were found and that no operator has accepted.
    ///
    /// # Errors
    /// [`Error::Store`] if a file cannot be read or parsed.
    pub fn open(&self) -> Result<Vec<FoundLoss>> {
        let accepted = Known::new(self.accepted()?);
        let found: Vec<FoundLoss> = self.read(FOUND_FILE)?;
        let still_open = found.into_iter().flat_map(|found| {
            let left = accepted.left_of(&found.loss);
            left.into_iter().map(move |loss| FoundLoss {
                loss,
                found: found.found,
            })
        });
        Ok(still_open.collect())
    }

    /// Returns the losses that an operator has accepted.
    ///
    /// # Errors
    /// Those of [`LossRecord::open`].
    pub fn accepted(&self) -> Result<Vec<Loss>> {
        self.read(ACCEPTED_FILE)
    }

    /// Returns true if an operator has accepted the whole loss.
    ///
    /// # Errors
    /// Those of [`LossRecord::open`].
    pub fn is_accepted(&self, loss: &Loss) -> Result<bool> {
        Ok(Known::new(self.accepted()?).left_of(loss).is_empty())
    }

    /// Returns `missing` without the losses that an operator has accepted.
    ///
    /// # Errors
    /// Those of [`LossRecord::open`].
    pub fn without_accepted(&self, missing: &Missing) -> Result<Missing> {
        let accepted = Known::new(self.accepted()?);
        let losses = missing.losses.iter();
        let newest = missing.newest.clone();
        Ok(Missing {
            losses: losses.flat_map(|loss| accepted.left_of(loss)).collect(),
            newest: newest.filter(|newest| !accepted.left_of(newest).is_empty()),
        })
    }

    /// Adds losses durably. A loss that is recorded already keeps its time.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn add(&self, losses: &[Loss]) -> Result<()> {
        let mut found: Vec<FoundLoss> = self.read(FOUND_FILE)?;
        let known = Known::new(found.iter().map(|found| found.loss.clone()).collect());
        let now = PgTimestamp::from_jiff(jiff::Timestamp::now());
        let new: Vec<FoundLoss> = losses
            .iter()
            .flat_map(|loss| known.left_of(loss))
            .map(|loss| FoundLoss { loss, found: now })
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        found.extend(new);
        self.write(FOUND_FILE, &found)
    }

    /// Replaces each loss that was found with the result of `left`, which returns the part that is
    /// still missing.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn keep(&self, left: impl Fn(&Loss) -> Result<Vec<Loss>>) -> Result<()> {
        let found: Vec<FoundLoss> = self.read(FOUND_FILE)?;
        let mut kept = Vec::new();
        for known in &found {
            let time = known.found;
            let left = left(&known.loss)?.into_iter();
            kept.extend(left.map(|loss| FoundLoss { loss, found: time }));
        }
        if kept == found {
            return Ok(());
        }
        self.write(FOUND_FILE, &kept)
    }

    /// Records losses durably as accepted. They are no longer reported.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn accept(&self, losses: &[Loss]) -> Result<()> {
        let mut accepted = self.accepted()?;
        let known = Known::new(accepted.clone());
        accepted.extend(losses.iter().flat_map(|loss| known.left_of(loss)));
        self.write(ACCEPTED_FILE, &accepted)
    }

    /// Removes both files. Used when a new archive begins in this spool.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn forget(&self) -> Result<()> {
        durable::remove(&self.directory.join(FOUND_FILE))?;
        durable::remove(&self.directory.join(ACCEPTED_FILE))
    }

    fn read<T: serde::de::DeserializeOwned>(&self, file: &str) -> Result<Vec<T>> {
        let path = self.directory.join(file);
        let content = match fs::read(&path) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::store("read", path)(error)),
        };
        let file: File<T> = serde_json::from_slice(&content)
            .map_err(|error| Error::store("parse", path)(io::Error::other(error)))?;
        Ok(file.losses)
    }

    fn write<T: Serialize>(&self, file: &str, losses: &[T]) -> Result<()> {
        durable::create_dir_all(&self.directory)?;
        let path = self.directory.join(file);
        let content = serde_json::to_vec_pretty(&File {
            format_version: FORMAT_VERSION,
            losses: losses.iter().collect(),
        });
        let content =
            content.map_err(|error| Error::store("write", &path)(io::Error::other(error)))?;
        durable::replace(&path, &content)
    }
}

/// A set of losses that can be subtracted from other losses.
struct Known {
    wal: BTreeMap<Branch, Intervals>,
    others: Vec<Loss>,
}

impl Known {
    fn new(losses: Vec<Loss>) -> Self {
        let mut all = Self {
            wal: BTreeMap::new(),
            others: Vec::new(),
        };
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

    fn wal(from: u64, to: u64) -> Loss {
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
    fn a_loss_is_open_until_it_is_accepted_or_back() {
        let directory = tempfile::tempdir().expect("a directory");
        let record = LossRecord::below(&directory.path().join("main"));
        let open = || -> Vec<Loss> {
            let open = record.open().expect("it reads").into_iter();
            open.map(|found| found.loss).collect()
        };
        assert_eq!(open(), []);
        let backup = Loss::Backup {
            system: SystemIdentifier(7),
            id: "20261121T101500Z-9f3c".parse().expect("a name"),
            branch: Branch::FIRST,
            start_lsn: Lsn(1),
            stop_lsn: Lsn(2),
        };
        record.add(&[wal(2, 6), backup.clone()]).expect("it writes");
        record.add(&[wal(3, 7)]).expect("only the end is new");
        assert_eq!(open(), [wal(2, 6), backup.clone(), wal(6, 7)]);
        let missing = Missing {
            losses: vec![wal(2, 9)],
            newest: Some(wal(8, 9)),
        };
        record.accept(&[wal(4, 9)]).expect("it writes");
        assert_eq!(open(), [wal(2, 4), backup.clone()]);
        assert!(record.is_accepted(&wal(8, 9)).expect("it reads"));
        assert!(!record.is_accepted(&wal(2, 9)).expect("it reads"));
        let left = record.without_accepted(&missing).expect("it reads");
        let expected = Missing {
            losses: vec![wal(2, 4)],
            newest: None,
        };
        assert_eq!(left, expected);
        let keep = |loss: &Loss| {
            Ok(vec![loss.clone()]
                .into_iter()
                .filter(|one| *one != backup)
                .collect())
        };
        record.keep(keep).expect("it writes");
        assert_eq!(open(), [wal(2, 4)]);
        record.forget().expect("it goes");
        assert!(open().is_empty() && record.accepted().expect("it reads").is_empty());
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
