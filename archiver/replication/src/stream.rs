//! The replication stream: receives WAL, sends status updates.

use bytes::{Buf, BufMut, Bytes};
use wal_format::{Lsn, PgTimestamp, TimelineId};

use super::{
    ConnInfo, FlushedLsn, ReplicationClient, Result, ServerVersion,
    connection::{Reader, Writer, text},
};

/// A message of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamMessage {
    /// WAL.
    XLogData {
        /// The LSN of the first byte.
        start_lsn: Lsn,
        /// The server's flush LSN.
        wal_end: Lsn,
        /// The server's clock.
        send_time: PgTimestamp,
        /// The WAL bytes.
        data: Bytes,
    },
    /// A keepalive.
    Keepalive {
        /// The end of the WAL that was sent. This is not the server's flush LSN.
        wal_end: Lsn,
        /// The server's clock.
        send_time: PgTimestamp,
        /// True if the server requests an immediate reply.
        reply_requested: bool,
    },
    /// All WAL of this timeline was sent: see [`WalReceiver::finish_timeline`].
    EndOfTimeline,
    /// The server is shutting down normally.
    ServerClosed,
}

/// The continuation after a timeline's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextTimeline {
    /// The next timeline. Its number may be any larger number.
    pub timeline: TimelineId,
    /// The LSN where it begins.
    pub start_lsn: Lsn,
}

/// A status update. `apply` is always 0/0, because the archiver applies nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusUpdate {
    /// The end of the WAL that was written here.
    pub write: Lsn,
    /// The end of the WAL that is durable here.
    pub flush: FlushedLsn,
    /// True if the server should reply immediately.
    pub reply_requested: bool,
}

/// The reading half of a stream.
#[derive(Debug)]
pub struct WalReceiver {
    reader: Reader,
    version: ServerVersion,
    info: ConnInfo,
}

/// The writing half of a stream.
#[derive(Debug)]
pub struct StatusSender {
    writer: Writer,
}

impl WalReceiver {
    pub(super) fn new(reader: Reader, version: ServerVersion, info: ConnInfo) -> Self {
        Self {
            reader,
            version,
            info,
        }
    }

    /// Returns the next message. Cancel-safe.
    ///
    /// # Errors
    /// Any [`Error`](crate::Error) of the connection or the server.
    pub async fn next(&mut self) -> Result<StreamMessage> {
        loop {
            let message = self.reader.next().await?;
            match message.tag {
                b'd' => return self.copy_data(message.body),
                b'c' => return Ok(StreamMessage::EndOfTimeline),
                b'C' => return Ok(StreamMessage::ServerClosed),
                b'E' => return Err(self.reader.refusal(&message.body)),
                b'N' | b'S' => {}
                other => {
                    let what = format!("'{}' in the stream", other.escape_ascii());
                    return Err(self.reader.unexpected(what));
                }
            }
        }
    }

    /// Frees the buffers of a burst that is over.
    pub fn free_buffers(&mut self) {
        self.reader.free_buffers();
    }

    fn copy_data(&self, mut body: Bytes) -> Result<StreamMessage> {
        let kind = body.first().copied().unwrap_or_default();
        match kind {
            b'w' if body.len() >= 25 => {
                body.advance(1);
                Ok(StreamMessage::XLogData {
                    start_lsn: Lsn(body.get_u64()),
                    wal_end: Lsn(body.get_u64()),
                    send_time: PgTimestamp(body.get_i64()),
                    data: body,
                })
            }
            b'k' if body.len() >= 18 => {
                body.advance(1);
                Ok(StreamMessage::Keepalive {
                    wal_end: Lsn(body.get_u64()),
                    send_time: PgTimestamp(body.get_i64()),
                    reply_requested: body.get_u8() != 0,
                })
            }
            other => Err(self.reader.unexpected(format!(
                "'{}' of {} bytes in the stream",
                other.escape_ascii(),
                body.len()
            ))),
        }
    }

    /// Acknowledges the end of a timeline. Returns the next timeline and the connection, ready for
    /// the next command.
    ///
    /// # Errors
    /// Any [`Error`](crate::Error) of the connection or the server.
    pub async fn finish_timeline(
        mut self,
        mut sender: StatusSender,
    ) -> Result<(ReplicationClient, Option<NextTimeline>)> {
        sender.writer.put(b'c', &[]);
        sender.writer.flush().await?;
        let next = next_timeline(&mut self.reader).await?;
        let client =
            ReplicationClient::from_parts(self.reader, sender.writer, self.version, self.info);
        Ok((client, next))
    }
}

/// Reads to the end of `START_REPLICATION`. A row names the next timeline, which may have any
/// larger number, and its first LSN.
pub(super) async fn next_timeline(reader: &mut Reader) -> Result<Option<NextTimeline>> {
    let mut next = None;
    loop {
        let message = reader.next().await?;
        match message.tag {
            b'D' => {
                let row = reader.row(message.body)?;
                let parsed = (|| {
                    Some(NextTimeline {
                        timeline: TimelineId::new(text(&row, 0)?.parse().ok()?)?,
                        start_lsn: text(&row, 1)?.parse().ok()?,
                    })
                })();
                let nonsense = || reader.unexpected("a next timeline that is nonsense".to_owned());
                next = Some(parsed.ok_or_else(nonsense)?);
            }
            b'E' => return Err(reader.refusal(&message.body)),
            b'Z' => return Ok(next),
            // WAL that was already sent, the end of the COPY, row descriptions, completions.
            b'd' | b'c' | b'T' | b'C' | b'N' | b'S' => {}
            other => {
                let what = format!("'{}' at the end of a timeline", other.escape_ascii());
                return Err(reader.unexpected(what));
            }
        }
    }
}

impl StatusSender {
    pub(super) fn new(writer: Writer) -> Self {
        Self { writer }
    }

    /// Ends the stream and closes the connection. The server reads everything that was sent earlier
    /// first.
    pub async fn close(self) {
        self.writer.close().await;
    }

    /// Sends a status update.
    ///
    /// # Errors
    /// Any [`Error`](crate::Error) of the connection or the server.
    pub async fn send(&mut self, status: StatusUpdate) -> Result<()> {
        let mut body = Vec::with_capacity(34);
        body.put_u8(b'r');
        body.put_u64(status.write.0);
        body.put_u64(status.flush.lsn().0);
        body.put_u64(0);
        body.put_i64(PgTimestamp::from_jiff(jiff::Timestamp::now()).0);
        body.put_u8(u8::from(status.reply_requested));
        self.writer.put(b'd', &body);
        self.writer.flush().await
    }
}
