//! Retention: decides what to keep of a cluster before anything is removed.
//!
//! [`Holding`] is the content of one repository, [`plan_expire`] decides (no clock, no I/O),
//! [`mark`] records the decision, and [`sweep`] removes what was marked long enough ago. Each of
//! several repositories is treated separately, with its own [`RetentionPolicy`]. Invariants: every
//! kept backup keeps the WAL that makes it consistent. Every moment of the window that could be
//! restored still can. The newest backup stays, and nothing is removed while the newest backup is
//! not proved intact.

mod holding;
mod intervals;
mod marked;
mod periods;
mod plan;
mod policy;
mod reach;
mod sweep;
#[cfg(test)]
mod tests;
mod undo;

pub use holding::{HeldBackup, HeldBranch, Holding, Index};
pub use intervals::Intervals;
pub use marked::ExpiredSet;
pub use plan::{ExpirePlan, KeptBackup, Reason, Refusal, plan_delete, plan_expire};
pub use policy::RetentionPolicy;
pub use sweep::{Swept, due, mark, sweep};
pub use undo::{Undone, undo};
