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
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use quick::ahead::Ahead;
use repository::{
    ExitKind,
    config::{ClusterSettings, CommonArgs},
    store::Patience,
    with_command_hint,
};
use wal_format::SystemIdentifier;

use crate::{
    Error, RestorePlan, Result,
    inventory::Inventory,
    list, look_ahead,
    wal_fetch::{self, Fetched},
};

mod arguments;
mod audit;
mod chosen;
mod drill;
mod inside;
mod locate;
mod opening;
mod outcome;
mod output;
mod owner;
mod release;
mod restore;

use opening::{archive, open, resolve};
use restore::{RestoreArgs, restore};

/// The end of `pitr-restore --help`.
const AFTER_HELP: &str = "A copy is isolated from its parent by settings at the end of its configuration. pg_verifybackup \
    therefore reports its postgresql.conf, pg_hba.conf and files tidemark_*; leave them out with --ignore.";

/// Restores a PostgreSQL cluster from a Tidemark repository to any point in time. Shows before the
/// copy where recovery will stop.
#[derive(Debug, Parser)]
#[command(
    name = "pitr-restore",
    version,
    subcommand_negates_reqs = true,
    after_help = AFTER_HELP
)]
struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    /// The system identifier of the cluster, if `pg_upgrade` or initdb gave it a new one since.
    /// Default: the newest; `list` shows all.
    #[arg(long, global = true, value_name = "N")]
    system: Option<SystemIdentifier>,
    /// Read a versioned bucket as it was at this time, without later deletions and overwrites.
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
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Finds commits, drops and large deletes near a time, each with the options of a restore to
    /// just before it.
    Locate(locate::LocateArgs),
    /// Tests a restore: restores into a scratch directory, starts PostgreSQL there, checks it,
    /// records the measured RTO and loss, and removes it.
    Drill(Box<drill::DrillArgs>),
    /// `restore_command` = 'pitr-restore wal-fetch %f %p': 0 delivered, 1 proved absent, 255
    /// anything else.
    WalFetch {
        /// The file that PostgreSQL asks for: %f.
        name: String,
        /// The path to which it is copied: %p.
        destination: PathBuf,
        /// The plan of the restore.
        #[arg(long, value_name = "FILE")]
        plan: Option<PathBuf>,
    },
    /// Lifts the isolation of a restored copy that takes its parent's place.
    Release(release::ReleaseArgs),
    /// Removes the settings that only the recovery needed; the `recovery_end_command` of a restored
    /// server.
    #[command(hide = true)]
    RecoveryEnded {
        /// The data directory.
        #[arg(default_value = ".")]
        directory: PathBuf,
    },
    /// Fetches the segments after NAME before PostgreSQL asks for them; started by `wal-fetch`.
    #[command(hide = true)]
    WalAhead {
        /// The segment that was just delivered.
        name: String,
        /// The path to which it was copied.
        destination: PathBuf,
        /// The plan of the restore.
        #[arg(long, value_name = "FILE")]
        plan: Option<PathBuf>,
        /// The directory for the fetched segments.
        #[arg(long, value_name = "DIR")]
        folder: PathBuf,
    },
}

impl Cli {
    /// Returns true if the output is one JSON document.
    fn wants_json(&self) -> bool {
        match &self.command {
            // `--json` may come before and after the command.
            Some(Command::List { json }) => *json || self.restore.json,
            Some(Command::Locate(args)) => args.json || self.restore.json,
            Some(Command::Drill(args)) => args.json || self.restore.json,
            Some(Command::Release(args)) => args.json || self.restore.json,
            Some(
                Command::WalFetch { .. } | Command::WalAhead { .. } | Command::RecoveryEnded { .. },
            ) => false,
            None => self.restore.json,
        }
    }
}

/// Parses the arguments and runs the command. The first argument is the program's name. Returns the
/// contract's exit code. With `--json`, a refusal is also printed as a JSON document on standard
/// output.
#[must_use]
pub fn run(arguments: Vec<OsString>) -> ExitCode {
    let json = arguments.iter().any(|argument| argument == "--json");
    if let Err(error) = arguments::refuse_long(&arguments) {
        return refused(error.exit_kind(), &error.to_string(), json);
    }
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        // Help and version are not failures.
        Err(error) if !error.use_stderr() => {
            drop(error.print());
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let error = with_command_hint(error);
            drop(error.print());
            if json {
                let text = error.render().to_string();
                let text = text.strip_prefix("error: ").unwrap_or(&text);
                output::refusal(ExitKind::Usage, text.trim_end());
            }
            return ExitCode::from(ExitKind::Usage.code());
        }
    };
    let fetching = matches!(cli.command, Some(Command::WalFetch { .. }));
    let json = cli.wants_json();
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) if fetching => {
            output::error(&error.to_string());
            ExitCode::from(255)
        }
        Err(error) => refused(error.exit_kind(), &error.to_string(), json),
    }
}

fn refused(kind: ExitKind, message: &str, json: bool) -> ExitCode {
    output::error(message);
    if json {
        output::refusal(kind, message);
    }
    ExitCode::from(kind.code())
}

fn dispatch(mut cli: Cli) -> Result<ExitCode> {
    let json = cli.wants_json();
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
            // Opening the repository already reads the system identifier from the store, so retry
            // it, too.
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
        Some(Command::List { .. }) => {
            let settings = resolve(&cli)?;
            let cluster = settings.cluster()?;
            let mut archive = archive(cluster, cli.system)?;
            archive.exclude_incomplete()?;
            let mut listing = list::list(&archive, &archive.damaged_objects())?;
            listing.tell_expired(&archive.catalog.expired()?);
            let repository = open(&cluster.repository, &cluster.name, None)?;
            let system = archive.identity().system_identifier;
            listing.epochs = list::epochs(&repository, system)?;
            listing.unseen_repositories.clone_from(&archive.unseen);
            if let Some(refusal) = archive.older_state() {
                listing.refusal = Some(refusal.to_string());
            }
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
            locate::run(&archive(settings.cluster()?, cli.system)?, &args, json)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Drill(args)) => {
            if let Some(owner) = &args.owner
                && rustix::process::getuid().is_root()
            {
                let directories = args.report.iter().chain(&args.scratch);
                let directories: Vec<&Path> = directories.map(PathBuf::as_path).collect();
                return owner::run_as(owner, &directories);
            }
            cli.restore.refuse_before("drill")?;
            let (cluster, config) = patient_cluster(&cli)?;
            drill::run(&cluster, config, cli.system, &args, json)
        }
        Some(Command::Release(args)) => {
            // A copy can be released without a repository: only the connection string is taken from
            // the settings.
            let settings = resolve(&cli);
            if cli.common.config.is_some() {
                settings
                    .as_ref()
                    .map_err(|error| Error::usage(error.to_string()))?;
            }
            release::run(
                settings.as_ref().ok(),
                cli.common.conninfo.as_deref(),
                &args,
                json,
            )?;
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
                return owner::run_as(owner, &cli.restore.directories());
            }
            let (cluster, config) = patient_cluster(&cli)?;
            restore(&cluster, config, cli.system, &cli.restore)
        }
    }
}

/// Returns the settings of the cluster for a restore, and the path of the configuration file.
fn patient_cluster(cli: &Cli) -> Result<(ClusterSettings, Option<PathBuf>)> {
    let settings = resolve(cli)?;
    let config = settings
        .file
        .as_deref()
        .map(opening::absolute)
        .transpose()?;
    let mut cluster = settings.cluster()?.clone();
    // Wait for a single store while it restarts. Otherwise the restore would have to start again
    // from the beginning.
    if cluster.repository.others.is_empty() {
        cluster.repository.patience = Patience::Long;
    }
    Ok((cluster, config))
}

/// Reads a plan. Returns it with the bytes of its file.
fn read_plan(path: &Path) -> Result<(RestorePlan, Vec<u8>)> {
    let json = std::fs::read(path).map_err(Error::io("read", path))?;
    let plan = serde_json::from_slice(&json).map_err(|error| Error::Damaged {
        object: path.display().to_string(),
        problem: error.to_string(),
    })?;
    Ok((plan, json))
}
