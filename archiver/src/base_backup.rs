//! Takes a base backup: tar streams -> slices -> compressed objects, checked against PostgreSQL's
//! own manifest.
//!
//! Invariant: a backup is listed (`backup.json` is stored, last) only if the server reported no
//! error to the end, every file matches the manifest, and the WAL up to the stop LSN is in the
//! repository. After an earlier failure the slices do not count as a backup and are removed.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use replication::{
    BackupMessage, BaseBackupOptions, BaseBackupStream, ConnInfo, ConnectionMode, ReplicationClient,
};
use repository::outcome_name;
use repository::{ClusterIdentity, Repository, config::ClusterSettings};
use sha2::{Digest, Sha256};
use tokio::{sync::Semaphore, task::JoinSet};
use wal_format::{
    BackupId, BackupInfo, BackupKind, BackupLabel, BackupManifest, BackupSlice, Branch, Lsn,
    ObjectKey, PgTimestamp, Tablespace, TimelineId, backup::BACKUP_FORMAT_VERSION,
    layout::BackupArchive,
};

use crate::{
    blocking::blocking,
    core::shutdown::Shutdown,
    error::{Error, Result},
    primary::{Source, conninfo},
    upkeep::outcomes,
};

mod archived;
mod damaged_pages;
pub mod error;
mod exclusive;
mod manifest;
mod place;
mod slicer;
mod wait;

pub(crate) use crate::upkeep::outcomes::record_failed_backup as record_failure;
pub(crate) use error::BaseBackupError;
use error::malformed;
use exclusive::Exclusive;
use slicer::{RawSlice, Slicer};

/// The number of slices that are compressed and stored at the same time. Each one's raw and
/// compressed bytes are in memory, at most 32 MiB.
const SLICES_IN_FLIGHT: usize = 3;
/// The time for which the backup waits for its WAL to arrive in the repository.
const WAL_PATIENCE: Duration = Duration::from_secs(600);

/// The time for which the backup of a standby waits until the standby has a restartpoint on the
/// timeline that it follows, and the interval at which it tries.
const RESTARTPOINT_PATIENCE: Duration = Duration::from_secs(600);
const RESTARTPOINT_POLL: Duration = Duration::from_secs(2);
/// The interval at which a backup that waits for another one tries to begin.
const BUSY_POLL: Duration = Duration::from_secs(1);

/// The choice of what to do while another base backup of the server runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhenBusy {
    /// Wait for its end, then begin.
    Wait,
    /// Return [`BaseBackupError::AlreadyRuns`]: afterwards, no further backup may be needed.
    GiveUp,
}

/// The progress of a base backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The server performs a checkpoint first.
    Checkpoint,
    /// The standby's last restartpoint is on a timeline that it has left.
    WaitingForRestartpoint,
    /// Another base backup of the server runs. Reported once for each attempt to begin.
    WaitingForOtherBackup,
    /// Nobody is known to archive the server's WAL yet.
    WaitingForArchiver,
    /// The data is being read.
    Copying {
        /// The number of raw bytes read.
        done: u64,
        /// The approximate total number of raw bytes.
        total: u64,
    },
    /// Everything is stored except the WAL up to this LSN.
    WaitingForWal(Lsn),
    /// The WAL up to the stop LSN is still missing after the time in which a running archiver
    /// stores it.
    WalIsLate {
        /// The end of the required WAL.
        stop_lsn: Lsn,
        /// The total time, in seconds, after which the backup fails.
        seconds_max: u64,
    },
}

/// Takes a full base backup and waits until it can be restored. The result is recorded in the
/// repository. `stop` ends it.
///
/// # Errors
/// The error that stopped the backup. The backup is then not listed.
pub async fn take(
    settings: &ClusterSettings,
    label: &str,
    progress: &(dyn Fn(Progress) + Sync),
    stop: Shutdown,
) -> Result<BackupInfo> {
    let began = jiff::Timestamp::now();
    let taken = attempt(settings, label, WhenBusy::Wait, progress, stop).await;
    if let Err(error) = &taken
        && !is_of_wrong_place(error)
    {
        record_failure(settings, began, &error.to_string()).await;
    }
    taken
}

/// Returns true if the place is not the repository or holds an older state of it. Nothing is
/// written there, not even the failure.
pub(crate) fn is_of_wrong_place(error: &Error) -> bool {
    matches!(error, Error::Repository(error) if error.is_gone())
}

/// As [`take`], but does not record a failure: the caller retries, and records each distinct
/// failure once.
///
/// # Errors
/// The error that stopped the backup. The backup is then not listed.
pub(crate) async fn attempt(
    settings: &ClusterSettings,
    label: &str,
    when_busy: WhenBusy,
    progress: &(dyn Fn(Progress) + Sync),
    mut stop: Shutdown,
) -> Result<BackupInfo> {
    let (began, time) = (Instant::now(), jiff::Timestamp::now());
    loop {
        match Box::pin(attempt_once(settings, label, progress, &stop)).await {
            Err(Error::BaseBackup(BaseBackupError::OldRestartpoint { .. }))
                if began.elapsed() < RESTARTPOINT_PATIENCE =>
            {
                progress(Progress::WaitingForRestartpoint);
                if !stop.sleep(RESTARTPOINT_POLL).await {
                    return Err(BaseBackupError::Interrupted.into());
                }
            }
            Err(Error::BaseBackup(BaseBackupError::AlreadyRuns { .. }))
                if when_busy == WhenBusy::Wait =>
            {
                progress(Progress::WaitingForOtherBackup);
                if !stop.sleep(BUSY_POLL).await {
                    return Err(BaseBackupError::Interrupted.into());
                }
            }
            Ok(info) => {
                outcomes::record_backup(settings, time, &info).await;
                return Ok(info);
            }
            failed => return failed,
        }
    }
}

async fn attempt_once(
    settings: &ClusterSettings,
    label: &str,
    progress: &(dyn Fn(Progress) + Sync),
    stop: &Shutdown,
) -> Result<BackupInfo> {
    let conninfo = conninfo::of_cluster(settings)?;
    let connected = Source::connect(&conninfo, &settings.name).await?;
    let exclusive = Exclusive::take(connected.0.conninfo(), &settings.name).await;
    let exclusive = exclusive.map_err(|holder| BaseBackupError::AlreadyRuns { holder })?;
    let attempted = take_once(settings, label, progress, stop, connected).await;
    exclusive.release().await;
    attempted
}

async fn take_once(
    settings: &ClusterSettings,
    label: &str,
    progress: &(dyn Fn(Progress) + Sync),
    stop: &Shutdown,
    (mut source, server_version): (Source, String),
) -> Result<BackupInfo> {
    let conninfo = source.conninfo().clone();
    let repository = {
        let settings = settings.clone();
        blocking(move || Ok(Repository::open_known(&settings)?)).await?
    };
    let identity = source.identity().clone();
    let identity = {
        let repository = repository.clone();
        blocking(move || Ok(repository.claim(&identity)?)).await?
    };
    let check_state = || {
        let (settings, repository, identity) =
            (settings.clone(), repository.clone(), identity.clone());
        blocking(move || place::refuse_older_state(&settings, &identity, &repository))
    };
    check_state().await?;
    let branch = source.current_branch(&repository).await?;
    let archived = archived::Watch {
        settings,
        conninfo: &conninfo,
        repository: &repository,
        identity: &identity,
        branch,
        flush_lsn: source.flush_lsn(),
    };
    archived.wait(progress, stop.clone()).await?;
    let clock_offset_micros = clock_offset(&conninfo).await.unwrap_or_else(|error| {
        tracing::debug!(%error, "the server's clock is not known; the backup has this host's times");
        0
    });
    let backup = Taking {
        repository: repository.clone(),
        identity: identity.clone(),
        branch,
        id: new_id()?,
        label: label.to_owned(),
        server_version,
        level: settings.compression_level,
        max_rate_kib: settings
            .backup_rate_limit
            .and_then(|bytes| u32::try_from(bytes >> 10).ok()),
        clock_offset_micros,
        stop: stop.clone(),
    };
    let outcome = match backup.run(source, progress).await {
        // The place may have been exchanged for an older copy during the backup.
        Ok(info) => check_state().await.map(|()| info),
        failed => failed,
    };
    match &outcome {
        Err(_) => backup.discard().await,
        Ok(info) => outcomes::tell_the_daemon(settings, &info.id),
    }
    outcome
}

/// Returns a unique name for a backup, made from the current time.
fn new_id() -> Result<BackupId> {
    outcome_name(jiff::Timestamp::now())
        .ok_or_else(|| malformed("the clock gives no year of four digits").into())
}

/// A backup in progress.
#[derive(Clone, Debug)]
struct Taking {
    repository: Repository,
    identity: ClusterIdentity,
    branch: Branch,
    id: BackupId,
    label: String,
    server_version: String,
    level: i32,
    /// The rate at which the server sends, in KiB per second.
    max_rate_kib: Option<u32>,
    /// The server's clock minus this host's, in microseconds. 0 if it is not known.
    clock_offset_micros: i64,
    /// Ends the backup.
    stop: Shutdown,
}

/// The parts of the stream received so far.
struct Received {
    started: PgTimestamp,
    start: Option<(Lsn, TimelineId)>,
    stop: Option<(Lsn, TimelineId)>,
    tablespaces: Vec<Tablespace>,
    total_bytes: u64,
    done_bytes: u64,
    slicer: Slicer,
    manifest: Vec<u8>,
}

/// Returns the server's clock minus this host's, in microseconds. The target time of a restore
/// follows the server's clock, so the times of a backup follow it too.
async fn clock_offset(conninfo: &ConnInfo) -> replication::Result<i64> {
    const SQL: &str =
        "SELECT (extract(epoch FROM pg_catalog.clock_timestamp()) * 1000000)::bigint::text";
    let mut client = ReplicationClient::connect(conninfo, ConnectionMode::Sql).await?;
    let rows = client.query(SQL).await?;
    let ours = jiff::Timestamp::now().as_microsecond();
    client.close().await;
    let theirs = rows.first().and_then(|row| row.first()).cloned().flatten();
    let theirs = theirs.and_then(|text| text.parse::<i64>().ok());
    Ok(theirs.map_or(0, |theirs| theirs.saturating_sub(ours)))
}

impl Taking {
    /// Returns the present time by the server's clock, or by this host's clock if the difference is
    /// not known.
    fn server_time(&self) -> PgTimestamp {
        let ours = PgTimestamp::from_jiff(jiff::Timestamp::now());
        PgTimestamp(ours.0.saturating_add(self.clock_offset_micros))
    }

    async fn run(
        &self,
        source: Source,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<BackupInfo> {
        progress(Progress::Checkpoint);
        let options = BaseBackupOptions {
            label: format!("tidemark {}", self.id),
            fast_checkpoint: true,
            max_rate: self.max_rate_kib,
        };
        let conninfo = source.conninfo().clone();
        let mut stop = self.stop.clone();
        let begun = stop.until(source.into_client().base_backup(&options)).await;
        let mut stream = begun.ok_or(BaseBackupError::Interrupted)??;
        let mut received = Received {
            started: self.server_time(),
            start: None,
            stop: None,
            tablespaces: Vec::new(),
            total_bytes: 0,
            done_bytes: 0,
            slicer: Slicer::default(),
            manifest: Vec::new(),
        };
        let slices = self.receive(&mut stream, &mut received, progress).await;
        let warnings = stream.warnings().to_vec();
        drop(stream);
        let slices = match slices {
            Err(Error::Replication(error)) if error.data_corrupted().is_some() => {
                let pages = Box::pin(damaged_pages::describe(&conninfo, &error, &warnings)).await;
                return Err(BaseBackupError::DamagedPages { pages }.into());
            }
            slices => slices?,
        };
        manifest::check(&received.manifest, received.slicer.files())?;
        let (start_lsn, timeline) = received.start.ok_or_else(|| malformed("it has no start"))?;
        let (stop_lsn, _) = received.stop.ok_or_else(|| malformed("it has no stop"))?;
        let label_content = received.slicer.backup_label();
        let label =
            BackupLabel::parse(label_content).map_err(|error| malformed(error.to_string()))?;
        let sum = |content: &[u8]| hex::encode(Sha256::digest(content));
        let backup_label_sha256 = Some(sum(label_content));
        let map = received.slicer.tablespace_map();
        let tablespace_map_sha256 = map.map(sum);
        if label.start_lsn != start_lsn || timeline != self.branch.timeline {
            return Err(malformed("backup_label and the stream disagree about the start").into());
        }
        let manifest = received.manifest;
        let parsed =
            BackupManifest::parse(&manifest).map_err(|error| malformed(error.to_string()))?;
        let manifest_sha256 = hex::encode(Sha256::digest(&manifest));
        let manifest_bytes = manifest.len() as u64;
        self.put(self.key_of_manifest(), manifest).await?;
        progress(Progress::WaitingForWal(stop_lsn));
        wait::for_wal(
            &self.repository,
            &self.identity,
            self.branch,
            start_lsn,
            stop_lsn,
            progress,
            &mut stop,
        )
        .await?;
        let info = BackupInfo {
            format_version: BACKUP_FORMAT_VERSION,
            id: self.id.clone(),
            label: self.label.clone(),
            kind: BackupKind::Full,
            system_identifier: self.identity.system_identifier,
            postgresql_major: self.identity.postgresql_major,
            server_version: self.server_version.clone(),
            branch: self.branch,
            start_lsn,
            checkpoint_lsn: label.checkpoint_lsn,
            stop_lsn,
            started: received.started,
            finished: self.server_time(),
            from_standby: label.from_standby,
            tablespaces: received.tablespaces,
            raw_bytes: slices.iter().map(|slice| slice.raw_bytes).sum(),
            stored_bytes: slices.iter().map(|slice| slice.stored_bytes).sum(),
            slices,
            manifest_sha256,
            manifest_bytes,
            backup_label_sha256,
            tablespace_map_sha256,
            warnings,
        };
        // Performs the comparisons of a restore, so that a backup that a restore would refuse is
        // not listed.
        info.check_label(
            received.slicer.backup_label(),
            received.slicer.tablespace_map(),
        )
        .and_then(|()| info.check_manifest(&parsed, manifest_bytes))
        .map_err(malformed)?;
        info.check().map_err(|error| malformed(error.to_string()))?;
        let json = info
            .to_json()
            .map_err(|error| malformed(error.to_string()))?;
        self.put(info.key(), json).await?;
        // A bucket that was emptied or replaced during the backup would hold only a part of it.
        let (taking, stored) = (self.clone(), info.clone());
        blocking(move || taking.check_stored(&stored)).await?;
        Ok(info)
    }

    /// Reads the stream to its end. No slice is being stored any more when this returns.
    async fn receive(
        &self,
        stream: &mut BaseBackupStream,
        received: &mut Received,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Vec<BackupSlice>> {
        let mut storing = JoinSet::new();
        let slices = self
            .receive_slices(stream, received, progress, &mut storing)
            .await;
        // After a failure `discard` removes what it lists, so nothing may be stored after that.
        while storing.join_next().await.is_some() {}
        slices
    }

    async fn receive_slices(
        &self,
        stream: &mut BaseBackupStream,
        received: &mut Received,
        progress: &(dyn Fn(Progress) + Sync),
        storing: &mut JoinSet<Result<(usize, BackupSlice)>>,
    ) -> Result<Vec<BackupSlice>> {
        let room = Arc::new(Semaphore::new(SLICES_IN_FLIGHT));
        let mut stored: Vec<(usize, BackupSlice)> = Vec::new();
        let mut number = 0;
        let mut stop = self.stop.clone();
        loop {
            let message = stop.until(stream.next()).await;
            let message = message.ok_or(BaseBackupError::Interrupted)??;
            let done = message == BackupMessage::Done;
            received.take(message, progress)?;
            let current = self.branch.timeline;
            if let Some((_, start)) = received.start.filter(|(_, start)| *start < current) {
                return Err(BaseBackupError::OldRestartpoint { start, current }.into());
            }
            while let Some(slice) = received.slicer.ready() {
                let permit = Arc::clone(&room)
                    .acquire_owned()
                    .await
                    .map_err(|error| malformed(error.to_string()))?;
                let taking = self.clone();
                let order = number;
                number += 1;
                storing.spawn_blocking(move || {
                    let stored = taking.store(slice);
                    drop(permit);
                    stored.map(|slice| (order, slice))
                });
                while let Some(finished) = storing.try_join_next() {
                    stored.push(joined(finished)?);
                }
            }
            if done {
                break;
            }
        }
        while let Some(finished) = storing.join_next().await {
            stored.push(joined(finished)?);
        }
        stored.sort_by_key(|(order, _)| *order);
        Ok(stored.into_iter().map(|(_, slice)| slice).collect())
    }

    fn store(&self, slice: RawSlice) -> Result<BackupSlice> {
        let compressed = zstd::bulk::compress(&slice.raw, self.level)
            .map_err(Error::io("compress a slice of", self.id.as_str()))?;
        let archive = slice.archive;
        let system = self.identity.system_identifier;
        let key = ObjectKey::BackupSlice(system, self.id.clone(), archive, slice.number);
        self.repository.put(&key, &compressed)?;
        Ok(BackupSlice {
            archive,
            number: slice.number,
            raw_bytes: slice.raw.len() as u64,
            stored_bytes: compressed.len() as u64,
            sha256: hex::encode(Sha256::digest(&compressed)),
            continues: slice.continues,
        })
    }

    fn key_of_manifest(&self) -> ObjectKey {
        ObjectKey::BackupManifest(self.identity.system_identifier, self.id.clone())
    }

    async fn put(&self, key: ObjectKey, body: Vec<u8>) -> Result<()> {
        let repository = self.repository.clone();
        blocking(move || Ok(repository.put(&key, &body).map(drop)?)).await
    }

    /// Removes the objects of a failed backup. An object that cannot be removed is harmless,
    /// because the backup is not listed.
    async fn discard(&self) {
        let taking = self.clone();
        let removed = blocking(move || {
            let system = taking.identity.system_identifier;
            let prefix = format!("{system}/backup/{}/", taking.id);
            for (key, _) in taking.repository.list(&prefix)? {
                taking.repository.delete(&key)?;
            }
            Ok(())
        });
        if let Err(error) = removed.await {
            tracing::warn!(%error, backup = %self.id, "the slices of a failed backup are left; they are not listed");
        }
    }
}

fn joined(
    finished: std::result::Result<Result<(usize, BackupSlice)>, tokio::task::JoinError>,
) -> Result<(usize, BackupSlice)> {
    finished.unwrap_or_else(|error| {
        Err(Error::ThreadStopped {
            name: "base backup",
            reason: error.to_string(),
        })
    })
}

impl Received {
    fn take(&mut self, message: BackupMessage, progress: &(dyn Fn(Progress) + Sync)) -> Result<()> {
        match message {
            BackupMessage::Start {
                lsn,
                timeline,
                tablespaces,
            } => {
                self.start = Some((lsn, timeline));
                let kib: u64 = tablespaces.iter().filter_map(|space| space.size_kib).sum();
                self.total_bytes = kib.saturating_mul(1024);
                let named = tablespaces.into_iter().filter_map(|space| {
                    Some(Tablespace {
                        oid: space.oid?,
                        location: space.location?,
                    })
                });
                self.tablespaces = named.collect();
            }
            BackupMessage::Archive { tablespace, .. } => {
                let archive = tablespace.map_or(BackupArchive::Base, BackupArchive::Tablespace);
                self.slicer.begin(archive)?;
            }
            BackupMessage::Data(bytes) => {
                self.done_bytes = self.done_bytes.saturating_add(bytes.len() as u64);
                self.slicer.push(&bytes)?;
                progress(Progress::Copying {
                    done: self.done_bytes,
                    total: self.total_bytes,
                });
            }
            BackupMessage::Manifest => self.slicer.finish()?,
            BackupMessage::ManifestData(bytes) => self.manifest.extend_from_slice(&bytes),
            BackupMessage::Stop { lsn, timeline } => self.stop = Some((lsn, timeline)),
            BackupMessage::Progress(_) | BackupMessage::Done => {}
        }
        Ok(())
    }
}
