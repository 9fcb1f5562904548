//! Rebuilds a data directory at a recovery target; serves `restore_command`.
//!
//! Modules in reading order: the [`target`] that the operator names; the [`inventory`] of the
//! archive; the [`plan`] (pure: where PostgreSQL will stop, or why it cannot); [`unfinished`],
//! which avoids the effects that a `DROP` has before its commit; [`execute`], which applies the
//! plan; [`isolation`] of the copy from its parent; [`wal_fetch`], which delivers WAL to the
//! recovery; [`look_ahead`], which fetches WAL before PostgreSQL asks for it; [`tablespaces`],
//! which keeps the replay out of other servers' directories; [`start`], which runs the recovery and
//! compares the outcome with the plan; `drill`, which tests a restore and
//! records the result; and [`locate`], which finds the moment to restore to.

pub mod cli;
mod drill;
pub mod error;
pub mod execute;
mod expired;
mod heap;
pub mod inventory;
pub mod isolation;
pub mod list;
pub mod locate;
pub mod look_ahead;
pub mod plan;
mod roles;
mod shell;
mod space;
mod sql;
pub mod start;
mod stop_wal;
pub mod tablespaces;
pub mod target;
pub mod unfinished;
pub mod wal_fetch;

pub use error::{Error, Result};
pub use plan::{NotChosen, PlanError, RestorePlan, Stop, plan_restore};
pub use space::FileSystem;
pub use target::RecoveryTarget;
