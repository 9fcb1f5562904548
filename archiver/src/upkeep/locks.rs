//! Extends the locks of the objects that kept backups need, in buckets with Object Lock: in the
//! daemon (`lock_days`), and for `wal-archiver lock extend`.
//!
//! A restore needs every object of its path, so a backup is locked together with all WAL from its
//! start on, every timeline's history, and the keys. The locks of older objects are left to expire.
//! Invariant: a lock is only ever extended.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use repository::{
    KnownLocks, LockReport, Repository,
    config::{ClusterSettings, LockSettings, RepositoryPlace},
    extend_locks,
    store::LockSpan,
};
use status::cluster_status::ClusterStatus;
use wal_format::{BackupId, BackupInfo, Lsn, ObjectKey, SegmentSize};

use crate::{
    blocking::blocking,
    error::{Error, Result},
};

/// The pause before the first run. It is short, because locks may have expired while the daemon was
/// not running.
const FIRST_LOOK: Duration = Duration::from_secs(5);
/// The longest pause between runs. It is shorter if locks are short.
const LOOK_MAX: Duration = Duration::from_secs(86_400);
/// The pause after a run that failed.
const RETRY: Duration = Duration::from_secs(300);

/// The result for one repository.
pub(crate) struct Locked {
    /// The repository.
    pub(crate) place: RepositoryPlace,
    /// `None` for a folder, which has no locks.
    pub(crate) report: Option<LockReport>,
}

/// The result for the repositories of a cluster.
pub(crate) struct Extended {
    pub(crate) places: Vec<Locked>,
    /// A backup whose `backup.json` cannot be read. Its first WAL is not known, so all WAL was
    /// locked.
    pub(crate) damaged: Option<repository::Error>,
}

/// Locks the objects that the backups of a cluster need, from backup `oldest` on.
///
/// # Errors
/// [`Error::Usage`] when there is no backup to lock, [`Error::Repository`].
pub(crate) fn extend(
    settings: &ClusterSettings,
    oldest: Option<&BackupId>,
    span: LockSpan,
    known: &mut KnownLocks,
    dry_run: bool,
) -> Result<Extended> {
    let usage = |message: String| Error::Usage { message };
    let repository = Repository::open_known(settings)?;
    let Some(identity) = repository.identity()? else {
        return Err(usage(format!(
            "{} holds nothing of cluster {}; check --repository and --cluster",
            settings.repository, settings.name
        )));
    };
    let (mut backups, mut unread) = (Vec::new(), Vec::new());
    let mut damaged = None;
    let expired = repository.expired(identity.system_identifier)?;
    for (key, _) in repository.list(&format!("{}/backup/", identity.system_identifier))? {
        let hidden = expired.hides(&key, identity.wal_segment_size);
        let ObjectKey::BackupInfo(_, id) = &key else {
            continue;
        };
        if hidden {
            continue;
        }
        let read = repository.get(&key).and_then(|content| {
            BackupInfo::parse_of(&key, &content).map_err(|error| repository::Error::Damaged {
                key: key.to_string(),
                url: repository.url(),
                problem: format!("{error}; run `wal-archiver verify`"),
            })
        });
        match read {
            Ok(backup) => backups.push(backup),
            Err(error @ repository::Error::Damaged { .. }) => {
                unread.push(id.clone());
                damaged.get_or_insert(error);
            }
            Err(error) => return Err(error.into()),
        }
    }
    let kept = Kept::new(&backups, unread, oldest, identity.wal_segment_size).ok_or_else(|| {
        usage(match oldest {
            Some(id) => format!("cluster {} has no backup {id}", settings.name),
            None => format!(
                "cluster {} has no backup yet: nothing to keep",
                settings.name
            ),
        })
    })?;
    let needed = |key: &ObjectKey| kept.needs(key);
    let mut all = Vec::new();
    for place in settings.repository.each() {
        let report = match place.url.folder() {
            Some(_) => None,
            None => Some(extend_locks(
                &place,
                &settings.name,
                span,
                &needed,
                known,
                dry_run,
            )?),
        };
        all.push(Locked { place, report });
    }
    Ok(Extended {
        places: all,
        damaged,
    })
}

/// Extends the locks periodically while the daemon runs. Returns at once if `lock_days` is not set.
pub(crate) async fn keep(settings: ClusterSettings, status: Arc<ClusterStatus>) {
    let Some(lock) = settings.lock else {
        return;
    };
    let known = Arc::new(Mutex::new(KnownLocks::default()));
    let mut pause = FIRST_LOOK;
    let mut was_locked = false;
    loop {
        tokio::time::sleep(pause).await;
        let (of_look, known) = (settings.clone(), Arc::clone(&known));
        let looked = blocking(move || {
            let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
            extend(&of_look, None, span(lock)?, &mut known, false)
        })
        .await;
        let problem = match looked {
            Ok(Extended { places, damaged }) => {
                was_locked = true;
                for Locked { place, report } in &places {
                    let extended = report.map_or(0, |report| report.extended);
                    tracing::info!(cluster = %settings.name, %place, extended, "locks were looked at");
                }
                let none = places.iter().all(|locked| locked.report.is_none());
                let none =
                    none.then(|| "lock_days is set, but no repository is a bucket".to_owned());
                none.or_else(|| damaged.map(|error| error.to_string()))
            }
            // Before the first lock, the cluster or its first backup may not exist yet. After it,
            // the arm below reports that they are gone.
            Err(Error::Usage { message }) if !was_locked => {
                tracing::info!(cluster = %settings.name, message, "nothing is locked yet");
                None
            }
            Err(error) => Some(error.to_string()),
        };
        pause = match &problem {
            Some(problem) => {
                tracing::error!(cluster = %settings.name, problem, "locks could not be extended");
                RETRY
            }
            None => (lock.lasts() / 8).min(LOOK_MAX),
        };
        status.note(|facts| facts.lock_error = problem);
    }
}

/// Returns the times of a lock that is set now. A lock is extended only when less than half of its
/// time is left, because each extension costs a request.
fn span(lock: LockSettings) -> Result<LockSpan> {
    let later = |seconds: u64| {
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        Timestamp::now()
            .checked_add(jiff::SignedDuration::from_secs(seconds))
            .map_err(|error| Error::Usage {
                message: format!("lock_days: {error}"),
            })
    };
    let lasts = lock.lasts().as_secs();
    Ok(LockSpan {
        at_least: later(lasts / 2)?,
        until: later(lasts)?,
        mode: lock.mode,
    })
}

/// The objects to lock: the backups from one on, and the WAL from the first of their start LSNs.
struct Kept {
    ids: Vec<BackupId>,
    from: Lsn,
    size: SegmentSize,
}

impl Kept {
    /// Returns `None` when there is no backup, or not the oldest one to keep. The backups in
    /// `unread` are kept with all WAL, because nothing tells where they begin.
    fn new(
        backups: &[BackupInfo],
        unread: Vec<BackupId>,
        oldest: Option<&BackupId>,
        size: SegmentSize,
    ) -> Option<Self> {
        let first = match oldest {
            Some(id) if unread.contains(id) => None,
            Some(id) => Some(backups.iter().find(|backup| backup.id == *id)?.started),
            None => None,
        };
        let kept = || {
            let kept = backups.iter();
            kept.filter(|backup| first.is_none_or(|first| backup.started >= first))
        };
        let from = match unread.is_empty() {
            true => kept().map(|backup| backup.start_lsn).min()?,
            false => Lsn::ZERO,
        };
        let ids = kept().map(|backup| backup.id.clone());
        Some(Self {
            ids: ids.chain(unread).collect(),
            from,
            size,
        })
    }

    fn needs(&self, key: &ObjectKey) -> bool {
        match key {
            ObjectKey::BackupInfo(_, id)
            | ObjectKey::BackupManifest(_, id)
            | ObjectKey::BackupSlice(_, id, ..) => self.ids.contains(id),
            ObjectKey::Segment(_, _, name) => name
                .segment(self.size)
                .is_none_or(|segment| segment.end_lsn(self.size) > self.from),
            // A tail is removed when its segment is sealed. A lock would only keep an unneeded
            // object.
            ObjectKey::Tail(..) | ObjectKey::Outcome(..) => false,
            ObjectKey::BackupNote(..)
            | ObjectKey::Epoch(_)
            | ObjectKey::EpochCopy(_)
            | ObjectKey::Expired(..)
            | ObjectKey::Gap(..)
            | ObjectKey::FailoverLoss(..)
            | ObjectKey::History(..)
            | ObjectKey::HistoryCopy(..) => true,
        }
    }
}
