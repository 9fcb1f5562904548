//! Finds what a cluster's archive has lost and accepts losses, for commands. Reads the daemon's
//! record and the catalog.

use catalog::Catalog;
use repository::{
    ClusterIdentity, Error as StoreError, FoundLoss, Loss, LossRecord, Missing, Repository,
    config::ClusterSettings,
};
use wal_format::{DeclaredGap, Lsn, PgTimestamp};

use crate::error::{Error, Result};

/// The reason in a declared gap.
const REASON: &str = "the repository lost it, and an operator accepted that";

/// Returns what was archived and is missing in the repository, without accepted losses.
///
/// If `must` is false, a record or a catalog that cannot be read is logged and contributes no
/// losses, because a user who cannot read them may run `verify` too.
pub(crate) fn of(
    settings: &ClusterSettings,
    identity: &ClusterIdentity,
    repository: &Repository,
    must: bool,
) -> Result<Missing> {
    let record = LossRecord::of(settings);
    let unknown = |error: &StoreError| {
        tracing::warn!(
            event = "losses_unknown", %error,
            "what this host has archived is not compared with the repository"
        );
    };
    let found = match record.open() {
        Err(error) if !must => {
            unknown(&error);
            return Ok(Missing::default());
        }
        found => found?,
    };
    let missing = match Catalog::missing(&settings.catalog, identity, repository) {
        Err(
            error @ (StoreError::Catalog { .. }
            | StoreError::CatalogEntry { .. }
            | StoreError::CatalogLocked { .. }
            | StoreError::CatalogMismatch { .. }),
        ) if !must => {
            unknown(&error);
            Missing::default()
        }
        missing => missing?,
    };
    if repository.is_partly_away() {
        // A place that is away may hold the missing objects.
        if must {
            return Err(Error::Usage {
                message: format!(
                    "one of the repositories {} does not answer, and it may hold what is missing: accept a loss when \
                     all of them answer",
                    settings.repository
                ),
            });
        }
        return Ok(Missing::default());
    }
    let mut missing = record.without_accepted(&missing)?;
    for FoundLoss { loss, .. } in found {
        let is_named = missing.losses.iter().any(|named| named.covers(&loss));
        if !is_named && lacks_one(repository, &loss)? {
            missing.losses.push(loss);
        }
    }
    Ok(missing)
}

/// Returns true if an object of a recorded loss is still missing.
fn lacks_one(repository: &Repository, loss: &Loss) -> Result<bool> {
    if repository.holds_one_of(loss.replaced_by())? {
        return Ok(false);
    }
    for key in loss.keys() {
        if repository.head(&key)?.is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Declares the WAL of these losses lost, and records all of these losses as accepted.
pub(crate) fn accept(
    settings: &ClusterSettings,
    identity: &ClusterIdentity,
    repository: &Repository,
    losses: &[Loss],
) -> Result<()> {
    let record = LossRecord::of(settings);
    record.check_version()?;
    let declared = PgTimestamp::from_jiff(jiff::Timestamp::now());
    for loss in losses {
        let Loss::Wal {
            branch,
            from_lsn,
            to_lsn,
            ..
        } = loss
        else {
            continue;
        };
        let catalog = Catalog::open_read_only(&settings.catalog, identity);
        let before = catalog.and_then(|catalog| catalog.ranges(*branch, Lsn::ZERO, *from_lsn));
        let before = before.unwrap_or_default();
        let gap = DeclaredGap {
            branch: *branch,
            from_lsn: *from_lsn,
            to_lsn: *to_lsn,
            declared,
            last_commit: before.iter().filter_map(|range| range.max_time).max(),
            reason: REASON.to_owned(),
        };
        repository.put_gap(identity.system_identifier, &gap)?;
    }
    // The daemon polls this record and continues when it finds the losses there.
    Ok(record.accept(losses)?)
}
