//! End-to-end tests of `pitr-restore` on real PostgreSQL servers.
//!
//! Without a server they are skipped with a message. In CI a missing server is a failure.
//! `TIDEMARK_LONG=1` runs every version and more targets.

mod access;
mod audit;
mod bad_input;
mod bad_store;
mod before_drop;
mod chains;
mod claims;
mod delta;
mod drill;
mod end_of_recovery;
mod epochs;
mod expire;
mod failover;
mod forged;
mod forks;
mod holes;
mod inherited;
mod interrupted;
mod isolation;
mod judged;
mod locate;
mod lost_history;
mod lost_identity;
mod minimal;
mod notations;
mod outage;
mod owner;
mod parents;
mod prepared_at_fork;
mod refusals;
mod replayed_tablespaces;
mod resume;
mod scene;
mod scheduled_drill;
mod sizes;
mod standby;
mod start;
mod support;
mod switch_segment;
mod tablespaces;
mod targets;
mod timelines;
mod unseen;
mod wal_fetch;
mod wal_fetch_s3;
mod xids;
