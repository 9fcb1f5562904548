//! The command line of `wal-archiver`, and the table of exit codes.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed |
//! | 2 | usage or configuration |
//! | 4 | integrity violation found: WAL is missing, damaged or different |
//! | 5 | PostgreSQL or the repository is unreachable |
//!
//! Nothing but `output` writes to standard output; logs and errors go to standard error.

mod backup;
mod catalog;
mod check;
mod config;
mod daemon;
mod epoch;
mod expire;
mod facts;
mod import;
mod key;
mod lock;
mod nagios;
mod notify;
mod output;
mod run;
mod status;
mod verify;

use std::{net::SocketAddr, path::PathBuf};

use clap::{Parser, Subcommand, ValueEnum};
use repository::{
    Repository,
    config::{ClusterSettings, CommonArgs, Settings},
    store::LockMode,
};
use wal_format::{BackupId, SystemIdentifier};

use crate::error::{Error, Result};

/// Streams a PostgreSQL cluster's WAL into a repository within a second of its creation, takes base backups, and proves
/// that nothing is missing.
#[derive(Debug, Parser)]
#[command(name = "wal-archiver", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the daemon: streams every configured cluster, seals and stores its WAL, serves HTTP.
    Run {
        /// Where to serve HTTP. Default: 127.0.0.1:8432.
        #[arg(long, value_name = "ADDR:PORT")]
        http: Option<SocketAddr>,
    },
    /// Archives one file of `pg_wal`: `archive_command = 'wal-archiver push %p'`.
    Push {
        /// The file; PostgreSQL writes %p.
        path: PathBuf,
    },
    /// Takes over the WAL that another tool archived: a folder of `cp`, of `pg_receivewal`, or a pgBackRest repository.
    Import {
        /// The folder.
        directory: PathBuf,
        /// Only reports where that archive and ours differ.
        #[arg(long)]
        compare: bool,
    },
    /// Takes a base backup now.
    Backup {
        /// What to take.
        #[arg(long = "type", value_enum, default_value = "full")]
        kind: BackupType,
        /// A text to find it by.
        #[arg(long, default_value = "")]
        label: String,
    },
    /// Shows each cluster: what is archived, up to where, and what stands in the way.
    Status {
        /// One JSON document.
        #[arg(long)]
        json: bool,
        /// One line for Nagios and Icinga, with its exit code: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.
        #[arg(long, conflicts_with = "json")]
        nagios: bool,
    },
    /// Tells people of alerts.
    #[command(subcommand)]
    Notify(NotifyCommand),
    /// Checks every precondition, one line each, with the remedy.
    Check,
    /// Proves the continuity of the WAL and the integrity of every object.
    Verify {
        /// Decodes every record too.
        #[arg(long)]
        deep: bool,
        /// Puts sound copies from the other repositories in the place of damaged and missing objects.
        #[arg(long)]
        repair: bool,
    },
    /// Applies retention: marks what is no longer kept, and removes what was marked `expire_grace`
    /// ago. Says before which moments cannot be restored any more.
    Expire {
        /// Says what would be marked and removed, and changes nothing.
        #[arg(long)]
        dry_run: bool,
        /// One JSON document.
        #[arg(long)]
        json: bool,
        /// An earlier epoch of the cluster, by its system identifier; without it the one that is archived now.
        #[arg(long, value_name = "N")]
        system: Option<SystemIdentifier>,
    },
    /// The catalog, a cache of what the repository holds.
    #[command(subcommand)]
    Catalog(CatalogCommand),
    /// The system identifiers that the cluster has had.
    #[command(subcommand)]
    Epoch(EpochCommand),
    /// The configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// The keys of an encrypted repository.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Retention locks of buckets with Object Lock.
    #[command(subcommand)]
    Lock(LockCommand),
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum BackupType {
    /// Everything.
    Full,
}

#[derive(Debug, Subcommand)]
enum CatalogCommand {
    /// Makes the catalog anew from the repository alone.
    Rebuild,
}

#[derive(Debug, Subcommand)]
enum EpochCommand {
    /// Archives the server from now on although it has a new system identifier, which `pg_upgrade`
    /// or initdb gave it; the old epoch stays restorable. Or begins a new archive where the
    /// repository was emptied or exchanged. The daemon has to be stopped.
    Begin {
        /// The server's new system identifier, so that no other server is taken by mistake.
        #[arg(long, value_name = "N")]
        system_identifier: SystemIdentifier,
    },
}

#[derive(Debug, Subcommand)]
enum NotifyCommand {
    /// Sends a test to every receiver of the configuration, from here.
    Test,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Validates the configuration.
    Check,
    /// Prints the resolved settings, secrets masked.
    Show,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Makes a key: a line for the file, variable or command that the configuration names.
    New {
        /// A new file for it, readable by its owner only. Default: standard output.
        path: Option<PathBuf>,
    },
    /// Proves that the configured keys open every data key.
    Check,
    /// Wraps every data key for every configured key; no object changes.
    Rewrap,
}

#[derive(Debug, Subcommand)]
enum LockCommand {
    /// Locks what the kept backups need, their WAL up to now included, for longer. No lock gets shorter.
    Extend {
        /// For how many days from now.
        #[arg(long, value_name = "N")]
        days: u32,
        /// The oldest backup to keep. Default: the oldest there is.
        #[arg(long, value_name = "ID")]
        from_backup: Option<BackupId>,
        /// Who may lift the lock before.
        #[arg(long, value_enum, default_value = "governance")]
        mode: LockModeArg,
        /// Counts, and locks nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LockModeArg {
    /// Who has the permission `s3:BypassGovernanceRetention`.
    Governance,
    /// Nobody, not even the owner of the account.
    Compliance,
}

/// Runs a command.
///
/// # Errors
/// What stopped it; [`Error::exit_kind`] is the exit code.
pub fn run(cli: Cli) -> Result<()> {
    if let Command::Key(KeyCommand::New { path }) = &cli.command {
        return key::new(path.as_deref());
    }
    let settings = Settings::resolve(&cli.common)?;
    match cli.command {
        Command::Run { http } => run::run(cli.common, settings, http),
        Command::Import { directory, compare } => import::run(one(&settings)?, &directory, compare),
        // Asking a daemon is the quick program's part; here none answered.
        Command::Push { path } => {
            let settings = one(&settings)?;
            let repository = Repository::open_known(settings)?;
            Ok(intake::push_alone(settings, &repository, &path)?)
        }
        Command::Backup {
            kind: BackupType::Full,
            label,
        } => backup::backup(one(&settings)?, &label),
        Command::Status { nagios: true, .. } => nagios::nagios(&settings),
        Command::Status { json, .. } => status::status(&settings, json),
        Command::Notify(NotifyCommand::Test) => notify::test(&settings),
        Command::Check => check::check(&settings),
        Command::Verify { deep, repair } => verify::verify(&settings, deep, repair),
        Command::Expire {
            dry_run,
            json,
            system,
        } => expire::expire(&settings, system, dry_run, json),
        Command::Catalog(CatalogCommand::Rebuild) => catalog::rebuild(&settings),
        Command::Epoch(EpochCommand::Begin { system_identifier }) => {
            epoch::begin(one(&settings)?, system_identifier)
        }
        Command::Config(ConfigCommand::Check) => config::check(&settings),
        Command::Config(ConfigCommand::Show) => config::show(&settings),
        Command::Key(KeyCommand::New { path }) => key::new(path.as_deref()),
        Command::Key(KeyCommand::Check) => key::check(&settings),
        Command::Key(KeyCommand::Rewrap) => key::rewrap(&settings),
        Command::Lock(LockCommand::Extend {
            days,
            from_backup,
            mode,
            dry_run,
        }) => {
            let mode = match mode {
                LockModeArg::Governance => LockMode::Governance,
                LockModeArg::Compliance => LockMode::Compliance,
            };
            lock::extend(&settings, days, from_backup.as_ref(), mode, dry_run)
        }
    }
}

/// One clear line on standard error.
pub fn report(error: &Error) {
    output::error_line(&error.to_string());
}

/// The one cluster a command is about.
fn one(settings: &Settings) -> Result<&ClusterSettings> {
    Ok(settings.cluster()?)
}

/// A runtime for commands that talk to PostgreSQL. Two threads: one reads sockets while the other waits on files.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::io("start the runtime of", "wal-archiver"))
}
