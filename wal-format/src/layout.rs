//! Every key in the repository, in one enum. Keys are relative to a cluster's prefix and never
//! reused.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Branch, Lsn, OutcomeKind, SegmentName, SystemIdentifier, TimelineId};

/// A cluster's name in the repository: `[a-z0-9][a-z0-9_-]{0,62}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ClusterName(String);

/// Text that is not a valid cluster name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" cannot name a cluster; use 1 to 63 of a-z, 0-9, _ and -, beginning with a letter or digit"
)]
pub struct InvalidClusterName(String);

impl ClusterName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterName {
    type Err = InvalidClusterName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = (1..=63).contains(&text.len())
            && text
                .bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'))
            && !text.starts_with(['_', '-']);
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidClusterName(text.to_owned()))
        }
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ClusterName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A base backup's name: the UTC time when it began, `YYYYMMDDTHHMMSSZ`, and four random
/// hexadecimal digits, so that two archivers do not choose the same name: `20261121T101500Z-9f3c`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId(String);

/// Text that is not a backup's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no backup; `pitr-restore list` prints their names")]
pub struct InvalidBackupId(String);

impl BackupId {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for BackupId {
    type Err = InvalidBackupId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let pattern = b"dddddddd\x54dddddd\x5A-xxxx";
        let valid = text.len() == pattern.len()
            && text.bytes().zip(pattern).all(|(byte, class)| match class {
                b'd' => byte.is_ascii_digit(),
                b'x' => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
                literal => byte == *literal,
            });
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidBackupId(text.to_owned()))
        }
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for BackupId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for BackupId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A key below `{cluster}/`. Every key except those of epochs begins with the system identifier, so
/// that two clusters under one name cannot touch each other's objects.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKey {
    /// `epoch/{n:08}.json`: the identity of the cluster during epoch `n`, from 1.
    Epoch(u32),
    /// `epoch-copy/{n:08}.json`: the second copy of an epoch. Without any epoch, nothing says which
    /// cluster the objects belong to.
    EpochCopy(u32),
    /// `{sysid}/history/{branch}.history`: a history file, byte for byte as PostgreSQL sent it.
    History(SystemIdentifier, Branch),
    /// `{sysid}/history-copy/{branch}.history`: the second copy of a history file. If a history
    /// file is lost, PostgreSQL silently assumes that the timeline has no ancestors.
    HistoryCopy(SystemIdentifier, Branch),
    /// `{sysid}/wal/{branch}/{log:08X}/{segment}.zst`: a sealed segment. `log` is the middle eight
    /// digits of its name.
    Segment(SystemIdentifier, Branch, SegmentName),
    /// `{sysid}/tail/{branch}/{segment}/{start:016X}-{end:016X}.zst`: a range of a segment that is
    /// still open.
    Tail(SystemIdentifier, Branch, SegmentName, Lsn, Lsn),
    /// `{sysid}/gap/{branch}/{from:016X}-{to:016X}.json`: a range that was declared lost
    /// ([`crate::DeclaredGap`]).
    Gap(SystemIdentifier, Branch, Lsn, Lsn),
    /// `{sysid}/failover/{branch}/{successor}.json`: the commits of `branch` that were lost when
    /// `successor` replaced it ([`crate::FailoverLoss`]).
    FailoverLoss(SystemIdentifier, Branch, Branch),
    /// `{sysid}/backup/{id}/{archive}.{n:06}.tar.zst`: slice `n`, from 1, of `base` or of a
    /// tablespace, which is named by its OID.
    BackupSlice(SystemIdentifier, BackupId, BackupArchive, u32),
    /// `{sysid}/backup/{id}/backup_manifest`: the manifest, as PostgreSQL sent it.
    BackupManifest(SystemIdentifier, BackupId),
    /// `{sysid}/backup/{id}/backup.json`: written last. A base backup without it does not exist.
    BackupInfo(SystemIdentifier, BackupId),
    /// `{sysid}/note/{backup}/{id}.json`: a change of what the operator says about a backup
    /// ([`crate::BackupNote`]).
    BackupNote(SystemIdentifier, BackupId, BackupId),
    /// `{sysid}/expired/{id}.json`: the data given up by a retention policy ([`crate::Expired`]).
    Expired(SystemIdentifier, BackupId),
    /// `{sysid}/outcome/{kind}/{id}.json`: the record of an operation and its result
    /// ([`crate::Outcome`]).
    Outcome(SystemIdentifier, OutcomeKind, BackupId),
}

/// A tar archive of a base backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackupArchive {
    /// The data directory.
    Base,
    /// The tablespace with this OID.
    Tablespace(u32),
}

impl fmt::Display for BackupArchive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base => f.write_str("base"),
            Self::Tablespace(oid) => write!(f, "{oid}"),
        }
    }
}

/// Prints the key below the cluster's prefix.
impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Epoch(number) => write!(f, "epoch/{number:08}.json"),
            Self::EpochCopy(number) => write!(f, "epoch-copy/{number:08}.json"),
            Self::History(system, branch) => write!(f, "{system}/history/{branch}.history"),
            Self::HistoryCopy(system, branch) => {
                write!(f, "{system}/history-copy/{branch}.history")
            }
            Self::Segment(system, branch, name) => {
                write!(f, "{system}/wal/{branch}/{:08X}/{name}.zst", name.log)
            }
            Self::Tail(system, branch, name, start, end) => {
                write!(
                    f,
                    "{system}/tail/{branch}/{name}/{:016X}-{:016X}.zst",
                    start.0, end.0
                )
            }
            Self::Gap(system, branch, from, to) => {
                write!(
                    f,
                    "{system}/gap/{branch}/{:016X}-{:016X}.json",
                    from.0, to.0
                )
            }
            Self::FailoverLoss(system, branch, successor) => {
                write!(f, "{system}/failover/{branch}/{successor}.json")
            }
            Self::BackupSlice(system, id, archive, number) => {
                write!(f, "{system}/backup/{id}/{archive}.{number:06}.tar.zst")
            }
            Self::BackupManifest(system, id) => write!(f, "{system}/backup/{id}/backup_manifest"),
            Self::BackupInfo(system, id) => write!(f, "{system}/backup/{id}/backup.json"),
            Self::BackupNote(system, backup, id) => {
                write!(f, "{system}/note/{backup}/{id}.json")
            }
            Self::Expired(system, id) => write!(f, "{system}/expired/{id}.json"),
            Self::Outcome(system, kind, id) => write!(f, "{system}/outcome/{kind}/{id}.json"),
        }
    }
}

/// Text that is not one of our keys. A listing skips it, and `verify` reports it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no key of this repository")]
pub struct ForeignKey(String);

fn lsn16(text: &str) -> Option<Lsn> {
    if text.len() == 16 {
        u64::from_str_radix(text, 16).ok().map(Lsn)
    } else {
        None
    }
}

fn parse_key(text: &str) -> Option<ObjectKey> {
    let parts: Vec<&str> = text.split('/').collect();
    match *parts.as_slice() {
        ["epoch", file] => file
            .strip_suffix(".json")?
            .parse()
            .ok()
            .map(ObjectKey::Epoch),
        ["epoch-copy", file] => file
            .strip_suffix(".json")?
            .parse()
            .ok()
            .map(ObjectKey::EpochCopy),
        [system, "history", file] => {
            let branch = file.strip_suffix(".history")?.parse().ok()?;
            Some(ObjectKey::History(system.parse().ok()?, branch))
        }
        [system, "history-copy", file] => {
            let branch = file.strip_suffix(".history")?.parse().ok()?;
            Some(ObjectKey::HistoryCopy(system.parse().ok()?, branch))
        }
        [system, "wal", branch, _, file] => {
            let name = file.strip_suffix(".zst")?.parse().ok()?;
            Some(ObjectKey::Segment(
                system.parse().ok()?,
                branch.parse().ok()?,
                name,
            ))
        }
        [system, "tail", branch, name, file] => {
            let (start, end) = file.strip_suffix(".zst")?.split_once('-')?;
            let (start, end) = (lsn16(start)?, lsn16(end)?);
            let (system, branch) = (system.parse().ok()?, branch.parse().ok()?);
            Some(ObjectKey::Tail(
                system,
                branch,
                name.parse().ok()?,
                start,
                end,
            ))
        }
        [system, "gap", branch, file] => {
            let (from, to) = file.strip_suffix(".json")?.split_once('-')?;
            let (from, to) = (lsn16(from)?, lsn16(to)?);
            let (system, branch) = (system.parse().ok()?, branch.parse().ok()?);
            Some(ObjectKey::Gap(system, branch, from, to))
        }
        [system, "expired", file] => {
            let id = file.strip_suffix(".json")?.parse().ok()?;
            Some(ObjectKey::Expired(system.parse().ok()?, id))
        }
        [system, "note", backup, file] => {
            let id = file.strip_suffix(".json")?.parse().ok()?;
            let (system, backup) = (system.parse().ok()?, backup.parse().ok()?);
            Some(ObjectKey::BackupNote(system, backup, id))
        }
        [system, "failover", branch, file] => {
            let successor = file.strip_suffix(".json")?.parse().ok()?;
            let (system, branch) = (system.parse().ok()?, branch.parse().ok()?);
            Some(ObjectKey::FailoverLoss(system, branch, successor))
        }
        [system, "outcome", kind, file] => {
            let id = file.strip_suffix(".json")?.parse().ok()?;
            Some(ObjectKey::Outcome(
                system.parse().ok()?,
                kind.parse().ok()?,
                id,
            ))
        }
        [system, "backup", id, file] => {
            let (system, id) = (system.parse().ok()?, id.parse().ok()?);
            match file {
                "backup.json" => Some(ObjectKey::BackupInfo(system, id)),
                "backup_manifest" => Some(ObjectKey::BackupManifest(system, id)),
                _ => {
                    let (archive, number) = file.strip_suffix(".tar.zst")?.split_once('.')?;
                    let archive = match archive {
                        "base" => BackupArchive::Base,
                        oid => BackupArchive::Tablespace(oid.parse().ok()?),
                    };
                    Some(ObjectKey::BackupSlice(
                        system,
                        id,
                        archive,
                        number.parse().ok()?,
                    ))
                }
            }
        }
        _ => None,
    }
}

impl FromStr for ObjectKey {
    type Err = ForeignKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Another spelling would be a second name for the same object.
        parse_key(text)
            .filter(|key| key.to_string() == text)
            .ok_or_else(|| ForeignKey(text.to_owned()))
    }
}

/// The name of a timeline's history file in `pg_wal`.
#[must_use]
pub fn history_file_name(timeline: TimelineId) -> String {
    format!("{:08X}.history", timeline.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_prints_as_documented_and_parses_back() {
        let system = SystemIdentifier(7_432_188_851_234_567_890);
        let name: SegmentName = "00000002000000010000000A".parse().expect("a segment name");
        let branch: Branch = "00000002-1a2b3c4d".parse().expect("a branch");
        let id: BackupId = "20261121T101500Z-9f3c".parse().expect("a backup's name");
        for (key, text) in [
            (ObjectKey::Epoch(1), "epoch/00000001.json"),
            (ObjectKey::EpochCopy(2), "epoch-copy/00000002.json"),
            (
                ObjectKey::History(system, branch),
                "7432188851234567890/history/00000002-1a2b3c4d.history",
            ),
            (
                ObjectKey::HistoryCopy(system, branch),
                "7432188851234567890/history-copy/00000002-1a2b3c4d.history",
            ),
            (
                ObjectKey::Segment(system, branch, name),
                "7432188851234567890/wal/00000002-1a2b3c4d/00000001/00000002000000010000000A.zst",
            ),
            (
                ObjectKey::Tail(system, branch, name, Lsn(0x1_0A00_0000), Lsn(0x1_0A00_2000)),
                "7432188851234567890/tail/00000002-1a2b3c4d/00000002000000010000000A/000000010A000000-000000010A002000.zst",
            ),
            (
                ObjectKey::Gap(system, branch, Lsn(0x1_0A00_0000), Lsn(0x1_0B00_0000)),
                "7432188851234567890/gap/00000002-1a2b3c4d/000000010A000000-000000010B000000.json",
            ),
            (
                ObjectKey::FailoverLoss(system, Branch::FIRST, branch),
                "7432188851234567890/failover/00000001/00000002-1a2b3c4d.json",
            ),
            (
                ObjectKey::BackupSlice(system, id.clone(), BackupArchive::Tablespace(16400), 12),
                "7432188851234567890/backup/20261121T101500Z-9f3c/16400.000012.tar.zst",
            ),
            (
                ObjectKey::BackupSlice(system, id.clone(), BackupArchive::Base, 1),
                "7432188851234567890/backup/20261121T101500Z-9f3c/base.000001.tar.zst",
            ),
            (
                ObjectKey::BackupManifest(system, id.clone()),
                "7432188851234567890/backup/20261121T101500Z-9f3c/backup_manifest",
            ),
            (
                ObjectKey::BackupInfo(system, id.clone()),
                "7432188851234567890/backup/20261121T101500Z-9f3c/backup.json",
            ),
            (
                ObjectKey::BackupNote(system, id.clone(), id.clone()),
                "7432188851234567890/note/20261121T101500Z-9f3c/20261121T101500Z-9f3c.json",
            ),
            (
                ObjectKey::Expired(system, id.clone()),
                "7432188851234567890/expired/20261121T101500Z-9f3c.json",
            ),
            (
                ObjectKey::Outcome(system, OutcomeKind::Drill, id),
                "7432188851234567890/outcome/drill/20261121T101500Z-9f3c.json",
            ),
        ] {
            assert_eq!(key.to_string(), text);
            assert_eq!(text.parse(), Ok(key));
        }
    }

    #[test]
    fn foreign_keys_are_not_taken_for_ours() {
        for text in [
            "",
            "epoch/1.json",
            "epoch-copy/1.json",
            "x/history/00000001.history",
            "1/wal/00000001/00000001/000000010000000000000001.zst",
            "1/backup/../backup.json",
            "1/tail/00000001/000000010000000000000001/1-2.zst",
        ] {
            assert!(
                text.parse::<ObjectKey>().is_err(),
                "{text:?} must not parse"
            );
        }
    }

    #[test]
    fn cluster_names_are_safe_as_a_path() {
        for good in ["main", "a", "prod-1", "0x_y"] {
            assert!(good.parse::<ClusterName>().is_ok(), "{good:?} must parse");
        }
        for bad in ["", ".", "..", "a/b", "-a", "_a", "A", "ä", &"x".repeat(64)] {
            assert!(
                bad.parse::<ClusterName>().is_err(),
                "{bad:?} must not parse"
            );
        }
    }
}
