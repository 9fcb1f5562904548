//! The families of the catalog: the types of their keys and values, and how both are stored.

use repository::{ClusterIdentity, ExpiredSet, WalRange};
use serde::{Serialize, de::DeserializeOwned};
use wal_format::{BackupId, BackupInfo, Branch, Lsn, PgTimestamp, SegmentSummary, TimelineHistory};

use super::keys::{self, RangeKey};

/// The names of all families.
pub(super) const NAMES: [&str; 6] = [
    META,
    Segments::NAME,
    CommitTimes::NAME,
    RestorePoints::NAME,
    Timelines::NAME,
    Backups::NAME,
];

/// The family of single values ([`Single`]).
pub(super) const META: &str = "meta";

/// A family of entries of one kind.
pub(super) trait Family {
    /// The name in RocksDB.
    const NAME: &'static str;
    type Key;
    type Value;

    /// Returns the stored form of a key. Keys sort as their stored forms do.
    fn key(key: &Self::Key) -> Vec<u8>;

    /// Reads a stored key.
    fn parse_key(stored: &[u8]) -> Option<Self::Key>;

    /// Reads the stored value of an entry.
    fn parse_value(key: &Self::Key, stored: &[u8]) -> Option<Self::Value>;
}

/// A single value of the family `meta`.
pub(super) trait Single {
    /// The stored key.
    const KEY: &'static [u8];
    type Value: Serialize + DeserializeOwned;
}

/// The cluster whose catalog this is.
pub(super) enum Identity {}

impl Single for Identity {
    const KEY: &'static [u8] = b"identity";
    type Value = ClusterIdentity;
}

/// The backups and WAL that count as absent because they expired.
pub(super) enum Expired {}

impl Single for Expired {
    const KEY: &'static [u8] = b"expired";
    type Value = ExpiredSet;
}

/// The archived ranges.
pub(super) enum Segments {}

impl Family for Segments {
    const NAME: &'static str = "segments";
    type Key = RangeKey;
    type Value = WalRange;

    fn key(key: &RangeKey) -> Vec<u8> {
        key.as_bytes().to_vec()
    }

    fn parse_key(stored: &[u8]) -> Option<RangeKey> {
        RangeKey::parse(stored)
    }

    fn parse_value(_: &RangeKey, stored: &[u8]) -> Option<WalRange> {
        serde_json::from_slice(stored).ok()
    }
}

/// The summary of each archived range. The stored LSNs count from the range's start.
pub(super) enum CommitTimes {}

impl Family for CommitTimes {
    const NAME: &'static str = "commit_times";
    type Key = RangeKey;
    type Value = SegmentSummary;

    fn key(key: &RangeKey) -> Vec<u8> {
        key.as_bytes().to_vec()
    }

    fn parse_key(stored: &[u8]) -> Option<RangeKey> {
        RangeKey::parse(stored)
    }

    fn parse_value(key: &RangeKey, stored: &[u8]) -> Option<SegmentSummary> {
        SegmentSummary::decode(key.start_lsn(), stored).ok()
    }
}

/// The named restore points with their times.
pub(super) enum RestorePoints {}

impl Family for RestorePoints {
    const NAME: &'static str = "restore_points";
    type Key = (Branch, Lsn);
    type Value = (PgTimestamp, String);

    fn key((branch, lsn): &Self::Key) -> Vec<u8> {
        keys::position(*branch, *lsn).to_vec()
    }

    fn parse_key(stored: &[u8]) -> Option<Self::Key> {
        keys::parse_position(stored)
    }

    fn parse_value(_: &Self::Key, stored: &[u8]) -> Option<Self::Value> {
        serde_json::from_slice(stored).ok()
    }
}

/// The history file of each timeline, empty for timeline 1.
pub(super) enum Timelines {}

impl Family for Timelines {
    const NAME: &'static str = "timelines";
    type Key = Branch;
    type Value = (Option<TimelineHistory>, Vec<u8>);

    fn key(key: &Branch) -> Vec<u8> {
        keys::branch(*key).to_vec()
    }

    fn parse_key(stored: &[u8]) -> Option<Branch> {
        keys::parse_branch(stored)
    }

    fn parse_value(branch: &Branch, stored: &[u8]) -> Option<Self::Value> {
        let history = match stored {
            [] => None,
            content => Some(TimelineHistory::parse(branch.timeline, content).ok()?),
        };
        Some((history, stored.to_vec()))
    }
}

/// The base backups.
pub(super) enum Backups {}

impl Family for Backups {
    const NAME: &'static str = "backups";
    type Key = BackupId;
    type Value = BackupInfo;

    fn key(key: &BackupId) -> Vec<u8> {
        key.as_str().as_bytes().to_vec()
    }

    fn parse_key(stored: &[u8]) -> Option<BackupId> {
        std::str::from_utf8(stored).ok()?.parse().ok()
    }

    fn parse_value(_: &BackupId, stored: &[u8]) -> Option<BackupInfo> {
        serde_json::from_slice(stored).ok()
    }
}
