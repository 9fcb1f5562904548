//! `BASE_BACKUP`: presents both wire formats as one sequence of messages (one COPY per tablespace
//! before 15, a single COPY since).
//!
//! Invariant: [`BackupMessage::Done`] comes only after the server's final completion. The server
//! raises a checksum failure after all data, the manifest and the stop position, so a stream that
//! looks complete is not yet a backup.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};
use wal_format::{Lsn, TimelineId};

use super::{Error, ReplicationClient, Result, connection::text, error::ServerReport};

/// The end of a tar archive, which servers before 15 omit
/// (`MINIMUM_VERSION_FOR_TERMINATED_TARFILE`).
static TAR_END: [u8; 1024] = [0; 1024];

/// The maximum number of kept warnings, and of characters in each. The server reports a few for
/// each damaged file.
const WARNINGS_MAX: usize = 100;
const WARNING_CHARACTERS_MAX: usize = 1000;

/// Options of `BASE_BACKUP`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BaseBackupOptions {
    /// The backup's label.
    pub label: String,
    /// True if the checkpoint is performed immediately instead of spread over time.
    pub fast_checkpoint: bool,
    /// The maximum transfer rate in KiB per second.
    pub max_rate: Option<u32>,
}

/// A tablespace. The data directory itself has neither OID nor location.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupTablespace {
    /// Its OID.
    pub oid: Option<u32>,
    /// Its directory on the server.
    pub location: Option<String>,
    /// Its approximate size.
    pub size_kib: Option<u64>,
}

/// The messages, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackupMessage {
    /// The backup has begun.
    Start {
        /// START WAL LOCATION: the redo position.
        lsn: Lsn,
        /// Its timeline.
        timeline: TimelineId,
        /// The tablespaces that follow.
        tablespaces: Vec<BackupTablespace>,
    },
    /// A tar archive begins.
    Archive {
        /// The tablespace's OID. `None` for the data directory.
        tablespace: Option<u32>,
        /// Its directory on the server. Empty for the data directory.
        location: String,
    },
    /// Bytes of the archive.
    Data(Bytes),
    /// The manifest begins.
    Manifest,
    /// Bytes of the manifest.
    ManifestData(Bytes),
    /// The number of bytes sent so far, as counted by the server.
    Progress(u64),
    /// The LSN at which the backup is consistent.
    Stop {
        /// The position.
        lsn: Lsn,
        /// Its timeline.
        timeline: TimelineId,
    },
    /// The server reported success.
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    None,
    Archive,
    Manifest,
}

/// A base backup that is being received.
#[derive(Debug)]
pub struct BaseBackupStream {
    client: ReplicationClient,
    /// True if a single COPY carries everything, each message with a type byte (15 and later).
    typed: bool,
    result_sets: usize,
    tablespaces: Vec<BackupTablespace>,
    start: Option<(Lsn, TimelineId)>,
    /// The number of COPY streams begun (before 15).
    copies: usize,
    part: Part,
    ready: VecDeque<BackupMessage>,
    stopped: bool,
    refused: Option<Error>,
    warnings: Vec<String>,
}

impl ReplicationClient {
    /// Starts a base backup without WAL, which the archive already receives.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server.
    pub async fn base_backup(mut self, options: &BaseBackupOptions) -> Result<BaseBackupStream> {
        let typed = self.server_version().num >= 150_000;
        let label = options.label.replace('\'', "''");
        let command = if typed {
            let checkpoint = if options.fast_checkpoint {
                "fast"
            } else {
                "spread"
            };
            let rate = options
                .max_rate
                .map_or_else(String::new, |rate| format!(", MAX_RATE {rate}"));
            format!(
                "BASE_BACKUP (LABEL '{label}', PROGRESS, CHECKPOINT '{checkpoint}', WAIT 0, TABLESPACE_MAP, \
                 MANIFEST 'yes', MANIFEST_CHECKSUMS 'SHA256'{rate})"
            )
        } else {
            let fast = if options.fast_checkpoint { " FAST" } else { "" };
            let rate = options
                .max_rate
                .map_or_else(String::new, |rate| format!(" MAX_RATE {rate}"));
            format!(
                "BASE_BACKUP LABEL '{label}' PROGRESS{fast} NOWAIT{rate} TABLESPACE_MAP \
                 MANIFEST 'yes' MANIFEST_CHECKSUMS 'SHA256'"
            )
        };
        self.writer().query(&command).await?;
        Ok(BaseBackupStream {
            client: self,
            typed,
            result_sets: 0,
            tablespaces: Vec::new(),
            start: None,
            copies: 0,
            part: Part::None,
            ready: VecDeque::new(),
            stopped: false,
            refused: None,
            warnings: Vec::new(),
        })
    }
}

impl BaseBackupStream {
    /// Returns the next message. Set no timeout on the first one: during a spread checkpoint the
    /// server sends nothing for minutes.
    ///
    /// # Errors
    /// Any [`Error`] of the connection or the server. Everything received earlier is then not a
    /// backup.
    pub async fn next(&mut self) -> Result<BackupMessage> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Ok(message);
            }
            let message = self.client.reader().next().await?;
            match message.tag {
                b'T' => self.result_sets += 1,
                b'D' => self.row(message.body)?,
                b'H' => self.copy_begins(),
                b'd' if self.typed => self.typed_data(message.body)?,
                b'd' => self.ready.push_back(match self.part {
                    Part::Manifest => BackupMessage::ManifestData(message.body),
                    _ => BackupMessage::Data(message.body),
                }),
                b'c' => self.copy_ends(),
                b'C' if self.result_sets == 2 && self.copies == 0 && self.start.is_some() => {
                    self.begin()?;
                }
                b'E' => {
                    let error = self.client.reader().refusal(&message.body);
                    if error.is_final() {
                        return Err(error);
                    }
                    self.refused = self.refused.take().or(Some(error));
                }
                b'Z' => return self.done(),
                b'N' => self.notice(&message.body),
                b'C' | b'S' => {}
                other => {
                    let what = format!("'{}' in a base backup", other.escape_ascii());
                    return Err(self.client.reader().unexpected(what));
                }
            }
        }
    }

    /// The server's warnings so far, oldest first.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn notice(&mut self, body: &[u8]) {
        let Error::Server { report, .. } = self.client.reader().refusal(body) else {
            return;
        };
        let ServerReport {
            severity, message, ..
        } = *report;
        if severity == "WARNING" && self.warnings.len() < WARNINGS_MAX {
            tracing::warn!(warning = message, "the server warns during the base backup");
            let message = message.chars().take(WARNING_CHARACTERS_MAX);
            self.warnings.push(message.collect());
        }
    }

    /// The server is ready for the next command. The backup succeeded only if a stop position was
    /// received.
    fn done(&mut self) -> Result<BackupMessage> {
        if let Some(error) = self.refused.take() {
            return Err(error);
        }
        if !self.stopped {
            let what = "the end of BASE_BACKUP without a stop position".to_owned();
            return Err(self.client.reader().unexpected(what));
        }
        Ok(BackupMessage::Done)
    }

    fn row(&mut self, body: Bytes) -> Result<()> {
        let row = self.client.reader().row(body)?;
        if self.result_sets == 2 {
            self.tablespaces.push(BackupTablespace {
                oid: text(&row, 0).and_then(|oid| oid.parse().ok()),
                location: text(&row, 1),
                size_kib: text(&row, 2).and_then(|size| size.parse().ok()),
            });
            return Ok(());
        }
        let position = (|| {
            let timeline = TimelineId::new(text(&row, 1)?.parse().ok()?)?;
            Some((text(&row, 0)?.parse().ok()?, timeline))
        })();
        let (lsn, timeline) = position.ok_or_else(|| {
            self.client
                .reader()
                .unexpected("BASE_BACKUP without a position".to_owned())
        })?;
        if self.result_sets == 1 {
            self.start = Some((lsn, timeline));
        } else {
            self.stopped = true;
            self.ready.push_back(BackupMessage::Stop { lsn, timeline });
        }
        Ok(())
    }

    /// Queues the start message, once the start position and the tablespaces are known.
    fn begin(&mut self) -> Result<()> {
        let (lsn, timeline) = self.start.take().ok_or_else(|| {
            self.client
                .reader()
                .unexpected("BASE_BACKUP without a start".to_owned())
        })?;
        self.ready.push_back(BackupMessage::Start {
            lsn,
            timeline,
            tablespaces: self.tablespaces.clone(),
        });
        Ok(())
    }

    fn copy_begins(&mut self) {
        let number = self.copies;
        self.copies += 1;
        if self.typed {
            return;
        }
        match self.tablespaces.get(number) {
            Some(tablespace) => {
                self.part = Part::Archive;
                self.ready.push_back(BackupMessage::Archive {
                    tablespace: tablespace.oid,
                    location: tablespace.location.clone().unwrap_or_default(),
                });
            }
            None => {
                self.part = Part::Manifest;
                self.ready.push_back(BackupMessage::Manifest);
            }
        }
    }

    fn copy_ends(&mut self) {
        if !self.typed && self.part == Part::Archive {
            self.ready
                .push_back(BackupMessage::Data(Bytes::from_static(&TAR_END)));
        }
        self.part = Part::None;
    }

    fn typed_data(&mut self, mut body: Bytes) -> Result<()> {
        let kind = body.first().copied().unwrap_or_default();
        if !body.is_empty() {
            body.advance(1);
        }
        let message = match (kind, self.part) {
            (b'n', _) => {
                self.part = Part::Archive;
                let mut texts = body.split(|byte| *byte == 0);
                let mut text =
                    || String::from_utf8_lossy(texts.next().unwrap_or_default()).into_owned();
                let (name, location) = (text(), text());
                let stem = name.strip_suffix(".tar");
                let tablespace = match stem {
                    Some("base") => None,
                    // The name determines a path on our disk, so only a number is accepted.
                    Some(oid) if oid.parse::<u32>().is_ok() => oid.parse().ok(),
                    _ => {
                        let what = format!("an archive named {name:?}");
                        return Err(self.client.reader().unexpected(what));
                    }
                };
                BackupMessage::Archive {
                    tablespace,
                    location,
                }
            }
            (b'd', Part::Archive) => BackupMessage::Data(body),
            (b'd', Part::Manifest) => BackupMessage::ManifestData(body),
            (b'm', _) => {
                self.part = Part::Manifest;
                BackupMessage::Manifest
            }
            (b'p', _) if body.len() >= 8 => BackupMessage::Progress(body.get_u64()),
            _ => {
                let what = format!("'{}' in a base backup", kind.escape_ascii());
                return Err(self.client.reader().unexpected(what));
            }
        };
        self.ready.push_back(message);
        Ok(())
    }
}
