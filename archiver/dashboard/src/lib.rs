//! Shows the status of the clusters, and sends notifications about it.
//!
//! Modules in reading order: [`monitor`] (start here: once a second it turns each status into
//! series, events and alerts), [`http`](mod@http) (the page, the API and the metrics),
//! [`notifications`]. Invariant: it reads `status` only. What only the archive can answer it asks
//! through [`monitor::queries::ArchiveQueries`], and a base backup through a function that the
//! daemon passes.

mod clock;
pub mod http;
pub mod monitor;
pub mod notifications;
pub mod server_certificate;
