//! [`ReplicationClient`]: the commands of a walsender.

use bytes::Bytes;
use wal_format::{Lsn, SegmentSize, SystemIdentifier, TimelineId};

use super::{
    ConnInfo, ConnectionMode, Error, Result, StatusSender, WalReceiver,
    connect::{self, Connection},
    connection::{self, Reader, Row, Writer, text},
    stream::{self, NextTimeline},
};

/// The server's version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerVersion {
    /// The number, for example `170011` for 17.11.
    pub num: u32,
    /// The text that the server reports.
    pub text: String,
}

/// The answer to `IDENTIFY_SYSTEM`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SystemIdentity {
    /// The system identifier of the cluster.
    pub system_identifier: SystemIdentifier,
    /// The current timeline.
    pub timeline: TimelineId,
    /// The end of the WAL that the server has flushed.
    pub flush_lsn: Lsn,
}

/// A replication slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// True for a physical slot. A logical slot retains no WAL for us.
    pub physical: bool,
    /// The first LSN that the slot retains.
    pub restart_lsn: Option<Lsn>,
    /// True if a walsender is using the slot.
    pub active: bool,
    /// `wal_status`, if the server reports it.
    pub wal_status: Option<String>,
}

/// The result of creating a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotCreation {
    /// The slot was created.
    Created,
    /// A slot of this name existed.
    AlreadyExists,
}

/// The server's answer to `START_REPLICATION`.
#[derive(Debug)]
pub enum ReplicationStart {
    /// The stream has started.
    Streaming(WalReceiver, StatusSender),
    /// The timeline ends at the requested start. Contains the next timeline.
    EndOfTimeline(ReplicationClient, Option<NextTimeline>),
}

/// A connection that is not streaming.
#[derive(Debug)]
pub struct ReplicationClient {
    reader: Reader,
    writer: Writer,
    version: ServerVersion,
    info: ConnInfo,
}

impl ReplicationClient {
    /// Connects to the server.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server.
    pub async fn connect(info: &ConnInfo, mode: ConnectionMode) -> Result<Self> {
        let Connection {
            reader,
            writer,
            version,
            host,
        } = Box::pin(connect::connect(info, mode)).await?;
        Ok(Self {
            reader,
            writer,
            version,
            info: info.pinned_to(host),
        })
    }

    pub(super) fn from_parts(
        reader: Reader,
        writer: Writer,
        version: ServerVersion,
        info: ConnInfo,
    ) -> Self {
        Self {
            reader,
            writer,
            version,
            info,
        }
    }

    pub(super) fn reader(&mut self) -> &mut Reader {
        &mut self.reader
    }

    pub(super) fn writer(&mut self) -> &mut Writer {
        &mut self.writer
    }

    /// The connection settings limited to the host that accepted the connection.
    #[must_use]
    pub fn conninfo(&self) -> &ConnInfo {
        &self.info
    }

    /// The TLS version, if the connection is encrypted.
    #[must_use]
    pub fn encryption(&self) -> Option<&'static str> {
        self.reader.encryption()
    }

    /// Closes the connection with a Terminate message.
    pub async fn close(self) {
        self.writer.close().await;
    }

    /// The server's version.
    #[must_use]
    pub fn server_version(&self) -> &ServerVersion {
        &self.version
    }

    /// Runs `IDENTIFY_SYSTEM`.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity> {
        let row = self.row("IDENTIFY_SYSTEM").await?;
        let parsed = (|| {
            Some(SystemIdentity {
                system_identifier: text(&row, 0)?.parse().ok()?,
                timeline: TimelineId::new(text(&row, 1)?.parse().ok()?)?,
                flush_lsn: text(&row, 2)?.parse().ok()?,
            })
        })();
        parsed.ok_or_else(|| {
            self.reader
                .unexpected("IDENTIFY_SYSTEM with nonsense".to_owned())
        })
    }

    /// Returns a setting as `SHOW` prints it.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server.
    pub async fn show(&mut self, name: &str) -> Result<String> {
        let row = self.row(&format!("SHOW {name}")).await?;
        Ok(text(&row, 0).unwrap_or_default())
    }

    /// Returns `wal_segment_size`.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server.
    pub async fn wal_segment_size(&mut self) -> Result<SegmentSize> {
        let shown = self.show("wal_segment_size").await?;
        let digits = shown.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = match &shown[digits.len()..] {
            "kB" => 1 << 10,
            "MB" => 1 << 20,
            "GB" => 1 << 30,
            _ => 1,
        };
        digits
            .parse::<u64>()
            .ok()
            .and_then(|count| count.checked_mul(unit))
            .and_then(|bytes| SegmentSize::new(bytes).ok())
            .ok_or_else(|| self.reader.unexpected(format!("wal_segment_size {shown}")))
    }

    /// Returns the content of a timeline's history file.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server.
    pub async fn timeline_history(&mut self, timeline: TimelineId) -> Result<Bytes> {
        let mut row = self.row(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let content = row.drain(..).nth(1).flatten();
        content.ok_or_else(|| self.reader.unexpected("no timeline history".to_owned()))
    }

    /// Creates a physical slot.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server.
    pub async fn create_slot(&mut self, name: &str, reserve_wal: bool) -> Result<SlotCreation> {
        let reserve = if reserve_wal { " RESERVE_WAL" } else { "" };
        let command = format!("CREATE_REPLICATION_SLOT \"{name}\" PHYSICAL{reserve}");
        match self.rows(&command).await {
            Ok(_) => Ok(SlotCreation::Created),
            Err(Error::Server { report, .. }) if report.code == "42710" => {
                Ok(SlotCreation::AlreadyExists)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the LSN from which a new slot retains WAL: the redo position of the server's last
    /// checkpoint. Uses a temporary slot, which does not outlive this call.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server.
    pub async fn redo_lsn(&mut self) -> Result<Option<Lsn>> {
        let name = format!("tidemark_redo_{}", std::process::id());
        self.rows(&format!(
            "CREATE_REPLICATION_SLOT \"{name}\" TEMPORARY PHYSICAL RESERVE_WAL"
        ))
        .await?;
        let slot = self.slot(&name).await?;
        self.drop_slot(&name).await?;
        Ok(slot.and_then(|slot| slot.restart_lsn))
    }

    /// Drops a slot.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server.
    pub async fn drop_slot(&mut self, name: &str) -> Result<()> {
        self.rows(&format!("DROP_REPLICATION_SLOT \"{name}\""))
            .await?;
        Ok(())
    }

    /// Reads a slot over a separate SQL connection: `READ_REPLICATION_SLOT` does not exist before
    /// 15 and does not report `wal_status`.
    ///
    /// If `pg_hba.conf` permits the role only replication connections, the result is limited to
    /// what this connection can report. Before 15 that is nothing, as if the slot did not exist.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server.
    pub async fn slot(&mut self, name: &str) -> Result<Option<SlotInfo>> {
        let info = self.info.clone();
        let mut sql = match Box::pin(Self::connect(&info, ConnectionMode::Sql)).await {
            Ok(sql) => sql,
            Err(error) if error.is_auth() && self.version.num >= 150_000 => {
                return self.read_slot(name).await;
            }
            Err(error) if error.is_auth() => return Ok(None),
            Err(error) => return Err(error),
        };
        let quoted = name.replace('\'', "''");
        let rows = sql
            .query(&format!(
                "SELECT restart_lsn::text, active::text, wal_status, slot_type FROM pg_catalog.pg_replication_slots \
                 WHERE slot_name = '{quoted}'"
            ))
            .await?;
        sql.close().await;
        Ok(rows.into_iter().next().map(|row| {
            let field = |at: usize| row.get(at).cloned().flatten();
            SlotInfo {
                physical: field(3).as_deref() != Some("logical"),
                restart_lsn: field(0).and_then(|lsn| lsn.parse().ok()),
                active: field(1).as_deref() == Some("true"),
                wal_status: field(2),
            }
        }))
    }

    async fn read_slot(&mut self, name: &str) -> Result<Option<SlotInfo>> {
        let row = self
            .row(&format!("READ_REPLICATION_SLOT \"{name}\""))
            .await?;
        let restart_lsn = text(&row, 1).and_then(|lsn| lsn.parse().ok());
        Ok(text(&row, 0).map(|_| SlotInfo {
            physical: true,
            restart_lsn,
            active: false,
            // Our slots retain WAL from their creation. A slot without a restart LSN was
            // invalidated.
            wal_status: restart_lsn.is_none().then(|| "lost".to_owned()),
        }))
    }

    /// Runs a simple query. Returns every value as text.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
        let rows = self.rows(sql).await?;
        let texts = |row: Row| (0..row.len()).map(|at| text(&row, at)).collect();
        Ok(rows.into_iter().map(texts).collect())
    }

    /// Starts streaming.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server.
    pub async fn start_replication(
        mut self,
        slot: Option<&str>,
        start_lsn: Lsn,
        timeline: TimelineId,
    ) -> Result<ReplicationStart> {
        let slot = slot.map_or_else(String::new, |slot| format!("SLOT \"{slot}\" "));
        let command = format!("START_REPLICATION {slot}PHYSICAL {start_lsn} TIMELINE {timeline}");
        self.writer.query(&command).await?;
        let answer = self.reader.answer().await?;
        match answer.tag {
            b'W' => Ok(ReplicationStart::Streaming(
                WalReceiver::new(self.reader, self.version, self.info),
                StatusSender::new(self.writer),
            )),
            // The requested start is the end of the timeline, so there is nothing to stream.
            b'T' => {
                let next = stream::next_timeline(&mut self.reader).await?;
                Ok(ReplicationStart::EndOfTimeline(self, next))
            }
            other => {
                let tag = other.escape_ascii();
                Err(self
                    .reader
                    .unexpected(format!("'{tag}' to START_REPLICATION")))
            }
        }
    }

    async fn row(&mut self, command: &str) -> Result<Row> {
        let rows = self.rows(command).await?;
        rows.into_iter()
            .next()
            .ok_or_else(|| self.reader.unexpected(format!("nothing to {command}")))
    }

    async fn rows(&mut self, command: &str) -> Result<Vec<Row>> {
        connection::rows(&mut self.reader, &mut self.writer, command).await
    }
}

impl ServerVersion {
    /// Reads the version from the parameter `server_version`.
    pub(super) fn of_parameter(text: &str) -> Self {
        Self {
            num: version_number(text),
            text: text.to_owned(),
        }
    }
}

/// Converts `17.11 (Debian …)` to 170011 and `18beta1` to 180000.
fn version_number(text: &str) -> u32 {
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .map(|digits| digits.parse::<u32>().unwrap_or_default());
    let major = numbers.next().unwrap_or_default();
    let minor = if text[text.len().min(major.to_string().len())..].starts_with('.') {
        numbers.next().unwrap_or_default()
    } else {
        0
    };
    major.saturating_mul(10_000).saturating_add(minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_releases_and_betas_are_read() {
        for (text, number) in [
            ("17.11 (Debian 17.11-1)", 170_011),
            ("18beta1", 180_000),
            ("15.4", 150_004),
            ("", 0),
        ] {
            assert_eq!(version_number(text), number, "{text}");
        }
    }
}
