//! Types for PostgreSQL's write-ahead log and for our archive of it. No I/O, no async, no clock.
//!
//! Modules in reading order: the basic terms ([`lsn`], [`time`], [`timeline`], [`segment`],
//! [`system`]), PostgreSQL's WAL ([`page`], [`record`], the streaming [`decoder`] and the
//! [`indexer`] that uses it), the [`summary`] of a range of WAL, our container for that range
//! ([`sealed`]), the files of a cluster and its base backups ([`control_file`], [`backup_label`],
//! [`tablespace_map`], [`backup_manifest`], [`tar`], our own [`backup`]), and [`layout`] with every
//! key in the repository.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![cfg_attr(
    test,
    allow(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "tests panic on purpose"
    )
)]

pub mod backup;
pub mod backup_label;
pub mod backup_manifest;
pub mod checked_json;
pub mod control_file;
pub mod decoder;
pub mod drill;
pub mod error;
pub mod expired;
pub mod failover;
mod fields;
pub mod gap;
pub mod indexer;
pub mod layout;
pub mod lsn;
mod note;
pub mod outcome;
pub mod page;
pub mod record;
pub mod relative_path;
pub mod rewrite;
mod rmgr;
pub mod sealed;
pub mod segment;
pub mod summary;
pub mod system;
pub mod tablespace_map;
pub mod tar;
pub mod time;
pub mod timeline;

pub use backup::{
    BackupInfo, BackupKind, BackupSlice, ContinuedFile, SliceError, SlicePart, Tablespace,
};
pub use backup_label::BackupLabel;
pub use backup_manifest::{BackupManifest, ManifestFile};
pub use control_file::{ClusterState, ControlFile};
pub use decoder::{RecordSink, WalDecoder, WalIdentity};
pub use drill::{CheckVerdict, DrillCheck, DrillRecord, DrillStep};
pub use error::{DecodeError, DecodeErrorKind};
pub use expired::{EXPIRED_FORMAT_VERSION, Expired, ExpiredBackup, ExpiredWal, ExpiredWindow};
pub use failover::{FAILOVER_LOSS_FORMAT_VERSION, FailoverLoss, LOST_COMMITS_LISTED_MAX};
pub use gap::DeclaredGap;
pub use indexer::WalIndexer;
pub use layout::{BackupId, ClusterName, ObjectKey, history_file_name};
pub use lsn::Lsn;
pub use note::{BACKUP_NOTE_FORMAT_VERSION, BackupNote, NoteChange};
pub use outcome::{Actor, OUTCOME_FORMAT_VERSION, Outcome, OutcomeKind, RestoreRecord};
pub use record::{RecordHeader, ResourceManager, WalRecord};
pub use rewrite::WalChange;
pub use rmgr::transaction_end;
pub use sealed::{FrameCompressor, SealedFooter, SealedHeader, SealedReader, SealedWriter};
pub use segment::{SegmentName, SegmentNo, SegmentSize, WalFileName};
pub use summary::{
    CheckpointKind, RelationFile, SegmentSummary, TransactionEnd, TransactionEndKind, WalEvent,
};
pub use system::{PgVersion, SystemIdentifier};
pub use time::PgTimestamp;
pub use timeline::{Branch, TimelineHistory, TimelineId, TimelineSpan};
