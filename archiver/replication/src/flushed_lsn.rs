//! [`FlushedLsn`]: the only position that may be reported to PostgreSQL as flushed.
//!
//! Invariant: a value exists only for WAL that survives power loss in the class the user chose.
//! PostgreSQL recycles segments behind it and acknowledges commits because of it, so it is made
//! where the proof is: after the spool's fdatasync or after the repository's put, nowhere else.

use wal_format::Lsn;

/// The end of the WAL that is proved durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlushedLsn(Lsn);

impl FlushedLsn {
    /// Nothing is durable. PostgreSQL ignores a position of 0/0.
    pub const NONE: Self = Self(Lsn::ZERO);

    /// States that every byte before `lsn` is durable. Call it right after the fsync or put that
    /// proves it. `clippy.toml` forbids other callers.
    #[must_use]
    pub fn proved(lsn: Lsn) -> Self {
        Self(lsn)
    }

    /// The position.
    #[must_use]
    pub fn lsn(self) -> Lsn {
        self.0
    }
}
