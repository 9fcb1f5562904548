//! [`Voice`]: sends status updates to PostgreSQL. The stream's thread uses it when WAL is durable,
//! and a separate timer uses it while a disk blocks that thread.
//!
//! Invariant: the positions are read under the same lock that sends them, so a status never reports
//! less than an earlier one. `flush` is what [`crate::core::progress`] proved, however long ago.

use std::{sync::Arc, time::Duration};

use replication::{FlushedLsn, StatusSender, StatusUpdate};
use repository::CrashPoint;
use tokio::{
    sync::{Mutex, watch},
    task::JoinSet,
    time::Instant,
};
use wal_format::Lsn;

use crate::{core::progress::Acknowledgement, error::Result};

/// The sending side of one stream.
#[derive(Debug)]
pub struct Voice {
    acknowledgements: watch::Receiver<Acknowledgement>,
    /// Flush LSNs before this were already reported in an earlier stream. A smaller position would
    /// move the slot back.
    floor: Lsn,
    mouth: Mutex<Mouth>,
}

#[derive(Debug)]
struct Mouth {
    /// `None` when the stream has ended.
    sender: Option<StatusSender>,
    last_spoke: Instant,
}

impl Voice {
    /// Creates the sending side of a stream that begins.
    #[must_use]
    pub fn new(
        sender: StatusSender,
        acknowledgements: watch::Receiver<Acknowledgement>,
        floor: Lsn,
    ) -> Arc<Self> {
        Arc::new(Self {
            acknowledgements,
            floor,
            mouth: Mutex::new(Mouth {
                sender: Some(sender),
                last_spoke: Instant::now(),
            }),
        })
    }

    /// Sends the current positions.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn say(&self, reply_requested: bool) -> Result<()> {
        let mut mouth = self.mouth.lock().await;
        self.say_with(&mut mouth, reply_requested).await
    }

    /// Sends a status whenever none was sent for longer than `interval`, until the returned guard
    /// is dropped.
    #[must_use]
    pub fn keep_alive(self: &Arc<Self>, interval: Duration) -> JoinSet<()> {
        let voice = Arc::clone(self);
        let mut timer = JoinSet::new();
        timer.spawn(async move {
            loop {
                let mut mouth = voice.mouth.lock().await;
                if mouth.sender.is_none() {
                    return;
                }
                // The stream's own timer fires first while its thread is not blocked.
                let patience = interval + interval / 4;
                if mouth.last_spoke.elapsed() >= patience
                    && let Err(error) = voice.say_with(&mut mouth, false).await
                {
                    tracing::debug!(%error, "the connection is gone; the stream will find out");
                    return;
                }
                let next = mouth.last_spoke + patience;
                drop(mouth);
                tokio::time::sleep_until(next).await;
            }
        });
        timer
    }

    /// Ends the stream although its thread is blocked: sends Terminate to the server.
    pub(super) async fn close(&self) {
        if let Some(sender) = self.end().await {
            sender.close().await;
        }
    }

    /// Marks the stream as ended, so that no further status is sent. Returns `None` if it had ended
    /// before.
    pub async fn end(&self) -> Option<StatusSender> {
        self.mouth.lock().await.sender.take()
    }

    async fn say_with(&self, mouth: &mut Mouth, reply_requested: bool) -> Result<()> {
        let now = *self.acknowledgements.borrow();
        let flush = if now.flush.lsn() < self.floor {
            FlushedLsn::NONE
        } else {
            now.flush
        };
        if let Some(sender) = &mut mouth.sender {
            let update = StatusUpdate {
                write: now.write,
                flush,
                reply_requested,
            };
            let lost = |source| replication::Error::Io {
                place: "the primary".to_owned(),
                source,
            };
            CrashPoint::AcknowledgementDue.reach().map_err(lost)?;
            sender.send(update).await?;
            CrashPoint::AcknowledgementSent.reach().map_err(lost)?;
            mouth.last_spoke = Instant::now();
        }
        Ok(())
    }
}
