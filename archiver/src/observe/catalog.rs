//! Reads the catalog periodically: the restorable window, the newest backup, lost objects. Nothing
//! here delays WAL. A fact that cannot be read stays unknown.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use status::loss::describe_loss;
use tokio::time::MissedTickBehavior;
use wal_format::{BackupInfo, Lsn, ObjectKey};

use super::{
    current::CurrentArchive,
    window::{Marks, Update},
};
use crate::{
    blocking::blocking,
    core::event::Event,
    error::{Error, Result},
    pipeline::{
        archive::Archive,
        presence::{self, Presence},
    },
    upkeep::outcomes,
};

/// The interval at which the catalog is checked.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// The interval at which the file is read that each backup and outcome of this host changes.
const MARK_INTERVAL: Duration = Duration::from_millis(200);
/// The interval at which the repository's folder is checked to be the same one.
const PLACE_INTERVAL: Duration = Duration::from_secs(1);
/// The number of checks between two listings of the repository's backups, which another host may
/// have taken: one hour. A listing is a billed request in a bucket. A backup taken on this host
/// leaves a file in the spool's directory.
const LOOKS_PER_LISTING: u32 = 720;
/// The number of checks between two listings while there is no backup, or none after a loss, and
/// between two checks of a bucket's objects: one minute.
const LOOKS_PER_LISTING_WAITING: u32 = 12;

/// Updates the restorable window, the newest backup and the spool's size periodically.
pub(super) async fn look(archive: Arc<Archive>, current: Arc<CurrentArchive>) {
    let mut timer = tokio::time::interval(LOOK_INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looks: u32 = 0;
    let mut taken = None;
    let mark = outcomes::mark(archive.settings());
    let marks = Arc::new(Mutex::new(Marks::default()));
    let presence = Arc::new(Mutex::new(Presence::default()));
    loop {
        tokio::select! {
            _ = timer.tick() => {}
            () = changed(&mark, taken.as_deref()) => {}
        }
        let known = std::mem::replace(&mut taken, tokio::fs::read(&mark).await.ok());
        let list = if looks.is_multiple_of(LOOKS_PER_LISTING) || known != taken {
            Listing::Now
        } else if looks.is_multiple_of(LOOKS_PER_LISTING_WAITING) {
            Listing::WhenWaiting
        } else {
            Listing::Never
        };
        looks = looks.wrapping_add(1);
        let (looked, marks) = (Arc::clone(&archive), Arc::clone(&marks));
        let current = Arc::clone(&current);
        let retains = archive.settings().repository.each();
        let retains = retains.iter().any(|place| place.retention.is_some());
        let expires = known != taken || (retains && list == Listing::Now);
        if let Err(error) =
            blocking(move || look_once(&looked, &current, list, expires, &marks)).await
        {
            tracing::debug!(%error, "the window is not known");
        }
        if known != taken
            && let Some(content) = &taken
        {
            // Commands of this host wait for this before they end.
            let seen = repository::outcome_seen(archive.settings());
            if let Err(error) = tokio::fs::write(&seen, content).await {
                tracing::debug!(%error, path = %seen.display(), "commands wait in vain");
            }
        }
        if archive.is_away() {
            continue;
        }
        // [`watch_place`] checks a folder once a second.
        let is_due = archive.costs_requests() && list != Listing::Never;
        let (looked, presence) = (Arc::clone(&archive), Arc::clone(&presence));
        let checked = blocking(move || {
            if is_due {
                presence::look_for_losses(&looked, &presence)
            } else {
                presence::report_losses(&looked);
                Ok(())
            }
        });
        match checked.await {
            Err(Error::Repository(error)) if error.is_gone() || error.is_not_found() => {
                let status = archive.status();
                status.repository_failed("presence", "", &error);
            }
            Err(error) => tracing::debug!(%error, "the presence of the objects is not known"),
            // Only the check of the objects proves that they are back.
            Ok(()) if is_due => archive.status().repository_back("presence"),
            Ok(()) => {}
        }
    }
}

/// Waits until the content of the file at `path` differs from `known`. A backup that has just ended
/// on this host must not be reported as missing until the next check.
async fn changed(path: &Path, known: Option<&[u8]>) {
    loop {
        tokio::time::sleep(MARK_INTERVAL).await;
        if tokio::fs::read(path).await.ok().as_deref() != known {
            return;
        }
    }
}

/// Detects within a second that the repository's folder was replaced or lacks objects, also while
/// nothing is stored. For a bucket, the store requests detect a replacement, and [`look`] checks
/// the objects once a minute, because each request costs money.
pub(super) async fn watch_place(archive: Arc<Archive>) {
    let mut timer = tokio::time::interval(PLACE_INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let presence = Arc::new(Mutex::new(Presence::default()));
    while !archive.is_away() {
        timer.tick().await;
        let (watched, presence) = (Arc::clone(&archive), Arc::clone(&presence));
        let look = move || {
            watched.repository().confirm_free()?;
            if watched.costs_requests() {
                return Ok(());
            }
            presence::look_for_losses(&watched, &presence)
        };
        let status = archive.status();
        match blocking(look).await {
            Err(Error::Repository(error)) if error.is_gone() || error.is_not_found() => {
                status.repository_failed("look", "", &error);
            }
            // For a bucket, success proves nothing, but then this check reported no failure.
            Ok(()) => status.repository_back("look"),
            Err(_) => {}
        }
    }
}

/// Decides whether a check lists the repository's backups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listing {
    Now,
    /// Only if a backup is awaited: the first one, or the one after a loss.
    WhenWaiting,
    Never,
}

fn look_once(
    archive: &Arc<Archive>,
    current: &CurrentArchive,
    list: Listing,
    expires: bool,
    marks: &Mutex<Marks>,
) -> Result<()> {
    let mut used = 0;
    for spool in archive.spooled_branches()? {
        let segments = spool.segments()?;
        used += segments.complete.len() as u64 * spool.segment_size().bytes();
        used += segments.open.map_or(0, |(_, length)| length);
    }
    let limit = rustix::fs::statvfs(archive.settings().spool.as_path())
        .ok()
        .map(|disk| used + disk.f_bavail * disk.f_frsize)
        .into_iter()
        .chain(archive.settings().spool_limit_bytes)
        .min();
    archive.status().note(|facts| {
        facts.spool_used_bytes = used;
        facts.spool_limit_bytes = limit;
    });
    if let Err(error) = archive.record_losses() {
        tracing::debug!(%error, "what a failover lost is not recorded yet");
    }
    let flushed = archive.progress().positions().flushed();
    archive.status().note(|facts| {
        // The stream has continued after the gap, so the gap is closed.
        facts.gap.take_if(|gap| flushed > gap.from_lsn);
    });
    let catalog = archive.catalog();
    if expires && catalog.follow_expired(archive.repository())? {
        archive.refresh()?;
    }
    let mut backups = archive.held_backups()?;
    // Listing a folder costs nothing.
    let folder = archive.settings().repository.url.folder().is_some();
    let is_unreached = archive.status().facts().unreached.is_some();
    let waiting = backups.is_empty() || is_unreached || loss(archive, &backups)?.is_some();
    let asks = match list {
        Listing::Now => true,
        Listing::WhenWaiting => folder || waiting,
        Listing::Never => folder && waiting,
    };
    if asks {
        match list_new_backups(archive, backups.len()) {
            Ok(()) => backups = archive.held_backups()?,
            // The catalog's content is evaluated even while the repository is offline.
            Err(error) if !backups.is_empty() => {
                tracing::debug!(%error, "the repository's backups are not known");
            }
            Err(error) => {
                // Without a listing, it is not known that there is no backup.
                archive.status().note(|facts| facts.looked = false);
                return Err(error);
            }
        }
    }
    if let Some(newest) = backups.last() {
        begin_at_backup(archive, newest)?;
    }
    let mut marks = marks.lock().unwrap_or_else(PoisonError::into_inner);
    // A folder is read every time. A bucket, where each listing has a price, is read as often as
    // for backups.
    if (list == Listing::Now || folder || !marks.has_outcomes())
        && let Err(error) = marks.ask(archive)
    {
        tracing::debug!(%error, "the repository's outcomes are not known");
    }
    if list == Listing::Now
        && let Err(error) = archive.remove_leftover_tails()
    {
        tracing::debug!(%error, "tails whose segment is sealed may stay in the repository");
    }
    let Some(Update {
        window,
        unreached,
        details,
    }) = marks.look(archive, &backups)?
    else {
        return Ok(());
    };
    let last_backup = details.backups.last().cloned();
    let lost = loss(archive, &backups)?;
    let mut is_current = true;
    archive.status().note(|facts| {
        is_current = facts.archive_number == archive.number();
        if !is_current {
            return;
        }
        facts.lost = lost;
        facts.unreached = unreached;
        facts.window = window;
        facts.last_backup = last_backup;
    });
    // Published after the facts, so that a reader who sees a backup in the details also sees the
    // facts that were computed with it.
    if is_current {
        archive.status().looked(archive.number(), details);
        current.set(archive);
    }
    Ok(())
}

/// Moves the start of the positions to the newest backup if the repository's contiguous WAL ends
/// before it. The WAL between the two is missing, and from the backup on nothing needs it. WAL that
/// waits in the spool still counts as expected.
fn begin_at_backup(archive: &Archive, newest: &BackupInfo) -> Result<()> {
    let progress = archive.progress();
    let (branch, known) = {
        let positions = progress.positions();
        (positions.branch(), positions.stored_on(positions.branch()))
    };
    if archive.is_away()
        || newest.branch != branch
        || known == Lsn::ZERO
        || known >= newest.start_lsn
    {
        return Ok(());
    }
    let Some(stored) = archive
        .stored(branch)?
        .filter(|stored| stored.end() > known)
    else {
        return Ok(());
    };
    tracing::warn!(
        event = "hole_left_behind", cluster = %archive.settings().name, backup = %newest.id,
        "the repository lacks WAL from {known} on that base backup {} does not need; the positions begin at that backup",
        newest.id
    );
    progress.on(Event::BackupListed { branch, stored });
    Ok(())
}

/// Refreshes the catalog if the number of backups in the repository is not `known`.
fn list_new_backups(archive: &Archive, known: usize) -> Result<()> {
    let catalog = archive.catalog();
    let system = archive.identity().system_identifier;
    let stored = archive.repository().list(&format!("{system}/backup/"))?;
    let expired = catalog.expired()?;
    let is_info = |key: &ObjectKey| match key {
        ObjectKey::BackupInfo(_, id) => !expired.backups().contains(id),
        _ => false,
    };
    if stored.iter().filter(|(key, _)| is_info(key)).count() != known {
        archive.refresh()?;
    }
    Ok(())
}

/// Returns a description of the first declared loss after which there is no base backup. `None` if
/// there is none.
fn loss(archive: &Archive, backups: &[BackupInfo]) -> Result<Option<String>> {
    let catalog = archive.catalog();
    for gap in archive.gaps() {
        let behind = |backup: &BackupInfo| {
            let later = backup.branch.timeline > gap.branch.timeline;
            later || (backup.branch == gap.branch && backup.start_lsn >= gap.to_lsn)
        };
        let given = catalog.contiguous_end(gap.branch, gap.from_lsn)? >= gap.to_lsn;
        if !given && !backups.iter().any(behind) {
            return Ok(Some(describe_loss(gap)));
        }
    }
    Ok(None)
}
