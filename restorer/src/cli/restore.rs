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
use wal_format::{PgVersion, SystemIdentifier};

use super::{
    arguments::{self, buffers, duration, locations, pair},
    audit::Ended,
    chosen::{self, TargetArgs},
    inside,
    opening::{absolute, archive},
    outcome::{self, Outcome},
    output, owner,
};
use crate::{
    Error, RestorePlan, Result,
    execute::{self, Action, Destination, Recovery},
    inventory::{Archive, Inventory},
    isolation::Isolation,
    plan::{PreparedTransaction, refuse_promotion},
    roles::{self, NoLogin},
    space,
    sql::Address,
    start::{self, Interrupt, Start},
    tablespaces::Directories,
    target::{RecoveryTarget, explain_time},
    unfinished,
};

/// The time limit of a query that finds a role of the copy.
const LOGIN_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// The directory to restore into; new or empty, or with --delta a data directory of this
    /// cluster.
    #[arg(long, value_name = "DIR")]
    pub(super) target_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(super) chosen: TargetArgs,
    /// PostgreSQL's action at the target. Default: promote with --start, else pause.
    #[arg(long, value_enum)]
    target_action: Option<Action>,
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
    /// The value of `--owner`, if root runs this command as that user.
    #[arg(long, value_name = "USER", hide = true)]
    run_for: Option<String>,
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

    /// Refuses options of a restore before a command that would ignore them.
    pub(super) fn refuse_before(&self, command: &str) -> Result<()> {
        if self.chosen.is_latest() && self.target_dir.is_none() && self.pg_bin.is_none() {
            return Ok(());
        }
        Err(Error::usage(format!(
            "write the options of `{command}` after it: pitr-restore {command} --target-time …"
        )))
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

/// Plans and makes all checks that are possible before the copy. Restores unless only the plan is
/// wanted.
pub(super) fn restore(
    cluster: &ClusterSettings,
    config: Option<PathBuf>,
    system: Option<SystemIdentifier>,
    args: &RestoreArgs,
) -> Result<ExitCode> {
    let now = Timestamp::now();
    let target = args.chosen.recovery_target(now)?;
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
    let mut plan = chosen::plan(&mut archive, &target, &args.chosen, args.force)?;
    if args.start && !args.standby && args.action() == Action::Promote {
        refuse_promotion(&archive, &plan.path)?;
    }
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
    inside::refuse(cluster, &directories)?;
    chosen::settle(&archive, &mut plan, &directories)?;
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
    let began = Timestamp::now();
    let result = copy_and_start(&archive, &plan, &destination, &cluster.conninfo, args);
    let shown = args.chosen.shown();
    let ended = Ended {
        began,
        target: shown.unwrap_or_else(|| "the newest state".to_owned()),
        plan: &plan,
        directory: &destination.directory,
        started: args.start,
        result: &result,
    };
    ended.record(&archive, cluster);
    result.map(|_| ExitCode::SUCCESS)
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

/// Applies the plan, starts the server if requested, and prints the outcome. Returns the place
/// where recovery stopped, in PostgreSQL's words, if the server was started.
fn copy_and_start(
    archive: &Archive,
    plan: &RestorePlan,
    destination: &Destination,
    conninfo: &str,
    args: &RestoreArgs,
) -> Result<Option<String>> {
    // Find the program before the copy, so that a restore that cannot be started is refused at
    // once.
    let version = archive.identity().postgresql_major;
    let postgres = if args.start {
        Some(start::find_postgres(args.pg_bin.as_deref(), version)?)
    } else {
        None
    };
    if let Some(notice) = execute::notice_of_removal(&destination.directory, destination.delta) {
        output::note(&notice);
    }
    let bar = bar(plan);
    // The target stays locked until the server was started.
    let (mut executed, _lock) =
        execute::execute(archive, plan, destination, &|bytes| bar.inc(bytes))?;
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
    let is_running = recovered.as_ref().is_some_and(|one| one.process.is_some());
    find_login(
        &mut executed.isolation,
        destination,
        conninfo,
        &plan.in_doubt,
        (version, is_running),
    );
    let postgres = start::find_postgres(args.pg_bin.as_deref(), version).ok();
    let program = |name| start::sibling(postgres.as_deref()?, name);
    let outcome = Outcome {
        plan,
        directory: &destination.directory,
        executed: &executed,
        recovered: recovered.as_ref(),
        recovery: &destination.recovery,
        pg_ctl: program("pg_ctl"),
        psql: program("psql"),
        prefix: args.run_for.as_deref().map(owner::prefix),
    };
    outcome.print(args.json)?;
    Ok(recovered.map(|recovered| recovered.stopped))
}

/// Finds the role and the database of the command that connects to the copy: by connecting if the
/// server runs, else from its files.
fn find_login(
    isolation: &mut Isolation,
    destination: &Destination,
    conninfo: &str,
    in_doubt: &[PreparedTransaction],
    (version, is_running): (PgVersion, bool),
) {
    let candidates = roles::candidates(&destination.directory, conninfo);
    let sockets = isolation.socket_directory.clone();
    let Some(sockets) = sockets.filter(|_| is_running) else {
        isolation.role = roles::superusers_in(&destination.directory)
            .into_iter()
            .next();
        return;
    };
    let address = Address {
        sockets,
        port: isolation.port,
        user: String::new(),
        options: roles::session_options(version),
    };
    let waiting = (LOGIN_MAX, in_doubt);
    let found = Interrupt::catch()
        .and_then(|interrupt| roles::connect(&address, &candidates, waiting, &interrupt, &|_| ()));
    match found {
        Ok(Ok(login)) => {
            isolation.role = Some(login.role);
            isolation.database = Some(login.database);
        }
        Ok(Err(refused)) => {
            match refused {
                NoLogin::NoAnswer(said) => output::note(&said),
                // The rules of the parent may ask for a password.
                NoLogin::Refused(said) => {
                    tracing::debug!(said, "no role of the copy could connect");
                }
            }
            isolation.role = roles::superusers_in(&destination.directory)
                .into_iter()
                .next();
        }
        Err(error) => tracing::debug!(%error, "no role of the copy was searched for"),
    }
}

/// Refuses relative paths in the configuration, because `restore_command` runs in the restored data
/// directory and would not find the files.
pub(super) fn refuse_relative(cluster: &ClusterSettings) -> Result<()> {
    match cluster.repository.relative_files().first() {
        Some(line) => Err(Error::usage(format!(
            "{line} is not an absolute path: the restored server runs restore_command in its data directory and would not find \
             the file; write the path from / on in the configuration"
        ))),
        None => Ok(()),
    }
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

pub(super) fn bar(plan: &RestorePlan) -> ProgressBar {
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
