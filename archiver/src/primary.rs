//! A connection to PostgreSQL whose server was identified ([`Source`]).

pub(crate) mod conninfo;
pub mod line;
pub mod synchronous;

use std::time::Duration;

use replication::{self, ConnInfo, ConnectionMode, ReplicationClient, SystemIdentity};
use repository::{ClusterIdentity, Repository};
use wal_format::{Branch, Lsn, PgTimestamp, PgVersion, TimelineHistory, TimelineId};

use self::line::Line;
use crate::{
    blocking::blocking,
    error::{Error, Result},
};

/// Timeout for the server to identify itself after the login. Connecting has its own limit,
/// `connect_timeout`.
const IDENTIFY_TIMEOUT: Duration = Duration::from_secs(20);

/// A connection whose server was identified.
#[derive(Debug)]
pub struct Source {
    pub(crate) client: ReplicationClient,
    pub(crate) system: SystemIdentity,
    pub(crate) identity: ClusterIdentity,
    pub(crate) wal_sender_timeout: Option<Duration>,
    /// The thread that drives the connection, if it is meant for streaming.
    pub(crate) line: Option<Line>,
}

impl Source {
    /// Connects and identifies the server.
    ///
    /// # Errors
    /// [`Error::Replication`]; [`Error::Unsupported`] for a server whose WAL we cannot read.
    pub async fn connect(
        conninfo: &ConnInfo,
        cluster: &wal_format::ClusterName,
    ) -> Result<(Self, String)> {
        let client = ReplicationClient::connect(conninfo, ConnectionMode::Physical).await?;
        tokio::time::timeout(IDENTIFY_TIMEOUT, Self::identify(client, cluster))
            .await
            .map_err(|_| Error::Silent {
                seconds: IDENTIFY_TIMEOUT.as_secs(),
            })?
    }

    /// As [`Source::connect`], but on a thread of its own, for [`Source::stream`].
    ///
    /// # Errors
    /// As [`Source::connect`].
    pub async fn connect_to_stream(
        conninfo: &ConnInfo,
        cluster: &wal_format::ClusterName,
    ) -> Result<(Self, String)> {
        let line = Line::start()?;
        let (conninfo, cluster) = (conninfo.clone(), cluster.clone());
        let connect = async move { Self::connect(&conninfo, &cluster).await };
        let (mut source, version) = line.run(connect).await??;
        source.line = Some(line);
        Ok((source, version))
    }

    async fn identify(
        mut client: ReplicationClient,
        cluster: &wal_format::ClusterName,
    ) -> Result<(Self, String)> {
        let version = client.server_version().clone();
        let major = u16::try_from(version.num / 10_000).unwrap_or(u16::MAX);
        let postgresql_major = PgVersion::try_from(major)?;
        let system = client.identify_system().await?;
        let wal_segment_size = client.wal_segment_size().await?;
        let wal_sender_timeout = parse_duration(&client.show("wal_sender_timeout").await?);
        let identity = ClusterIdentity {
            format_version: 1,
            cluster: cluster.clone(),
            system_identifier: system.system_identifier,
            postgresql_major,
            wal_segment_size,
            created: PgTimestamp::from_jiff(jiff::Timestamp::now()),
        };
        let source = Self {
            client,
            system,
            identity,
            wal_sender_timeout,
            line: None,
        };
        Ok((source, version.text))
    }

    /// The identity of the cluster whose WAL the server sends.
    #[must_use]
    pub fn identity(&self) -> &ClusterIdentity {
        &self.identity
    }

    /// Returns the branch of the server's current timeline, after storing its history file.
    ///
    /// # Errors
    /// [`Error::Replication`], [`Error::History`], [`Error::Repository`].
    pub async fn current_branch(&mut self, repository: &Repository) -> Result<Branch> {
        let current = self.system.timeline;
        if current == TimelineId::FIRST {
            return Ok(Branch::FIRST);
        }
        let content = self.client.timeline_history(current).await?;
        parse_history(current, &content)?;
        let branch = Branch::of_history(current, &content);
        let (repository, system) = (repository.clone(), self.system.system_identifier);
        blocking(move || Ok(repository.put_history(system, branch, &content)?)).await?;
        Ok(branch)
    }

    /// The end of the server's WAL when it was identified.
    #[must_use]
    pub fn flush_lsn(&self) -> Lsn {
        self.system.flush_lsn
    }

    /// The server's connection settings.
    #[must_use]
    pub fn conninfo(&self) -> &ConnInfo {
        self.client.conninfo()
    }

    /// Returns the connection, for a purpose other than streaming.
    #[must_use]
    pub fn into_client(self) -> ReplicationClient {
        self.client
    }
}

pub(crate) fn parse_history(timeline: TimelineId, content: &[u8]) -> Result<TimelineHistory> {
    TimelineHistory::parse(timeline, content).map_err(|source| Error::History { source })
}

/// Reads a duration as `SHOW` prints it: `1min`, `500ms`, `0`.
#[must_use]
pub fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let milliseconds: u64 = match unit {
        "" | "ms" => 1,
        "s" => 1000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(milliseconds).map(Duration::from_millis)
}
