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

mod audit;
mod backup;
mod backups;
mod catalog;
mod check;
mod config;
mod daemon;
mod delete;
mod epoch;
mod expire;
mod facts;
mod import;
mod interrupt;
mod key;
mod lock;
mod nagios;
mod notify;
mod output;
mod places;
mod remove;
mod resetwal;
mod resources;
mod run;
mod status;
mod switchover;
mod verify;

use std::{net::SocketAddr, path::PathBuf};

use clap::{Parser, Subcommand, ValueEnum};
use quick::push::wait_for_daemon;
use repository::{
    Repository, access,
    config::{ClusterSettings, CommonArgs, Settings, parse_duration},
    store::LockMode,
};
use wal_format::{BackupId, NoteChange, OutcomeKind, SystemIdentifier};

use self::audit::Form;
use crate::{
    error::{Error, Result},
    verify::clusters::VerifyOptions,
};

/// Streams a PostgreSQL cluster's WAL into a repository within a second of its creation, takes base
/// backups, and proves that nothing is missing.
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
        /// The address at which to serve HTTP. Default: 127.0.0.1:8432.
        #[arg(long, value_name = "ADDR:PORT")]
        http: Option<SocketAddr>,
    },
    /// Archives one file of `pg_wal`: `archive_command = 'wal-archiver push %p'`.
    Push {
        /// The path of the file; PostgreSQL replaces %p by it.
        path: PathBuf,
    },
    /// Imports WAL that another tool archived: a folder written by `cp` or `pg_receivewal`, or a
    /// pgBackRest repository.
    Import {
        /// The folder.
        directory: PathBuf,
        /// Only reports the differences between that archive and ours.
        #[arg(long)]
        compare: bool,
    },
    /// Takes a base backup now.
    #[command(args_conflicts_with_subcommands = true)]
    Backup {
        /// The type of backup.
        #[arg(long = "type", value_enum, default_value = "full")]
        kind: BackupType,
        /// A description, shown in lists.
        #[arg(long, default_value = "")]
        label: String,
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
        /// The address of the daemon that archives this cluster. Without an answer from it no
        /// backup begins. Default: the daemon is not asked.
        #[arg(long, value_name = "ADDR:PORT")]
        http: Option<SocketAddr>,
        #[command(subcommand)]
        action: Option<BackupCommand>,
    },
    /// Shows the state of each cluster: what is archived, up to which LSN, and any problem.
    Status {
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
        /// Prints one line for Nagios and Icinga, with its exit code: 0 OK, 1 WARNING, 2 CRITICAL,
        /// 3 UNKNOWN.
        #[arg(long, conflicts_with = "json")]
        nagios: bool,
        /// The address of the daemon. Default: `http` in the configuration.
        #[arg(long, value_name = "ADDR:PORT")]
        http: Option<SocketAddr>,
    },
    /// Sends notifications.
    #[command(subcommand)]
    Notify(NotifyCommand),
    /// Checks every precondition, one line each, with the remedy.
    Check {
        /// The address of the daemon. Default: `http` in the configuration.
        #[arg(long, value_name = "ADDR:PORT")]
        http: Option<SocketAddr>,
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Verifies that the WAL is contiguous and every object intact.
    Verify {
        /// Also decodes every record.
        #[arg(long)]
        deep: bool,
        /// Replaces damaged and missing objects by intact copies from the other repositories.
        #[arg(long)]
        repair: bool,
        /// Accepts that archived objects that are missing now are lost for good. Declares their WAL
        /// lost, so that archiving continues with what the repository holds now.
        #[arg(long)]
        accept_loss: bool,
        /// Checks only this backup and the WAL that makes it consistent. Does not record the
        /// result.
        #[arg(long, value_name = "ID", conflicts_with = "repair")]
        backup: Option<BackupId>,
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Applies retention: marks objects that are no longer kept, and removes objects that were
    /// marked `expire_grace` ago. First prints the times that can no longer be restored.
    Expire {
        /// Prints what would be marked and removed, and changes nothing.
        #[arg(long)]
        dry_run: bool,
        /// Undoes every expiry that was marked less than `expire_grace` ago.
        #[arg(long, conflicts_with = "dry_run")]
        undo: bool,
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
        /// The system identifier of an earlier epoch of the cluster. Default: the epoch that is
        /// archived now.
        #[arg(long, value_name = "N")]
        system: Option<SystemIdentifier>,
    },
    /// Checks whether the primary may be stopped, or a standby promoted, with nothing lost. Exits
    /// with 0 only when every condition holds.
    SwitchoverCheck {
        /// Tries again until every condition holds, for at most this long, for example 30s.
        #[arg(long, value_name = "DURATION")]
        wait: Option<String>,
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
        /// The address of the daemon. Default: `http` in the configuration.
        #[arg(long, value_name = "ADDR:PORT")]
        http: Option<SocketAddr>,
    },
    /// Shows the audit trail: every backup, expiry, restore, drill, verification, change of keys,
    /// epoch, reload and failover, oldest first. A record is kept for at least `audit_keep`.
    Audit {
        /// Shows only actions that began at this time or later: "10 days ago", or a time with its
        /// offset.
        #[arg(long, value_name = "TIME")]
        since: Option<String>,
        /// Shows only this kind of action: backup, delete, drill, epoch, expire, failover, key,
        /// note, reload, remove, restore or verify.
        #[arg(long, value_parser = audit::kind)]
        kind: Option<OutcomeKind>,
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
        /// Prints CSV with a header.
        #[arg(long, conflicts_with = "json")]
        csv: bool,
    },
    /// Ends the archiving of a cluster: drops the slot on the primary and on each standby, and
    /// prints what remains. The daemon must not archive the cluster any more: it is stopped, or
    /// has read a file without the cluster. Then --conninfo names the server.
    Remove {
        /// The slot, if the deleted table of the cluster named one.
        #[arg(long, value_name = "NAME")]
        slot: Option<String>,
        /// Prints what would be dropped, and changes nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// The catalog, a cache of the repository's content.
    #[command(subcommand)]
    Catalog(CatalogCommand),
    /// The system identifiers of the cluster over time.
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
    /// A full backup.
    Full,
}

#[derive(Debug, Subcommand)]
enum BackupCommand {
    /// Lists the backups, oldest first: end, size, label, description, and whether one is kept or
    /// damaged.
    List {
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Keeps a backup, whatever the retention policy says, until it is released.
    Keep {
        /// The backup, as `backup list` shows it.
        id: BackupId,
        /// The reason, shown in the list.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Lets the retention policy decide about a backup again.
    Release {
        /// The backup.
        id: BackupId,
    },
    /// Describes a backup, for lists. An empty text removes the description.
    Annotate {
        /// The backup.
        id: BackupId,
        /// The description.
        text: String,
    },
    /// Deletes one backup. The backup counts as absent at once, and its objects are removed after
    /// `expire_grace`; until then `expire --undo` brings it back. The command is refused while the
    /// retention policy keeps the backup, or no policy is configured, unless the backup is damaged
    /// and nothing is lost with it.
    Delete {
        /// The backup, as `pitr-restore list` shows it.
        id: BackupId,
        /// Deletes the backup even if the retention policy keeps it.
        #[arg(long)]
        force: bool,
        /// Prints what would be lost, and changes nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, Subcommand)]
enum CatalogCommand {
    /// Rebuilds the catalog from the repository alone.
    Rebuild,
}

#[derive(Debug, Subcommand)]
enum EpochCommand {
    /// Continues with a server that has a new system identifier after `pg_upgrade` or initdb; the
    /// old epoch stays restorable. Or begins a new archive if the repository was emptied or
    /// replaced. Or continues after `pg_resetwal`. The daemon must be stopped.
    Begin {
        /// The server's new system identifier, as a protection against the wrong server.
        #[arg(long, value_name = "N", required_unless_present = "after_resetwal")]
        system_identifier: Option<SystemIdentifier>,
        /// Continues with the same server after `pg_resetwal`: declares the WAL between the end of
        /// the archive and the server's present WAL lost. Earlier times stay restorable.
        #[arg(long, conflicts_with = "system_identifier")]
        after_resetwal: bool,
    },
}

#[derive(Debug, Subcommand)]
enum NotifyCommand {
    /// Sends a test notification to every configured receiver, from this process.
    Test,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Validates the configuration.
    Check,
    /// Prints the resolved settings, with secrets masked.
    Show,
    /// Prints a configuration file with every key, its meaning and its default.
    Example,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Generates a key: a line for the file, variable or command that the configuration names.
    New {
        /// A new file for the key, readable by its owner only. Default: standard output.
        path: Option<PathBuf>,
    },
    /// Checks that the configured keys can open every data key.
    Check,
    /// Encrypts a plain archive: new objects at once, then those that it has. Can be killed and
    /// run again.
    Encrypt,
    /// Wraps every data key with every configured key; no object changes.
    Rewrap,
}

#[derive(Debug, Subcommand)]
enum LockCommand {
    /// Extends the locks on everything that the kept backups need, including the WAL up to now. No
    /// lock becomes shorter.
    Extend {
        /// The number of days from now.
        #[arg(long, value_name = "N")]
        days: u32,
        /// The oldest backup to keep. Default: the oldest backup in the repository.
        #[arg(long, value_name = "ID")]
        from_backup: Option<BackupId>,
        /// The permission that is needed to remove the lock before it ends.
        #[arg(long, value_enum, default_value = "governance")]
        mode: LockModeArg,
        /// Only counts the objects, and locks nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LockModeArg {
    /// A user with the permission `s3:BypassGovernanceRetention` can remove the lock.
    Governance,
    /// Nobody can remove the lock, not even the owner of the account.
    Compliance,
}

/// Runs a command.
///
/// # Errors
/// The error that stopped the command. [`Error::exit_kind`] is the exit code.
pub fn run(cli: Cli) -> Result<()> {
    if let Command::Key(KeyCommand::New { path }) = &cli.command {
        return key::new(path.as_deref());
    }
    if let Command::Config(ConfigCommand::Example) = &cli.command {
        config::example();
        return Ok(());
    }
    let settings = match cli.command {
        Command::Push { .. } => Settings::resolve_for_storage(&cli.common)?,
        Command::Remove { .. } => Settings::resolve_for_removal(&cli.common)?,
        _ => Settings::resolve(&cli.common)?,
    };
    match &cli.command {
        Command::Run { .. } => resources::require_for_daemon(settings.clusters.len())?,
        Command::Config(_) => {}
        _ => resources::require_for_command()?,
    }
    end_at_a_signal(&cli.command)?;
    keep_private(&settings);
    let has_result = matches!(
        cli.command,
        Command::Backup { .. } | Command::Verify { .. } | Command::Expire { .. }
    );
    let ended = execute(cli, &settings);
    if has_result {
        settings.clusters.iter().for_each(wait_for_daemon);
    }
    ended
}

fn execute(cli: Cli, settings: &Settings) -> Result<()> {
    match cli.command {
        Command::Run { http } => run::run(cli.common, settings.clone(), http),
        Command::Import { directory, compare } => import::run(one(settings)?, &directory, compare),
        // The quick program asks the daemon. This code runs if no daemon answered.
        Command::Push { path } => {
            let settings = one(settings)?;
            let repository = Repository::open_known(settings)?;
            Ok(intake::push_alone(settings, &repository, &path)?)
        }
        Command::Backup {
            action: Some(BackupCommand::Delete { id, force, dry_run }),
            ..
        } => delete::delete(one(settings)?, &id, force, dry_run),
        Command::Backup {
            action: Some(BackupCommand::List { json }),
            ..
        } => backups::list(settings, json),
        Command::Backup {
            action: Some(BackupCommand::Keep { id, reason }),
            ..
        } => backups::note(one(settings)?, &id, NoteChange::Keep, &reason),
        Command::Backup {
            action: Some(BackupCommand::Release { id }),
            ..
        } => backups::note(one(settings)?, &id, NoteChange::Release, ""),
        Command::Backup {
            action: Some(BackupCommand::Annotate { id, text }),
            ..
        } => backups::note(one(settings)?, &id, NoteChange::Annotate, &text),
        Command::Backup {
            kind: BackupType::Full,
            label,
            json,
            http,
            action: None,
        } => {
            places::require_outside(settings)?;
            if http.is_some() {
                daemon::require(&at(settings, http), one(settings)?)?;
            }
            backup::backup(one(settings)?, &label, json)
        }
        Command::Status {
            nagios: true, http, ..
        } => nagios::nagios(&at(settings, http)),
        Command::Status { json, http, .. } => status::status(&at(settings, http), json),
        Command::Notify(NotifyCommand::Test) => notify::test(settings),
        Command::Check { http, json } => check::check(&at(settings, http), json),
        Command::Remove { slot, dry_run } => {
            let mut cluster = one(settings)?.clone();
            cluster.slot = slot.unwrap_or(cluster.slot);
            remove::remove(&cluster, settings.file.as_deref(), dry_run)
        }
        Command::Verify {
            deep,
            repair,
            accept_loss,
            backup,
            json,
        } => {
            let options = VerifyOptions {
                deep,
                repair,
                accept_loss,
                backup,
                json,
            };
            verify::verify(settings, &options)
        }
        Command::Expire {
            undo: true,
            json,
            system,
            ..
        } => expire::undo(settings, system, json),
        Command::Expire {
            undo: false,
            dry_run,
            json,
            system,
        } => expire::expire(settings, system, dry_run, json),
        Command::SwitchoverCheck { wait, json, http } => {
            let wait = wait
                .map(|text| parse_duration("--wait", &text))
                .transpose()?;
            switchover::check(&at(settings, http), wait.unwrap_or_default(), json)
        }
        Command::Audit {
            since,
            kind,
            json,
            csv,
        } => {
            let form = match (json, csv) {
                (true, _) => Form::Json,
                (_, true) => Form::Csv,
                _ => Form::Table,
            };
            audit::audit(settings, since.as_deref(), kind, form)
        }
        Command::Catalog(CatalogCommand::Rebuild) => catalog::rebuild(settings),
        Command::Epoch(EpochCommand::Begin {
            system_identifier: Some(system),
            ..
        }) => epoch::begin(one(settings)?, system),
        Command::Epoch(EpochCommand::Begin { .. }) => resetwal::declare(one(settings)?),
        Command::Config(ConfigCommand::Check) => config::check(settings),
        Command::Config(ConfigCommand::Show) => config::show(settings),
        Command::Config(ConfigCommand::Example) => {
            config::example();
            Ok(())
        }
        Command::Key(KeyCommand::New { path }) => key::new(path.as_deref()),
        Command::Key(KeyCommand::Check) => key::check(settings),
        Command::Key(KeyCommand::Encrypt) => key::encrypt(settings),
        Command::Key(KeyCommand::Rewrap) => key::rewrap(settings),
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
            lock::extend(settings, days, from_backup.as_ref(), mode, dry_run)
        }
    }
}

/// Says at SIGINT or SIGTERM what a command leaves. The daemon and a backup end in order instead.
fn end_at_a_signal(command: &Command) -> Result<()> {
    let (left, json) = match command {
        Command::Verify { json, .. } => (
            "the result of this cluster is not recorded; those of the clusters before it are. What was repaired or accepted \
             as lost stays so. Run `wal-archiver verify` again",
            *json,
        ),
        Command::Expire {
            json, undo: true, ..
        } => (
            "what was restored stays restored. Run `wal-archiver expire --undo` again within the grace",
            *json,
        ),
        Command::Expire {
            json,
            dry_run: false,
            ..
        } => (
            "what is marked as expired stays hidden and can be restored with `wal-archiver expire --undo` within the grace; \
             what is removed is removed. The next run of `wal-archiver expire` goes on",
            *json,
        ),
        Command::Import { .. } => (
            "what was imported is in the repository. Run the same command again: it goes on with the rest",
            false,
        ),
        Command::Key(KeyCommand::Encrypt) => (
            "the archive can be read with its key, each object in the form that it has. Run `wal-archiver key encrypt` \
             again: it goes on with the rest",
            false,
        ),
        Command::Push { .. } => (
            "the file is not reported as archived. PostgreSQL runs the command again",
            false,
        ),
        _ => return Ok(()),
    };
    interrupt::end_with(left, json)
}

/// Writes an error as one line to standard error.
pub fn report(error: &Error) {
    output::error_line(&error.to_string());
}

/// Takes the group's access from all files that this process creates, unless a group shares a
/// spool.
fn keep_private(settings: &Settings) {
    let is_shared = |cluster: &ClusterSettings| {
        let own = cluster.spool.join(cluster.name.as_str());
        let mut places = [&cluster.spool, &own, &cluster.catalog].into_iter();
        cluster.spool_access.is_some() || places.any(|place| access::is_shared(place))
    };
    if !settings.clusters.iter().any(is_shared) {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    }
}

/// Returns the settings with another address of the daemon.
fn at(settings: &Settings, http: Option<SocketAddr>) -> Settings {
    Settings {
        http: http.unwrap_or(settings.http),
        ..settings.clone()
    }
}

/// Returns the only cluster. Fails if several are configured and none is named.
fn one(settings: &Settings) -> Result<&ClusterSettings> {
    Ok(settings.cluster()?)
}

/// Creates a runtime for commands that connect to PostgreSQL. It has two threads: one reads sockets
/// while the other waits for files.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::io("start the runtime of", "wal-archiver"))
}
