//! The options that name a target, and the plan for it.

use clap::Args;
use jiff::Timestamp;
use wal_format::{BackupId, BackupInfo, Lsn};

use crate::{
    Error, RestorePlan, Result, expired,
    inventory::{Archive, Inventory},
    plan::{Wishes, estimate, left_out, name_elsewhere, plan_restore},
    space, stop_wal,
    tablespaces::{self, Directories},
    target::{RecoveryTarget, is_relative, parse_time, parse_xid},
};

/// The target of a restore, and the choice of backup and timeline.
#[derive(Debug, Default, Args)]
pub(super) struct TargetArgs {
    /// Stop before the first commit after this time.
    #[arg(long, value_name = "TIME", group = "target")]
    target_time: Option<String>,
    /// Stop after the first record at or after this position.
    #[arg(long, value_name = "LSN", group = "target")]
    target_lsn: Option<Lsn>,
    /// Stop after the end of this transaction: its number, also in hexadecimal or with its epoch.
    #[arg(long, value_name = "XID", group = "target", value_parser = parse_xid)]
    target_xid: Option<u64>,
    /// Stop after the restore point of this name.
    #[arg(long, value_name = "NAME", group = "target")]
    target_name: Option<String>,
    /// The restore point to use if several have the name: the LSN that `list` prints, or the one
    /// that `pg_create_restore_point()` returned.
    #[arg(long, value_name = "LSN", requires = "target_name")]
    at_lsn: Option<Lsn>,
    /// Stop as soon as the backup is consistent.
    #[arg(long, group = "target")]
    target_immediate: bool,
    /// Follow this timeline. Default: the newest.
    #[arg(long, value_name = "TIMELINE")]
    target_timeline: Option<String>,
    /// Stop just before the target instead of just after it.
    #[arg(long)]
    target_exclusive: bool,
    /// Zone of a target time without an offset, for example Europe/Berlin.
    #[arg(long, value_name = "ZONE")]
    pub(super) time_zone: Option<String>,
    /// Use this backup.
    #[arg(long, value_name = "ID")]
    backup: Option<BackupId>,
}

impl TargetArgs {
    /// Returns true if the options name no target.
    pub(super) fn is_latest(&self) -> bool {
        self.target_time.is_none()
            && self.target_lsn.is_none()
            && self.target_xid.is_none()
            && self.target_name.is_none()
            && !self.target_immediate
    }

    /// Returns the options as text; `None` if they name no target.
    pub(super) fn shown(&self) -> Option<String> {
        let text = |flag: &str, value: String| Some(format!("{flag} {value}"));
        let mut shown = if let Some(time) = &self.target_time {
            text("time", time.clone())
        } else if let Some(lsn) = self.target_lsn {
            text("LSN", lsn.to_string())
        } else if let Some(xid) = self.target_xid {
            text("transaction", xid.to_string())
        } else if let Some(name) = &self.target_name {
            text("restore point", name.clone())
        } else {
            self.target_immediate
                .then(|| "consistency of the backup".to_owned())
        };
        if let Some(shown) = shown.as_mut().filter(|_| self.target_exclusive) {
            shown.push_str(", exclusive");
        }
        shown
    }

    /// Returns the target that the options name.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub(super) fn recovery_target(&self, now: Timestamp) -> Result<RecoveryTarget> {
        let inclusive = !self.target_exclusive;
        if let Some(text) = &self.target_time {
            let time = parse_time(text, self.time_zone.as_deref(), now)?;
            return Ok(RecoveryTarget::Time {
                time,
                inclusive,
                relative: is_relative(text),
            });
        }
        if let Some(lsn) = self.target_lsn {
            return Ok(RecoveryTarget::Lsn { lsn, inclusive });
        }
        if let Some(xid) = self.target_xid {
            return Ok(RecoveryTarget::Xid { xid, inclusive });
        }
        if self.target_exclusive {
            return Err(Error::usage(
                "--target-exclusive goes with --target-time, --target-lsn or --target-xid",
            ));
        }
        Ok(match &self.target_name {
            Some(name) => RecoveryTarget::Name {
                name: name.clone(),
                at_lsn: self.at_lsn,
            },
            None if self.target_immediate => RecoveryTarget::Immediate,
            None => RecoveryTarget::Latest,
        })
    }
}

/// Plans with the newest backup that is not known to be damaged.
pub(super) fn plan(
    archive: &mut Archive,
    target: &RecoveryTarget,
    chosen: &TargetArgs,
    force: bool,
) -> Result<RestorePlan> {
    let wishes = Wishes {
        backup: chosen.backup.clone(),
        timeline: chosen.target_timeline.clone(),
    };
    if let Some(id) = &wishes.backup {
        archive.refuse_damaged(id)?;
        expired::refuse_backup(archive, id)?;
        if force {
            archive.trust_backup(id);
        }
    }
    if *target == RecoveryTarget::Latest
        && !force
        && let Some(refusal) = archive.older_state()
    {
        return Err(refusal.into());
    }
    loop {
        let mut plan = match plan_restore(archive, target, &wishes) {
            Ok(plan) => plan,
            Err(error) => {
                let error = name_elsewhere(archive, target, &wishes, archive.explain(error))?;
                return Err(expired::explain(archive, target, error));
            }
        };
        match archive.check_backup(&plan.backup) {
            Ok(()) => {
                plan.left_out = left_out(archive, target, &wishes, &plan)?;
                return Ok(plan);
            }
            // The next plan uses an older backup, or refuses because of this damage.
            Err(error) => archive.exclude_backup(plan.backup, error.into_damage()?),
        }
    }
}

/// Completes a plan: adds tablespaces, the end of the needed WAL, file systems and the estimated
/// duration.
///
/// # Errors
/// [`Error::Plan`], [`Error::Usage`], [`Error::Damaged`] for damaged WAL at the stop.
pub(super) fn settle(
    archive: &Archive,
    plan: &mut RestorePlan,
    directories: &Directories<'_>,
) -> Result<()> {
    plan.unseen_repositories.clone_from(&archive.unseen);
    tablespaces::settle(archive, plan, directories)?;
    if !directories.standby {
        stop_wal::prove(archive, plan)?;
    }
    if let Some(backup) = backup(archive, plan)? {
        let segment_bytes = archive.identity().wal_segment_size.bytes();
        space::settle(&backup, segment_bytes, plan, directories)?;
    }
    let system = archive.identity().system_identifier;
    estimate::measure(&archive.repository, system, plan);
    Ok(())
}

fn backup(archive: &Archive, plan: &RestorePlan) -> Result<Option<BackupInfo>> {
    let mut backups = archive.backups()?.into_iter();
    Ok(backups.find(|backup| backup.id == plan.backup))
}
