//! Checks whether an object's bytes are what was written, from the checksums in the object.

use wal_format::{
    BackupInfo, BackupNote, Branch, DeclaredGap, Expired, FailoverLoss, ObjectKey, SealedReader,
    TimelineHistory, checked_json,
};

use crate::ClusterIdentity;

/// Returns true if an object that tells of its own damage is what it was. Slices and manifests do
/// not: their backup knows.
#[must_use]
pub fn is_sound(key: &ObjectKey, body: &[u8]) -> bool {
    match key {
        ObjectKey::Segment(..) | ObjectKey::Tail(..) => SealedReader::open(body)
            .and_then(|reader| {
                reader
                    .read_all(&mut Vec::new())
                    .map(|_| reader.header().key() == *key)
            })
            .unwrap_or(false),
        ObjectKey::History(_, branch) | ObjectKey::HistoryCopy(_, branch) => {
            is_history(*branch, body)
        }
        ObjectKey::BackupInfo(..) => BackupInfo::parse_of(key, body).is_ok(),
        ObjectKey::Gap(..) => checked_json::from_slice::<DeclaredGap>(body).is_ok(),
        ObjectKey::FailoverLoss(..) => checked_json::from_slice::<FailoverLoss>(body).is_ok(),
        ObjectKey::Epoch(_) | ObjectKey::EpochCopy(_) => {
            checked_json::from_slice::<ClusterIdentity>(body).is_ok()
        }
        ObjectKey::BackupNote(..) => checked_json::from_slice::<BackupNote>(body).is_ok(),
        ObjectKey::Expired(..) => checked_json::from_slice::<Expired>(body).is_ok(),
        // A later version may write fields that this one does not parse.
        ObjectKey::Outcome(..) => serde_json::from_slice::<serde_json::Value>(body).is_ok(),
        ObjectKey::BackupSlice(..) | ObjectKey::BackupManifest(..) => true,
    }
}

/// The branch's name holds a digest of the file, so that damage shows.
pub(crate) fn is_history(branch: Branch, content: &[u8]) -> bool {
    Branch::of_history(branch.timeline, content) == branch
        && TimelineHistory::parse(branch.timeline, content).is_ok()
}
