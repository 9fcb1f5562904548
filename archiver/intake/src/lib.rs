//! One file of `pg_wal` on its way into the repository: checked, compressed, stored, read back.
//!
//! In reading order: [`Pusher`] (start here), which a daemon, an import and a push without a daemon use; [`stored`], what lies
//! in the repository under a name; [`spool_files`], where the stream keeps the same segment. Invariant: nothing here depends
//! on the catalog, so that a process that does no more than a push starts quickly.

mod error;
mod pusher;
pub mod spool_files;
pub mod stored;

pub use error::{Error, Result};
pub use pusher::{Checked, Looked, NO_RECORD, NewSegment, Pusher, Running, WalFile, push_alone};
