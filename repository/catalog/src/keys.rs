//! The keys of the catalog: fixed width and big-endian, so that they sort in the order of the
//! numbers in them.

use repository::{WalRange, WalRangeKind};
use wal_format::{Branch, Lsn, SegmentNo, TimelineId};

/// Branch: timeline (4), digest (4).
pub(super) fn branch(branch: Branch) -> [u8; 8] {
    let mut key = [0; 8];
    key[..4].copy_from_slice(&branch.timeline.get().to_be_bytes());
    key[4..].copy_from_slice(&branch.digest);
    key
}

pub(super) fn parse_branch(key: &[u8]) -> Option<Branch> {
    let (timeline, digest) = key.split_first_chunk::<4>()?;
    let timeline = TimelineId::new(u32::from_be_bytes(*timeline))?;
    Some(Branch {
        timeline,
        digest: digest.try_into().ok()?,
    })
}

/// Branch (8), segment (8): the prefix of the keys of all ranges of one segment.
pub(super) fn segment(branch_of: Branch, segment: SegmentNo) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&branch(branch_of));
    key[8..].copy_from_slice(&segment.0.to_be_bytes());
    key
}

/// The key of a range: branch (8), segment (8), 0 for a sealed one or 1 for a tail (1), start (8),
/// end (8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RangeKey([u8; 33]);

impl RangeKey {
    pub(super) fn new(range: &WalRange) -> Self {
        let mut key = [0; 33];
        key[..16].copy_from_slice(&segment(range.branch, range.segment));
        key[16] = match range.kind {
            WalRangeKind::Sealed => 0,
            WalRangeKind::Tail => 1,
        };
        key[17..25].copy_from_slice(&range.start_lsn.0.to_be_bytes());
        key[25..].copy_from_slice(&range.end_lsn.0.to_be_bytes());
        Self(key)
    }

    pub(super) fn parse(stored: &[u8]) -> Option<Self> {
        stored.try_into().ok().map(Self)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the first LSN of the range.
    pub(super) fn start_lsn(&self) -> Lsn {
        let mut start = [0; 8];
        start.copy_from_slice(&self.0[17..25]);
        Lsn(u64::from_be_bytes(start))
    }
}

/// Branch (8), LSN (8).
pub(super) fn position(branch_of: Branch, lsn: Lsn) -> [u8; 16] {
    segment(branch_of, SegmentNo(lsn.0))
}

pub(super) fn parse_position(key: &[u8]) -> Option<(Branch, Lsn)> {
    let (branch, lsn) = key.split_at_checked(8)?;
    Some((
        parse_branch(branch)?,
        Lsn(u64::from_be_bytes(lsn.try_into().ok()?)),
    ))
}
