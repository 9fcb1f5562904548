//! End-to-end tests of `wal-archiver` on real PostgreSQL servers.
//!
//! Without a server they are skipped with a message. In CI a missing server is a failure.

mod advice;
mod base_backups;
mod certificates;
mod clock;
mod clusters;
mod connect;
mod conninfo;
mod crash;
mod crash_points;
mod dashboard;
mod disk;
mod divergence;
mod ending;
mod faults;
mod gaps;
mod history;
mod holes;
mod import;
mod leaving;
mod libpq;
mod many_clusters;
mod network;
mod odd_wal;
mod older_copy;
mod preconditions;
mod present;
mod pressure;
mod push;
mod resetwal;
mod schedules;
mod server_shutdown;
mod streaming;
mod support;
mod takeover;
mod timelines;
mod truth;
mod unmounted;
mod users;
mod walsender;
