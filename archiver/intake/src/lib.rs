//! Archives one file of `pg_wal`: checks it, compresses it, stores it and reads it back.
//!
//! In reading order: [`Pusher`] (start here), which the daemon, an import and a push without a
//! daemon use; [`stored`], which compares an object in the repository with WAL; [`spool_files`],
//! the place of the streamed copy of the same segment. Invariant: nothing here depends on the
//! catalog, so that a process that only pushes one file starts quickly.

mod error;
mod pusher;
pub mod spool_files;
pub mod stored;

pub use error::{Error, Result};
pub use pusher::{Checked, Looked, NO_RECORD, NewSegment, Pusher, Running, WalFile, push_alone};
