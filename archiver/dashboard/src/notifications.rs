//! Sends alerts without Prometheus: webhook, Slack, `PagerDuty`, mail. Also sends a heartbeat,
//! whose absence shows that the archiver itself is gone.
//!
//! Each second, the monitor reports which alerts fire. The `mailbox` derives from this which
//! notifications each receiver must still get, and the `notifier` delivers them.

mod client;
mod deliver;
mod error;
mod mailbox;
mod message;
mod notification;
mod notifier;
mod smtp;

pub(crate) use self::mailbox::Mailbox;
pub use self::{
    deliver::{send, test},
    error::NotifyError,
    notification::{Links, Notification},
    notifier::Notifier,
};

#[cfg(test)]
mod tests;
