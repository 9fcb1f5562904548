//! The restore command and its options: plan, checks before the copy, copy, start.

use std::{
    collections::BTreeMap,
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use quick::whole;
use repository::config::ClusterSettings;
use wal_format::{BackupId, BackupInfo, Lsn, SystemIdentifier};

use super::{
    arguments::{self, buffers, duration, locations, pair},
    opening::{absolute, archive},
    outcome::{self, Outcome},
    output,
};
use crate::{
    Error, RestorePlan, Result,
    execute::{self, Action, Destination, Recovery},
    expired,
    inventory::{Archive, Inventory},
    plan::{Wishes, estimate, plan_restore},
    space,
    start::{self, Start},
    tablespaces::{self, Directories},
    target::{RecoveryTarget, explain_time, is_relative, parse_time, parse_xid},
    unfinished,
};

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// The directory to restore into; new or empty, or with --delta a data directory of this
    /// cluster.
    #[arg(long, value_name = "DIR")]
    pub(super) target_dir: Option<PathBuf>,
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
    /// PostgreSQL's action at the target. Default: promote with --start, else pause.
    #[arg(long, value_enum)]
    target_action: Option<Action>,
    /// Zone of a target time without an offset, for example Europe/Berlin.
    #[arg(long, value_name = "ZONE")]
    pub(super) time_zone: Option<String>,
    /// Use this backup.
    #[arg(long, value_name = "ID")]
    backup: Option<BackupId>,
    /// Restore the tablespace with directory OLD to directory NEW.
    #[arg(long, value_name = "OLD=NEW", value_parser = locations)]
    tablespace_mapping: Vec<(String, String)>,
    /// Restore into an existing data directory of this cluster: files that equal those of the
    /// backup stay, all others are removed.
    #[arg(long)]
    delta: bool,
    /// Number of threads that extract. Default: one for each processor.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Follow the archive permanently, as a standby.
    #[arg(long)]
    standby: bool,
    /// Start PostgreSQL, wait for the end of recovery, compare it with the plan, and leave the
    /// server running.
    #[arg(long, requires = "target_dir", conflicts_with = "standby")]
    start: bool,
    /// Listen on this port of the loopback address. Default with --start: a free port, else no
    /// port.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Directory of PostgreSQL's programs.
    #[arg(long, value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// `shared_buffers` of the server that --start runs, until its next restart. More buffers make
    /// the recovery faster.
    #[arg(long, value_name = "SIZE", requires = "start", value_parser = buffers)]
    recovery_buffers: Option<String>,
    /// Give up when the recovery of --start makes no progress for this long, for example 30s or 1h.
    #[arg(long, value_name = "DURATION", requires = "start", default_value = "15min", value_parser = duration)]
    recovery_timeout: Duration,
    /// Append a setting to the restored configuration.
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    set: Vec<(String, String)>,
    /// Leave `archive_mode` and the synchronous standbys unchanged.
    #[arg(long)]
    keep_archiving: bool,
    /// As root: the user who gets the files and runs PostgreSQL.
    #[arg(long, value_name = "USER")]
    pub(super) owner: Option<String>,
    /// Restore although the free space seems too small, use the named backup although `verify`
    /// found it damaged, or restore the newest state that the repository holds although this host
    /// archived a newer one.
    #[arg(long)]
    force: bool,
    /// Print the plan and change nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Print one JSON document.
    #[arg(long)]
    pub(super) json: bool,
}

impl RestoreArgs {
    /// Returns the directories that a restore creates and writes to, except those of tablespaces
    /// that are not mapped.
    pub(super) fn directories(&self) -> Vec<&Path> {
        if self.dry_run {
            return Vec::new();
        }
        let mapped = self.tablespace_mapping.iter();
        let mapped = mapped.map(|(_, new)| Path::new(new));
        let mut directories: Vec<&Path> = mapped.filter(|new| new.is_absolute()).collect();
        directories.extend(self.target_dir.as_deref());
        directories
    }

    /// PostgreSQL's action at the target.
    fn action(&self) -> Action {
        let default = if self.start {
            Action::Promote
        } else {
            Action::Pause
        };
        self.target_action.unwrap_or(default)
    }
}

fn target(args: &RestoreArgs, now: Timestamp) -> Result<RecoveryTarget> {
    let inclusive = !args.target_exclusive;
    if let Some(text) = &args.target_time {
        let time = parse_time(text, args.time_zone.as_deref(), now)?;
        return Ok(RecoveryTarget::Time {
            time,
            inclusive,
            relative: is_relative(text),
        });
    }
    if let Some(lsn) = args.target_lsn {
        return Ok(RecoveryTarget::Lsn { lsn, inclusive });
    }
    if let Some(xid) = args.target_xid {
        return Ok(RecoveryTarget::Xid { xid, inclusive });
    }
    if args.target_exclusive {
        return Err(Error::usage(
            "--target-exclusive goes with --target-time, --target-lsn or --target-xid",
        ));
    }
    Ok(match &args.target_name {
        Some(name) => RecoveryTarget::Name {
            name: name.clone(),
            at_lsn: args.at_lsn,
        },
        None if args.target_immediate => RecoveryTarget::Immediate,
        None => RecoveryTarget::Latest,
    })
}

/// Plans and makes all checks that are possible before the copy. Restores unless only the plan is
/// wanted.
pub(super) fn restore(
    cluster: &ClusterSettings,
    config: Option<PathBuf>,
    system: Option<SystemIdentifier>,
    args: &RestoreArgs,
) -> Result<ExitCode> {
    let now = Timestamp::now();
    let target = target(args, now)?;
    if !args.dry_run {
        if args.target_dir.is_none() {
            return Err(Error::usage(
                "name the directory to restore into with --target-dir, or look first with --dry-run",
            ));
        }
        if rustix::process::getuid().is_root() {
            return Err(Error::usage(
                "PostgreSQL does not run as root: name the user who gets the files with --owner",
            ));
        }
    }
    arguments::check_settings(&args.set)?;
    refuse_relative(cluster)?;
    let mut archive = archive(cluster, system)?;
    let mut plan = plan(&mut archive, &target, args)?;
    plan.unseen_repositories.clone_from(&archive.unseen);
    if !args.standby {
        unfinished::settle(&archive, &mut plan, args.action() == Action::Pause)?;
    }
    let directory = args.target_dir.as_deref().map(absolute).transpose()?;
    let mapping = mapping(args)?;
    let directories = Directories {
        target: directory.as_deref(),
        mapping: &mapping,
        delta: args.delta,
        standby: args.standby,
    };
    tablespaces::settle(&archive, &mut plan, &directories)?;
    if let Some(backup) = backup(&archive, &plan)? {
        let segment_bytes = archive.identity().wal_segment_size.bytes();
        space::settle(&backup, segment_bytes, &mut plan, &directories)?;
    }
    let system = archive.identity().system_identifier;
    estimate::measure(&archive.repository, system, &mut plan);
    if !args.json {
        if let RecoveryTarget::Time { time, .. } = &target {
            output::line(&format!("target        {}", explain_time(*time, now)));
        }
        output::plan(&plan);
    }
    if !args.force {
        space::refuse_shortage(&plan)?;
    }
    let Some(directory) = directory.filter(|_| !args.dry_run) else {
        if args.json {
            output::json(&plan)?;
        }
        return Ok(ExitCode::SUCCESS);
    };
    let destination = Destination {
        directory,
        tablespaces: mapping,
        delta: args.delta,
        jobs: args
            .jobs
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from)),
        recovery: recovery(cluster, config, args)?,
    };
    copy_and_start(&archive, &plan, &destination, args)?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the recovery settings according to the arguments.
fn recovery(
    cluster: &ClusterSettings,
    config: Option<PathBuf>,
    args: &RestoreArgs,
) -> Result<Recovery> {
    Ok(Recovery {
        action: args.action(),
        standby: args.standby,
        start: args.start,
        keep_archiving: args.keep_archiving,
        port: args.port.or_else(|| {
            let chosen = args.start.then(outcome::free_port);
            chosen.flatten()
        }),
        set: args.set.clone(),
        repository: cluster.repository.clone(),
        config,
        program: whole::called().map_err(Error::io("find", "this program"))?,
    })
}

/// Applies the plan, starts the server if requested, and prints the outcome.
fn copy_and_start(
    archive: &Archive,
    plan: &RestorePlan,
    destination: &Destination,
    args: &RestoreArgs,
) -> Result<()> {
    // Find the program before the copy, so that a restore that cannot be started is refused at
    // once.
    let version = archive.identity().postgresql_major;
    let postgres = if args.start {
        Some(start::find_postgres(args.pg_bin.as_deref(), version)?)
    } else {
        None
    };
    let bar = bar(plan);
    // The target stays locked until the server was started.
    let (executed, _lock) = execute::execute(archive, plan, destination, &|bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    for problem in &executed.isolation.problems {
        output::error(problem);
    }
    let recovered = match &postgres {
        Some(postgres) => Some(start::start(&Start {
            postgres,
            version,
            directory: &destination.directory,
            repository: &archive.repository,
            system: archive.identity().system_identifier,
            timeout: args.recovery_timeout,
            segment_size: archive.identity().wal_segment_size,
            plan,
            action: destination.recovery.action,
            buffers: args.recovery_buffers.as_deref(),
            tell: &output::note,
        })?),
        None => None,
    };
    if recovered.is_some() {
        execute::recovery::proved(&destination.directory)?;
    }
    let outcome = Outcome {
        plan,
        directory: &destination.directory,
        executed: &executed,
        recovered: recovered.as_ref(),
        recovery: &destination.recovery,
        pg_ctl: start::find_postgres(args.pg_bin.as_deref(), version)
            .ok()
            .and_then(|postgres| start::sibling(&postgres, "pg_ctl")),
    };
    outcome.print(args.json)
}

/// Plans with the newest backup that is not known to be damaged.
fn plan(archive: &mut Archive, target: &RecoveryTarget, args: &RestoreArgs) -> Result<RestorePlan> {
    let wishes = Wishes {
        backup: args.backup.clone(),
        timeline: args.target_timeline.clone(),
    };
    if let Some(id) = &wishes.backup {
        archive.refuse_damaged(id)?;
        expired::refuse_backup(archive, id)?;
        if args.force {
            archive.trust_backup(id);
        }
    }
    if *target == RecoveryTarget::Latest
        && !args.force
        && let Some(refusal) = archive.older_state()
    {
        return Err(refusal.into());
    }
    loop {
        let plan = plan_restore(archive, target, &wishes)
            .map_err(|error| expired::explain(archive, target, archive.explain(error)))?;
        match archive.check_backup(&plan.backup) {
            Ok(()) => return Ok(plan),
            // The next plan uses an older backup, or refuses because of this damage.
            Err(error) => archive.exclude_backup(plan.backup, error.into_damage()?),
        }
    }
}

/// Refuses relative paths in the configuration, because `restore_command` runs in the restored data
/// directory and would not find the files.
fn refuse_relative(cluster: &ClusterSettings) -> Result<()> {
    match cluster.repository.relative_files().first() {
        Some(line) => Err(Error::usage(format!(
            "{line} is not an absolute path: the restored server runs restore_command in its data directory and would not find \
             the file; write the path from / on in the configuration"
        ))),
        None => Ok(()),
    }
}

fn backup(archive: &Archive, plan: &RestorePlan) -> Result<Option<BackupInfo>> {
    let mut backups = archive.backups()?.into_iter();
    Ok(backups.find(|backup| backup.id == plan.backup))
}

/// Returns the mapping of tablespaces. Two spellings of one path, for example with a slash at the
/// end, are the same path.
fn mapping(args: &RestoreArgs) -> Result<BTreeMap<PathBuf, PathBuf>> {
    let mut mapping: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
    for (old, new) in &args.tablespace_mapping {
        let (path, new) = (PathBuf::from(old), PathBuf::from(new));
        if let Some(other) = mapping.get(&path)
            && *other != new
        {
            return Err(Error::usage(format!(
                "--tablespace-mapping: {old} is mapped to {} and to {}; keep one of the two",
                other.display(),
                new.display()
            )));
        }
        mapping.insert(path, new);
    }
    Ok(mapping)
}

fn bar(plan: &RestorePlan) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(
        "extracting {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
    );
    let bar = ProgressBar::new(plan.unpacked_bytes);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}
