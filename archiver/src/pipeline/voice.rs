//! [`Voice`]: what PostgreSQL is told, by whoever has something to say: the stream's thread when WAL is durable, and a
//! timer beside it when that thread is held up by a disk.
//!
//! Invariant: what is said is read under the same lock that sends it, so a status never takes back what one before said;
//! `flush` is what [`super::progress`] proved, however long ago.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Mutex, watch},
    task::JoinSet,
    time::Instant,
};
use wal_format::Lsn;

use super::progress::Acknowledgement;
use crate::{
    error::Result,
    flushed_lsn::FlushedLsn,
    replication::{StatusSender, StatusUpdate},
};

/// The sending side of one stream.
#[derive(Debug)]
pub struct Voice {
    acknowledgements: watch::Receiver<Acknowledgement>,
    /// Flush LSNs before this were said already, in an earlier stream: a smaller position would move the slot back.
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
    /// Of a stream that begins.
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

    /// Says how far we are now.
    ///
    /// # Errors
    /// The connection's.
    pub async fn say(&self, reply_requested: bool) -> Result<()> {
        let mut mouth = self.mouth.lock().await;
        self.say_with(&mut mouth, reply_requested).await
    }

    /// Speaks up whenever nobody has for longer than `interval`; until what is returned is dropped.
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
                // The stream's own timer comes first while its thread is not held up.
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

    /// Ends the stream although its thread is held up: the server is told that we leave.
    pub(super) async fn close(&self) {
        if let Some(sender) = self.end().await {
            sender.close().await;
        }
    }

    /// The stream has ended: nothing is said any more. `None` if it had ended before.
    pub async fn end(&self) -> Option<StatusSender> {
        self.mouth.lock().await.sender.take()
    }

    async fn say_with(&self, mouth: &mut Mouth, reply_requested: bool) -> Result<()> {
        let now = *self.acknowledgements.borrow();
        // 0/0 tells the server nothing.
        let flush = if now.flush.lsn() < self.floor {
            FlushedLsn::proved(Lsn::ZERO)
        } else {
            now.flush
        };
        if let Some(sender) = &mut mouth.sender {
            let update = StatusUpdate {
                write: now.write,
                flush,
                reply_requested,
            };
            sender.send(update).await?;
            mouth.last_spoke = Instant::now();
        }
        Ok(())
    }
}
