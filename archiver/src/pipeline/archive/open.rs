//! Opens an [`Archive`]: brings the catalog in step with the repository and checks that nothing is
//! missing.

use std::sync::{Arc, Mutex, atomic::AtomicBool};

use catalog::Catalog;
use repository::{ClusterIdentity, LossRecord, Repository, config::ClusterSettings};
use wal_format::WalIdentity;

use super::{
    super::{histories, holes, losses::Losses, presence, room::Room},
    Archive, Away,
};
use crate::{core::live_cluster::LiveCluster, error::Result, spool::Spool};

impl Archive {
    /// Opens the archive. Refreshes the catalog first, unless the repository is offline (`away`): a
    /// stale catalog may understate what is stored, but never overstates it.
    ///
    /// # Errors
    /// [`Error::Repository`](crate::error::Error::Repository).
    pub fn open(
        settings: ClusterSettings,
        cluster: ClusterIdentity,
        spool: Arc<Spool>,
        repository: Repository,
        catalog: Catalog,
        LiveCluster { status, progress }: LiveCluster,
        away: Option<Away>,
    ) -> Result<Self> {
        let identity = WalIdentity {
            version: cluster.postgresql_major,
            system_identifier: cluster.system_identifier,
            segment_size: cluster.wal_segment_size,
        };
        let system = identity.system_identifier;
        let mut read_at_return = status.facts().repository_returns;
        let mut number = 0;
        let mut start_anew = || status.note(|facts| number = facts.start_anew());
        let loss_record = LossRecord::of(&settings);
        // A record that cannot be read must not keep WAL out of the spool. Until it can be read, no
        // loss counts as accepted.
        let accepted = loss_record.acceptances().unwrap_or_else(|error| {
            tracing::error!(event = "losses_unreadable", %error, "the accepted losses cannot be read");
            0
        });
        let (mut gaps, mut damaged_records) = (Vec::new(), Vec::new());
        let mut losses = Losses::default();
        let mut lost_histories = Vec::new();
        if away.is_none() {
            // Nothing is stored before the place is known to hold the newest state.
            let reader = presence::Reader {
                is_spooled: &holes::is_stored_at_a_start(&spool, &identity, &status),
                is_same_place: holes::is_same_place(&settings, &status),
                missing: &|losses, is_unproved| {
                    if is_unproved {
                        holes::note_unproved(&status, losses);
                    }
                    Ok(())
                },
            };
            let refresh = || presence::refresh(&catalog, &repository, &loss_record, &reader);
            let mut report = refresh()?;
            presence::resume_unproved(&catalog, &repository, &loss_record, &status)?;
            if !repository.is_partly_away() {
                let unproved = status.facts().unproved;
                let found = (&loss_record, unproved);
                presence::record_unproved(&spool, &identity, &catalog, &repository, found)?;
                status.note(|facts| facts.unproved.clear());
            }
            presence::check_position(&spool, &identity, &catalog, &repository, &loss_record)?;
            if histories::put_back(&spool, &repository, &identity)? > 0 {
                report = refresh()?;
            }
            start_anew();
            if status.facts().repository_gone {
                // The place holds the archive again, and the refresh above has read it.
                status.repository_answered("start", "");
                read_at_return += 1;
            }
            lost_histories = report.lost_histories;
            (gaps, damaged_records) = repository.read_gaps(system)?;
            losses = Losses::of(repository.failover_losses(system)?);
        }
        if away.is_some() {
            start_anew();
        }
        let branches = catalog.branches()?;
        if away.is_none() {
            let copies = repository.history_copies(system)?;
            for (branch, history, content) in &branches {
                let is_lost = lost_histories.iter().any(|lost| lost.branch == *branch)
                    || copies.get(branch).is_none_or(|copies| *copies < 2);
                if history.is_some() && is_lost {
                    tracing::warn!(
                        event = "history_put_back", %branch,
                        "a history file is missing in the repository and is stored again"
                    );
                    repository.put_history(system, *branch, content)?;
                }
            }
        }
        let histories = branches.into_iter().map(|(branch, ..)| branch).collect();
        Ok(Self {
            number,
            room: Room::new(&settings, identity.segment_size),
            settings,
            cluster,
            identity,
            spool,
            repository,
            catalog,
            status,
            progress,
            away,
            leaving: Mutex::default(),
            tails: Mutex::default(),
            sealed: Mutex::default(),
            gaps,
            damaged_records,
            losses,
            histories: Mutex::new(histories),
            putting_back: Mutex::default(),
            read_at_return,
            loss_record,
            accepted,
            doubted: AtomicBool::new(false),
            newest_checked: Mutex::default(),
        })
    }
}
