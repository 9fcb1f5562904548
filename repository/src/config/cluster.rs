//! The settings of one cluster ([`ClusterSettings`]), from its table, the defaults and the flags.

use std::{fmt, path::PathBuf, time::Duration};

use wal_format::ClusterName;

use super::{
    CommonArgs, DrillSettings, LockSettings, ScheduleSettings, WalsenderSettings,
    file::ClusterTable, parse_duration, repositories, s3::S3Settings, url::RepositoryPlace,
};
use crate::{
    Error, Result,
    access::FolderAccess,
    store::{Patience, RequestMeter},
};

/// Default of `remote_flush_bytes`: a segment of the default size. With less, the WAL of a busy
/// server would be uploaded twice.
const FLUSH_BYTES_DEFAULT: u64 = 16 << 20;
/// Default of `gap_grace`: a standby that restarts is available again by then. No newer WAL is
/// archived meanwhile, so it is not longer.
const GAP_GRACE_DEFAULT: Duration = Duration::from_secs(30);
/// Default of `expire_interval` and `expire_grace`: a day in which an operator can check what
/// expires, and a restore that has begun can end.
const EXPIRE_DEFAULT: Duration = Duration::from_secs(86_400);
/// The limits of `backup_rate_limit`, in bytes per second.
const BACKUP_RATE_MIN: u64 = 32 << 10;
const BACKUP_RATE_MAX: u64 = 1 << 30;
/// Default of `audit_keep`: an auditor asks for the past year, some weeks after its end.
const AUDIT_KEEP_DEFAULT: Duration = Duration::from_secs(400 * 86_400);
/// The minimum of `remote_flush_bytes`. Below it, an object costs more than its content.
const FLUSH_BYTES_MIN: u64 = 64 << 10;

/// Default of `application_name`. It does not follow the slot: commits would wait for ever where
/// `synchronous_standby_names` has this name.
const APPLICATION_NAME_DEFAULT: &str = "tidemark";
/// PostgreSQL cuts a longer name off.
const APPLICATION_NAME_BYTES_MAX: usize = 63;
/// The minimum of `spool_limit_bytes`. Below it, every short outage of the repository would stop
/// the stream.
const SPOOL_LIMIT_MIN: u64 = 4 << 20;
/// Default of `primary_wal_max_bytes`: about an hour at 4 MiB/s.
const PRIMARY_WAL_MAX_DEFAULT: u64 = 16 << 30;
/// The minimum of `primary_wal_max_bytes`. Below it, a checkpoint alone would count as a danger.
const PRIMARY_WAL_MAX_MIN: u64 = 4 << 20;

/// The choice of what to protect when the spool is full and the repository accepts nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenFull {
    /// The archive: the slot keeps WAL on the primary until it is archived, and may fill the
    /// primary's disk.
    #[default]
    ProtectArchive,
    /// The primary: the slot is dropped when it keeps too much WAL. The WAL that PostgreSQL removes
    /// then is lost to the archive.
    ProtectPrimary,
}

impl WhenFull {
    /// Returns the name in the configuration file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ProtectArchive => "protect-archive",
            Self::ProtectPrimary => "protect-primary",
        }
    }

    /// Returns the consequence, in a sentence.
    #[must_use]
    pub fn cost(self) -> &'static str {
        match self {
            Self::ProtectArchive => {
                "nothing is given up: while the spool is full the slot keeps WAL on the primary, whose disk may fill"
            }
            Self::ProtectPrimary => {
                "while the spool is full and the slot keeps too much, the slot is dropped: WAL that PostgreSQL removes then is \
                 lost to the archive, no moment in it can be restored, and a base backup is taken behind it"
            }
        }
    }
}

/// The time at which WAL is reported to PostgreSQL as flushed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Acknowledge {
    /// When it survives a power loss of this host.
    #[default]
    Local,
    /// When it is stored in the repository.
    Remote,
}

/// The repositories that must contain an object before it counts as stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Required {
    /// Any one of them. An unavailable repository delays nothing, and is later completed from
    /// another.
    #[default]
    Any,
    /// All of them. With `acknowledge = "remote"`, no commit returns before that.
    All,
}

/// The resolved settings of a cluster.
#[derive(Clone, PartialEq)]
pub struct ClusterSettings {
    /// Its name in the repository.
    pub name: ClusterName,
    /// The connection to the server. It may contain a password, so print it only in parsed form.
    pub conninfo: String,
    /// The replication slot. Default: `tidemark_` and the cluster's name, with `_` for `-`.
    pub slot: String,
    /// Our name in `pg_stat_replication` and `synchronous_standby_names`, unless the connection
    /// settings name one. Default: `tidemark`.
    pub application_name: String,
    /// The place of its objects.
    pub repository: RepositoryPlace,
    /// The directory for local WAL that is not sealed yet.
    pub spool: PathBuf,
    /// The group that shares the spool. Default: only the user of the daemon may use it.
    pub spool_access: Option<FolderAccess>,
    /// The maximum WAL in the spool that is not in the repository. Default: limited by the disk
    /// only.
    pub spool_limit_bytes: Option<u64>,
    /// The choice of what to protect when the spool is full. Default: the archive.
    pub when_full: WhenFull,
    /// With [`WhenFull::ProtectPrimary`]: the maximum WAL that the slot may keep on the primary
    /// while the spool is full. Default: 16 GiB.
    pub primary_wal_max_bytes: u64,
    /// The directory of the catalog. Default: `{spool}/{name}/catalog`.
    pub catalog: PathBuf,
    /// Servers, for example standbys, from which WAL is requested that the primary no longer has.
    /// Default: none. They may contain passwords, like `conninfo`.
    pub heal_from: Vec<String>,
    /// Standbys on which a slot of ours is kept, so that a failover to one of them finds the WAL
    /// that was not archived yet. Missing WAL is requested from them too, after `heal_from`.
    /// Default: none. They may contain passwords, like `conninfo`.
    pub standbys: Vec<String>,
    /// The time for which the archiver searches for missing WAL before it declares it lost and
    /// continues after it. Default: 30 s.
    pub gap_grace: Duration,
    /// The time at which WAL is reported to PostgreSQL as flushed. Default: local.
    pub acknowledge: Acknowledge,
    /// The maximum age of new WAL that is not in the repository yet. Default: 1 s.
    pub remote_flush_interval: Duration,
    /// The maximum amount of new WAL that is not in the repository yet, whatever its age. Default:
    /// 16 MiB.
    pub remote_flush_bytes: u64,
    /// The target RPO. Default: 5 s.
    pub rpo_target: Duration,
    /// The target RTO. Default: no target.
    pub rto_target: Option<Duration>,
    /// The age at which the newest base backup is overdue. Default: 7 days.
    pub backup_max_age: Duration,
    /// The maximum rate at which the server sends a base backup, in bytes per second. Default: no
    /// limit.
    pub backup_rate_limit: Option<u64>,
    /// The times at which the daemon takes base backups and starts drills. Default: never.
    pub schedules: ScheduleSettings,
    /// The age at which the newest restore drill is overdue. Default: drills are never overdue.
    pub drill_max_age: Option<Duration>,
    /// The settings of restore drills.
    pub drill: DrillSettings,
    /// The age at which the newest verification is overdue. Default: verifications are never
    /// overdue.
    pub verify_max_age: Option<Duration>,
    /// The interval at which the daemon applies retention. Default: 1 day.
    pub expire_interval: Duration,
    /// The time for which expired objects stay in the repository, hidden, before they are removed.
    /// Default: 1 day.
    pub expire_grace: Duration,
    /// The time for which a record of the audit trail is kept at least. Default: 400 days.
    pub audit_keep: Duration,
    /// The settings with which the daemon locks the objects that backups need. Default: no locks.
    pub lock: Option<LockSettings>,
    /// zstd's level for WAL and backups. Default: 1.
    pub compression_level: i32,
    /// The number of threads that seal segments. Default: 2.
    pub seal_threads: usize,
    /// The server from which standbys stream the archive. Default: none.
    pub walsender: Option<WalsenderSettings>,
    /// The absolute path of the configuration file; `None` if no file was read.
    pub file: Option<PathBuf>,
}

impl fmt::Debug for ClusterSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterSettings")
            .field("name", &self.name)
            .field("conninfo", &"…")
            .field("slot", &self.slot)
            .field("repository", &self.repository)
            .field("spool", &self.spool)
            .finish_non_exhaustive()
    }
}

pub(super) fn resolve(
    args: &CommonArgs,
    name: ClusterName,
    table: &ClusterTable,
    defaults: &ClusterTable,
) -> Result<ClusterSettings> {
    let repository = args
        .repository
        .clone()
        .or_else(|| table.repository.clone())
        .or_else(|| defaults.repository.clone())
        .ok_or_else(|| {
            Error::config(
                "no repository: give --repository file:///directory or s3://bucket/prefix, or `repository` in the file",
            )
        })?;
    let spool = args
        .spool
        .clone()
        .or_else(|| table.spool.clone())
        .or_else(|| defaults.spool.clone())
        .unwrap_or_else(|| PathBuf::from("/var/lib/tidemark/spool"));
    let duration =
        |of_table: &Option<String>, of_defaults: &Option<String>, key, default| match of_table
            .as_ref()
            .or(of_defaults.as_ref())
        {
            Some(text) => parse_duration(key, text),
            None => Ok(default),
        };
    let slot = table.slot.clone().or_else(|| defaults.slot.clone());
    let slot = slot.unwrap_or_else(|| format!("tidemark_{}", name.as_str().replace('-', "_")));
    let application_name = table.application_name.clone();
    let application_name = application_name.or_else(|| defaults.application_name.clone());
    let application_name = match application_name {
        Some(name) => checked_application_name(name)?,
        None => APPLICATION_NAME_DEFAULT.to_owned(),
    };
    let [repository_access, spool_access] = table.access.resolve(&defaults.access)?;
    let encryption = table.encryption.resolve(&defaults.encryption)?;
    let keep = table.keep.over(&defaults.keep);
    let s3 = S3Settings::resolve(&table.s3, &defaults.s3)?;
    let optional = |of_table: &Option<String>, of_defaults: &Option<String>, key| {
        of_table
            .as_ref()
            .or(of_defaults.as_ref())
            .map(|text| parse_duration(key, text))
            .transpose()
    };
    let mut settings = ClusterSettings {
        file: None,
        spool_access,
        drill: table.drill.resolve(&defaults.drill)?,
        lock: table.lock.resolve(&defaults.lock)?,
        schedules: table.schedules.resolve(&defaults.schedules)?,
        backup_rate_limit: checked_rate(table.backup_rate_limit.or(defaults.backup_rate_limit))?,
        walsender: WalsenderSettings::resolve(&table.walsender, &defaults.walsender)?,
        rto_target: optional(&table.rto_target, &defaults.rto_target, "rto_target")?,
        drill_max_age: optional(
            &table.drill_max_age,
            &defaults.drill_max_age,
            "drill_max_age",
        )?,
        verify_max_age: optional(
            &table.verify_max_age,
            &defaults.verify_max_age,
            "verify_max_age",
        )?,
        backup_max_age: duration(
            &table.backup_max_age,
            &defaults.backup_max_age,
            "backup_max_age",
            Duration::from_secs(7 * 86_400),
        )?,
        conninfo: args
            .conninfo
            .clone()
            .or_else(|| table.conninfo.clone())
            .or_else(|| defaults.conninfo.clone())
            .unwrap_or_default(),
        slot,
        application_name,
        catalog: args
            .catalog
            .clone()
            .or_else(|| table.catalog.clone())
            .or_else(|| {
                defaults
                    .catalog
                    .clone()
                    .map(|catalog| catalog.join(name.as_str()))
            })
            .unwrap_or_else(|| spool.join(name.as_str()).join("catalog")),
        heal_from: table
            .heal_from
            .clone()
            .or_else(|| defaults.heal_from.clone())
            .unwrap_or_default(),
        standbys: table
            .standbys
            .clone()
            .or_else(|| defaults.standbys.clone())
            .unwrap_or_default(),
        gap_grace: duration(
            &table.gap_grace,
            &defaults.gap_grace,
            "gap_grace",
            GAP_GRACE_DEFAULT,
        )?,
        acknowledge: table
            .acknowledge
            .or(defaults.acknowledge)
            .unwrap_or_default(),
        remote_flush_interval: duration(
            &table.remote_flush_interval,
            &defaults.remote_flush_interval,
            "remote_flush_interval",
            Duration::from_secs(1),
        )?,
        rpo_target: duration(
            &table.rpo_target,
            &defaults.rpo_target,
            "rpo_target",
            Duration::from_secs(5),
        )?,
        expire_interval: duration(
            &table.expire_interval,
            &defaults.expire_interval,
            "expire_interval",
            EXPIRE_DEFAULT,
        )?,
        expire_grace: duration(
            &table.expire_grace,
            &defaults.expire_grace,
            "expire_grace",
            EXPIRE_DEFAULT,
        )?,
        audit_keep: duration(
            &table.audit_keep,
            &defaults.audit_keep,
            "audit_keep",
            AUDIT_KEEP_DEFAULT,
        )?,
        compression_level: match table.compression_level.or(defaults.compression_level) {
            Some(level @ 1..=19) => level,
            Some(level) => {
                return Err(Error::config(format!(
                    "compression_level = {level} is not from 1 to 19"
                )));
            }
            None => wal_format::sealed::DEFAULT_LEVEL,
        },
        seal_threads: match table.seal_threads.or(defaults.seal_threads) {
            Some(threads @ 1..=64) => threads,
            Some(threads) => {
                return Err(Error::config(format!(
                    "seal_threads = {threads} is not from 1 to 64"
                )));
            }
            None => 2,
        },
        remote_flush_bytes: match table.remote_flush_bytes.or(defaults.remote_flush_bytes) {
            Some(bytes @ FLUSH_BYTES_MIN..) => bytes,
            Some(bytes) => {
                return Err(Error::config(format!(
                    "remote_flush_bytes = {bytes} is less than {FLUSH_BYTES_MIN}; every tail is a request"
                )));
            }
            None => FLUSH_BYTES_DEFAULT,
        },
        spool_limit_bytes: at_least(
            "spool_limit_bytes",
            table.spool_limit_bytes.or(defaults.spool_limit_bytes),
            SPOOL_LIMIT_MIN,
        )?,
        when_full: table.when_full.or(defaults.when_full).unwrap_or_default(),
        primary_wal_max_bytes: at_least(
            "primary_wal_max_bytes",
            table
                .primary_wal_max_bytes
                .or(defaults.primary_wal_max_bytes),
            PRIMARY_WAL_MAX_MIN,
        )?
        .unwrap_or(PRIMARY_WAL_MAX_DEFAULT),
        repository: RepositoryPlace {
            others: match table
                .repositories
                .as_ref()
                .or(defaults.repositories.as_ref())
            {
                Some(tables) => {
                    repositories::others(tables, (&repository, &s3), encryption.as_ref(), &keep)?
                }
                None => Vec::new(),
            },
            url: repository,
            s3,
            encryption,
            required: table
                .repositories_required
                .or(defaults.repositories_required)
                .unwrap_or_default(),
            as_of: None,
            retention: keep.resolve()?,
            patience: Patience::default(),
            requests: RequestMeter::default(),
            access: None,
        },
        name,
        spool,
    };
    let repository = &mut settings.repository;
    for place in &mut repository.others {
        place.access.clone_from(&repository_access);
    }
    repository.access = repository_access;
    Ok(settings)
}

/// Refuses a name that PostgreSQL would change (`check_application_name`, `NAMEDATALEN`).
fn checked_application_name(name: String) -> Result<String> {
    let is_printable = name.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if name.is_empty() || name.len() > APPLICATION_NAME_BYTES_MAX || !is_printable {
        return Err(Error::config(format!(
            "application_name = \"{name}\" is not a name of 1 to {APPLICATION_NAME_BYTES_MAX} printable ASCII characters"
        )));
    }
    Ok(name)
}

/// Refuses a rate that PostgreSQL would refuse (`MAX_RATE_LOWER`, `MAX_RATE_UPPER`).
fn checked_rate(rate: Option<u64>) -> Result<Option<u64>> {
    match rate {
        Some(rate) if !(BACKUP_RATE_MIN..=BACKUP_RATE_MAX).contains(&rate) => {
            Err(Error::config(format!(
                "backup_rate_limit = {rate} is not from {BACKUP_RATE_MIN} (32 KiB) to {BACKUP_RATE_MAX} (1 GiB) bytes per \
                 second; write for example backup_rate_limit = 50000000 for 50 MB/s"
            )))
        }
        rate => Ok(rate),
    }
}

fn at_least(key: &str, bytes: Option<u64>, least: u64) -> Result<Option<u64>> {
    match bytes {
        Some(bytes) if bytes < least => Err(Error::config(format!(
            "{key} = {bytes} is less than {least}"
        ))),
        bytes => Ok(bytes),
    }
}
