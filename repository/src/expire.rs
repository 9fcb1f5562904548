//! Retention: what of a cluster is kept, decided before anything is removed.
//!
//! [`Holding`] is what one repository has, [`plan_expire`] decides (no clock, no I/O), [`mark`] writes the decision down,
//! and [`sweep`] removes what was marked long enough ago. Each of several repositories is treated alone, by its own
//! [`RetentionPolicy`]. Invariants: every kept backup keeps the WAL that makes it consistent; every moment of the window
//! that could be restored still can; the newest backup stays, and when it is not proved whole nothing goes.

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

pub use holding::{HeldBackup, HeldBranch, Holding, Index};
pub use intervals::Intervals;
pub use marked::ExpiredSet;
pub use plan::{ExpirePlan, KeptBackup, Reason, Refusal, plan_expire};
pub use policy::RetentionPolicy;
pub use sweep::{Swept, due, mark, sweep};
