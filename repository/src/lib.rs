//! The repository of archived WAL and base backups, and how to find objects in it.
//!
//! Modules in reading order: the [`store`] of objects (a folder or a bucket), the [`Repository`] of
//! one cluster in it, the [`config`] both programs share, and what is kept of it ([`expire`]). The
//! crate `catalog` indexes it. The API blocks on purpose: a store that needs a runtime drives its
//! own, and async callers use `spawn_blocking`.

pub mod access;
mod audit;
mod backup_notes;
mod command_hints;
pub mod config;
pub mod crash_points;
mod damaged_backups;
pub mod durable;
pub mod encryption;
mod epochs;
mod error;
mod exit;
pub mod expire;
mod histories;
mod known_archive;
mod losses;
mod outcomes;
mod printable;
mod records;
mod repository;
mod restorable;
mod retention_lock;
pub mod schedule;
mod sealed_parts;
mod sound;
pub mod store;
mod target_time;
mod timeline_path;
mod unseen;
mod wal_range;

pub use audit::{AuditTrail, actor};
pub use backup_notes::BackupNotes;
pub use command_hints::with_command_hint;
pub use crash_points::CrashPoint;
pub use damaged_backups::{
    Damage, DamagedBackups, DamagedWal, damaged_backups, damaged_wal, incomplete_part,
};
pub use epochs::{Epoch, EpochCopy, Epochs};
pub use error::{Error, FAILURE_KINDS, Result, is_out_of_descriptors};
pub use exit::ExitKind;
pub use expire::ExpiredSet;
pub use histories::{Histories, LostHistory};
pub use losses::{FoundLoss, Loss, LossRecord, Missing, RecordedLosses, name_losses};
pub use outcomes::{
    OUTCOMES_MAX, Outcomes, outcome_mark, outcome_name, outcome_seen, outcome_time,
};
pub use printable::printable;
pub use repository::{ClusterIdentity, Repository};
pub use restorable::{
    KnownTimeline, PathWal, Refusal, Restorable, Stretch, WalIndex, default_timelines, follow_wal,
    leads_to,
};
pub use retention_lock::{KnownLocks, LockReport, extend_locks};
pub use sound::is_sound;
pub use store::{ObjectMeta, ObjectStore, PutOutcome};
pub use target_time::{TimeError, explain_time, is_relative, parse_time};
pub use timeline_path::{PathPart, timeline_path};
pub use unseen::UnseenPlace;
pub use wal_range::{WalRange, WalRangeKind};
