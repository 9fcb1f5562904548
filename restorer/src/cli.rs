//! The command line of `pitr-restore`, and the table of exit codes.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed; for `wal-fetch`: proved absent |
//! | 2 | usage or configuration |
//! | 3 | the target cannot be reached |
//! | 4 | integrity violation found |
//! | 5 | the repository is unreachable |
//! | 255 | `wal-fetch` only: no answer, or an unsafe one |

use std::{
    collections::BTreeMap,
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
};

use catalog::Catalog;
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use quick::{ahead::Ahead, whole};
use repository::{
    Repository,
    config::{ClusterSettings, CommonArgs, RepositoryPlace, Settings},
    store::Patience,
};
use wal_format::{BackupId, ClusterName, Lsn, SystemIdentifier};

use crate::{
    Error, RestorePlan, Result,
    execute::{self, Action, Destination, Recovery},
    expired,
    inventory::{Archive, Inventory},
    list, look_ahead,
    plan::{Wishes, plan_restore},
    start::{self, Start},
    tablespaces::{self, Directories},
    target::{RecoveryTarget, explain_time, parse_time},
    wal_fetch::{self, Fetched},
};

mod locate;
mod outcome;
mod output;
mod owner;
mod release;

use outcome::Outcome;

/// Restores a PostgreSQL cluster from a Tidemark repository to any instant; says before it copies where recovery stops.
#[derive(Debug, Parser)]
#[command(name = "pitr-restore", version, subcommand_negates_reqs = true)]
pub struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    /// The system identifier the cluster had, when `pg_upgrade` or initdb gave it a new one. Default: the newest; `list` shows
    /// all.
    #[arg(long, global = true, value_name = "N")]
    system: Option<SystemIdentifier>,
    /// Look at a versioned bucket as it was at this time: what was deleted or overwritten since is undone.
    #[arg(long, global = true, value_name = "TIME")]
    at: Option<String>,
    #[command(flatten)]
    restore: RestoreArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Lists backups, restorable windows, gaps and restore points.
    List {
        /// One JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Finds the moment: commits, drops and large deletes near a time, each with the flags that restore to just before it.
    Locate(locate::LocateArgs),
    /// `restore_command` = 'pitr-restore wal-fetch %f %p': 0 delivered, 1 proved absent, 255 anything else.
    WalFetch {
        /// The file PostgreSQL asks for: %f.
        name: String,
        /// Where it wants it: %p.
        destination: PathBuf,
        /// The plan of the restore.
        #[arg(long, value_name = "FILE")]
        plan: Option<PathBuf>,
    },
    /// Lifts the isolation of a restored copy that takes its parent's place.
    Release(release::ReleaseArgs),
    /// Removes what only the recovery needed; a restored server's `recovery_end_command`.
    #[command(hide = true)]
    RecoveryEnded {
        /// The data directory.
        #[arg(default_value = ".")]
        directory: PathBuf,
    },
    /// Fetches what follows NAME before it is asked for; `wal-fetch` starts it.
    #[command(hide = true)]
    WalAhead {
        /// The segment that was just delivered.
        name: String,
        /// Where it went.
        destination: PathBuf,
        /// The plan of the restore.
        #[arg(long, value_name = "FILE")]
        plan: Option<PathBuf>,
        /// Where to put them.
        #[arg(long, value_name = "DIR")]
        folder: PathBuf,
    },
}

#[derive(Debug, Args)]
struct RestoreArgs {
    /// The directory to restore into; new or empty, or with --delta a data directory of this cluster.
    #[arg(long, value_name = "DIR")]
    target_dir: Option<PathBuf>,
    /// Stop before the first commit after this time.
    #[arg(long, value_name = "TIME", group = "target")]
    target_time: Option<String>,
    /// Stop after the first record at or after this position.
    #[arg(long, value_name = "LSN", group = "target")]
    target_lsn: Option<Lsn>,
    /// Stop after the end of this transaction.
    #[arg(long, value_name = "XID", group = "target")]
    target_xid: Option<u32>,
    /// Stop after the restore point of this name.
    #[arg(long, value_name = "NAME", group = "target")]
    target_name: Option<String>,
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
    time_zone: Option<String>,
    /// Use this backup.
    #[arg(long, value_name = "ID")]
    backup: Option<BackupId>,
    /// Put the tablespace that was at OLD to NEW.
    #[arg(long, value_name = "OLD=NEW", value_parser = locations)]
    tablespace_mapping: Vec<(String, String)>,
    /// Restore into an existing data directory of this cluster: files that the backup has as they are stay, all others go.
    #[arg(long)]
    delta: bool,
    /// Threads that extract. Default: one for each processor.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Follow the archive for good, as a standby.
    #[arg(long)]
    standby: bool,
    /// Start PostgreSQL, wait for the end of recovery, compare it with the plan, leave it running.
    #[arg(long, requires = "target_dir", conflicts_with = "standby")]
    start: bool,
    /// Listen on this port of the loopback address. Default with --start: a free one, else no port at all.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Directory of PostgreSQL's programs.
    #[arg(long, value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// `shared_buffers` of the server that --start runs, until its next restart: a recovery with more of them is faster.
    #[arg(long, value_name = "SIZE", requires = "start", value_parser = buffers)]
    recovery_buffers: Option<String>,
    /// Append a setting to the restored ones.
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    set: Vec<(String, String)>,
    /// Keep `archive_mode` and synchronous standbys as they were.
    #[arg(long)]
    keep_archiving: bool,
    /// Run by root: the user who gets the files and under whom PostgreSQL runs.
    #[arg(long, value_name = "USER")]
    owner: Option<String>,
    /// Print the plan and touch nothing.
    #[arg(long)]
    dry_run: bool,
    /// One JSON document.
    #[arg(long)]
    json: bool,
}

/// As PostgreSQL writes sizes; a number alone would be pages.
fn buffers(text: &str) -> std::result::Result<String, String> {
    let number = ["kB", "MB", "GB", "TB"]
        .iter()
        .find_map(|unit| text.strip_suffix(unit));
    match number.map(str::parse::<u32>) {
        Some(Ok(1..)) => Ok(text.to_owned()),
        _ => Err("write a size with its unit, for example 4GB".to_owned()),
    }
}

fn pair(text: &str) -> std::result::Result<(String, String), String> {
    text.split_once('=')
        .filter(|(left, _)| !left.is_empty())
        .map(|(left, right)| (left.to_owned(), right.to_owned()))
        .ok_or_else(|| "write it with an equals sign between".to_owned())
}

/// Two paths; an equals sign that belongs to one of them is written `\=`, as for `pg_basebackup`.
fn locations(text: &str) -> std::result::Result<(String, String), String> {
    let escaped = text.replace("\\=", "\0");
    let (old, new) = pair(&escaped)?;
    if new.contains('=') {
        return Err("write an equals sign that belongs to a path as \\=".to_owned());
    }
    Ok((old.replace('\0', "="), new.replace('\0', "=")))
}

/// Runs a command; the exit code is the contract's.
#[must_use]
pub fn run(cli: Cli) -> ExitCode {
    let fetching = matches!(cli.command, Some(Command::WalFetch { .. }));
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            output::error(&error.to_string());
            if fetching {
                ExitCode::from(255)
            } else {
                ExitCode::from(error.exit_kind().code())
            }
        }
    }
}

fn dispatch(mut cli: Cli) -> Result<ExitCode> {
    match cli.command.take() {
        Some(Command::WalFetch {
            name,
            destination,
            plan,
        }) => {
            let plan = plan.as_deref().map(read_plan).transpose()?;
            let ahead = match &plan {
                Some((_, content)) => Ahead::of_plan(content, &destination),
                None => Ahead::of_arguments(&name, &destination),
            };
            if ahead
                .as_ref()
                .is_some_and(|ahead| ahead.take(&name, &destination))
            {
                return Ok(ExitCode::SUCCESS);
            }
            let settings = resolve(&cli)?;
            let cluster = settings.cluster()?;
            // Which system it is, is asked of the store already.
            let repository = wal_fetch::patiently(&name, || {
                open(&cluster.repository, &cluster.name, cli.system)
            })?;
            let known = plan.as_ref().map(|(plan, _)| plan);
            match wal_fetch::wal_fetch(&repository, known, &name, &destination)? {
                Fetched::Delivered => {
                    let little = known.is_some_and(|plan| plan.wal_bytes == 0);
                    if let Some(ahead) = ahead.filter(|_| !little) {
                        ahead.start(&name);
                    }
                    Ok(ExitCode::SUCCESS)
                }
                Fetched::Absent => Ok(ExitCode::from(1)),
            }
        }
        Some(Command::WalAhead {
            name,
            destination: _,
            plan,
            folder,
        }) => {
            let settings = resolve(&cli)?;
            let cluster = settings.cluster()?;
            let repository = open(&cluster.repository, &cluster.name, cli.system)?;
            let plan = plan.as_deref().map(read_plan).transpose()?;
            let plan = plan.as_ref().map(|(plan, _)| plan);
            look_ahead::run(&repository, plan, &name, &folder)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::List { json }) => {
            let settings = resolve(&cli)?;
            let cluster = settings.cluster()?;
            let archive = archive(cluster, cli.system)?;
            let mut listing = list::list(&archive, archive.catalog.damaged_objects())?;
            listing.tell_expired(&archive.catalog.expired()?);
            let repository = open(&cluster.repository, &cluster.name, None)?;
            let system = archive.identity().system_identifier;
            listing.epochs = list::epochs(&repository, system)?;
            listing.failover_losses = repository.failover_losses(system)?;
            if json {
                output::json(&listing)?;
            } else {
                output::listing(&listing);
            }
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Locate(args)) => {
            let settings = resolve(&cli)?;
            locate::run(&archive(settings.cluster()?, cli.system)?, &args)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Release(args)) => {
            // A copy is released without a repository too: only a connection text is wanted of the settings.
            let settings = resolve(&cli);
            if cli.common.config.is_some() {
                settings
                    .as_ref()
                    .map_err(|error| Error::usage(error.to_string()))?;
            }
            release::run(settings.as_ref().ok(), &args)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::RecoveryEnded { directory }) => {
            release::recovery_ended(&directory)?;
            Ok(ExitCode::SUCCESS)
        }
        None => {
            if let Some(owner) = &cli.restore.owner
                && rustix::process::getuid().is_root()
            {
                let target = cli.restore.target_dir.as_deref();
                return owner::run_as(owner, target.filter(|_| !cli.restore.dry_run));
            }
            let settings = resolve(&cli)?;
            let config = settings.file.as_deref().map(absolute).transpose()?;
            let mut cluster = settings.cluster()?.clone();
            // Where there is no other place to ask, a store that restarts is waited for: the copy would begin anew.
            if cluster.repository.others.is_empty() {
                cluster.repository.patience = Patience::Long;
            }
            restore(&cluster, config, cli.system, &cli.restore)
        }
    }
}

/// A plan, and the bytes of its file.
fn read_plan(path: &Path) -> Result<(RestorePlan, Vec<u8>)> {
    let json = std::fs::read(path).map_err(Error::io("read", path))?;
    let plan = serde_json::from_slice(&json).map_err(|error| Error::Damaged {
        object: path.display().to_string(),
        problem: error.to_string(),
    })?;
    Ok((plan, json))
}

/// The settings; with `--at` every bucket is seen as it was then, and folders, which keep no versions, are left out.
fn resolve(cli: &Cli) -> Result<Settings> {
    let mut settings = Settings::resolve(&cli.common)?;
    let Some(text) = &cli.at else {
        return Ok(settings);
    };
    let now = Timestamp::now();
    let at = parse_time(text, cli.restore.time_zone.as_deref(), now)?
        .to_jiff()
        .filter(|at| *at <= now)
        .ok_or_else(|| Error::usage(format!("--at \"{text}\" lies in the future")))?;
    for cluster in &mut settings.clusters {
        let mut places = cluster.repository.each();
        places.retain(|place| place.url.folder().is_none());
        for place in &mut places {
            place.as_of = Some(at);
        }
        if places.is_empty() {
            return Err(Error::usage(format!(
                "--at looks at the versions that a bucket keeps; {} is a folder",
                cluster.repository
            )));
        }
        let first = places.remove(0);
        cluster.repository = RepositoryPlace {
            others: places,
            required: cluster.repository.required,
            ..first
        };
    }
    Ok(settings)
}

/// Opens a repository for reading: a missing folder is an error and not a new repository. Of several, one is enough.
fn open(
    place: &RepositoryPlace,
    cluster: &ClusterName,
    system: Option<SystemIdentifier>,
) -> Result<Repository> {
    let mut there = place.each();
    there.retain(|one| one.url.folder().is_none_or(Path::is_dir));
    let here = (!there.is_empty() && !place.others.is_empty()).then(|| RepositoryPlace {
        others: there.split_off(1),
        required: place.required,
        ..there.remove(0)
    });
    let place = here.as_ref().unwrap_or(place);
    if let Some(folder) = place.url.folder()
        && !folder.is_dir()
    {
        let missing = std::io::Error::new(
            std::io::ErrorKind::NotFound,
            "there is no such folder; check --repository, and that it is mounted",
        );
        let action = "open the repository";
        let path = folder.to_owned();
        return Err(repository::Error::Store {
            action,
            path,
            source: missing,
        }
        .into());
    }
    let repository = Repository::open(place, cluster)?;
    Ok(match system {
        Some(system) => repository.of_system(system)?,
        None => repository,
    })
}

fn archive(cluster: &ClusterSettings, system: Option<SystemIdentifier>) -> Result<Archive> {
    let repository = open(&cluster.repository, &cluster.name, system)?;
    // Of the past the catalog knows nothing.
    let catalog = Some(cluster.catalog.as_path()).filter(|_| cluster.repository.as_of.is_none());
    let catalog = Catalog::open_for_restore(catalog, &repository)?;
    Ok(Archive {
        repository,
        catalog,
    })
}

fn target(args: &RestoreArgs, now: Timestamp) -> Result<RecoveryTarget> {
    let inclusive = !args.target_exclusive;
    if let Some(text) = &args.target_time {
        let time = parse_time(text, args.time_zone.as_deref(), now)?;
        return Ok(RecoveryTarget::Time { time, inclusive });
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
        Some(name) => RecoveryTarget::Name(name.clone()),
        None if args.target_immediate => RecoveryTarget::Immediate,
        None => RecoveryTarget::Latest,
    })
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(Error::io("find", path))
}

fn restore(
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
    let archive = archive(cluster, system)?;
    let wishes = Wishes {
        backup: args.backup.clone(),
        timeline: args.target_timeline.clone(),
    };
    if let Some(id) = &wishes.backup {
        archive.refuse_damaged(id)?;
        expired::refuse_backup(&archive, id)?;
    }
    let mut plan = plan_restore(&archive, &target, &wishes)
        .map_err(|error| expired::explain(&archive, &target, archive.explain(error)))?;
    let directory = args.target_dir.as_deref().map(absolute).transpose()?;
    let mapping = mapping(args);
    let directories = Directories {
        target: directory.as_deref(),
        mapping: &mapping,
        delta: args.delta,
        standby: args.standby,
    };
    tablespaces::settle(&archive, &mut plan, &directories)?;
    archive.check_backup(&plan.backup)?;
    if !args.json {
        if let RecoveryTarget::Time { time, .. } = &target {
            output::line(&format!("target        {}", explain_time(*time, now)));
        }
        output::plan(&plan);
    }
    let Some(directory) = directory.filter(|_| !args.dry_run) else {
        if args.json {
            output::json(&plan)?;
        }
        return Ok(ExitCode::SUCCESS);
    };
    let default = if args.start {
        Action::Promote
    } else {
        Action::Pause
    };
    let action = args.target_action.unwrap_or(default);
    // Found before the copy: a restore that cannot be started is known to be so at once.
    let version = archive.identity().postgresql_major;
    let postgres = if args.start {
        Some(start::find_postgres(args.pg_bin.as_deref(), version)?)
    } else {
        None
    };
    let jobs = args
        .jobs
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from));
    let destination = Destination {
        directory,
        tablespaces: mapping,
        delta: args.delta,
        jobs,
        recovery: Recovery {
            action,
            standby: args.standby,
            keep_archiving: args.keep_archiving,
            port: args.port.or_else(|| {
                let chosen = args.start.then(outcome::free_port);
                chosen.flatten()
            }),
            set: args.set.clone(),
            repository: cluster.repository.clone(),
            config,
            program: whole::called().map_err(Error::io("find", "this program"))?,
        },
    };
    let bar = bar(&archive, &plan)?;
    let executed = execute::execute(&archive, &plan, &destination, &|bytes| bar.inc(bytes))?;
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
            segment_size: archive.identity().wal_segment_size,
            plan: &plan,
            action,
            buffers: args.recovery_buffers.as_deref(),
            tell: &output::note,
        })?),
        None => None,
    };
    let outcome = Outcome {
        plan: &plan,
        directory: &destination.directory,
        executed: &executed,
        recovered: recovered.as_ref(),
        recovery: &destination.recovery,
        pg_bin: args.pg_bin.clone(),
    };
    outcome.print(args.json)?;
    Ok(ExitCode::SUCCESS)
}

fn mapping(args: &RestoreArgs) -> BTreeMap<PathBuf, PathBuf> {
    let pairs = args.tablespace_mapping.iter();
    pairs
        .map(|(old, new)| (PathBuf::from(old), PathBuf::from(new)))
        .collect()
}

fn bar(archive: &Archive, plan: &RestorePlan) -> Result<ProgressBar> {
    let backups = archive.catalog.backups()?;
    let raw_bytes = backups
        .iter()
        .find(|one| one.id == plan.backup)
        .map_or(0, |one| one.raw_bytes);
    if !std::io::stderr().is_terminal() {
        return Ok(ProgressBar::hidden());
    }
    let style = ProgressStyle::with_template(
        "extracting {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
    );
    let bar = ProgressBar::new(raw_bytes);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    Ok(bar)
}
