//! The settings of a parent that reach outside its copy, with the value that each gets in the copy,
//! and the libraries whose background workers act without a command.
//!
//! Invariant: every setting of PostgreSQL 13 to 18 that runs a command, names a file or a
//! directory, or connects is in [`SETTINGS`] or listed as harmless in
//! `restorer/tests/isolation/judged.rs`, whose test queries the servers themselves.

use self::{
    Group::{Archiving, General, Recovery},
    How::{Comment, Value},
    When::{Always, Contains, LeadsElsewhere, LeadsOutside, Set},
};

/// The versions that have a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Majors {
    /// The first major version with the setting.
    pub from: u16,
    /// The last one, if a later version removed the setting.
    pub to: Option<u16>,
}

impl Majors {
    const ALL: Self = Self { from: 13, to: None };

    const fn since(from: u16) -> Self {
        Self { from, to: None }
    }

    const fn until(to: u16) -> Self {
        Self {
            from: 13,
            to: Some(to),
        }
    }

    /// Returns true if `major` has the setting.
    #[must_use]
    pub fn has(self, major: u16) -> bool {
        major >= self.from && self.to.is_none_or(|to| major <= to)
    }
}

/// The condition on the parent's value under which a setting is isolated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Always.
    Always,
    /// The parent's value, as a path relative to the data directory, leads out of it.
    LeadsOutside,
    /// As [`When::LeadsOutside`], or the parent's value is a relative path: PostgreSQL resolves
    /// this one from the directory in which it is started (`make_absolute_path` in
    /// `SelectConfigFiles`).
    LeadsElsewhere,
    /// The parent's value contains this text.
    Contains(&'static str),
    /// The parent sets it to any value other than the isolated value.
    Set,
}

/// The way in which a setting is isolated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// By this value in `postgresql.auto.conf`, which overrides every other file.
    Value(&'static str),
    /// By turning its lines into comments. No value in `postgresql.auto.conf` can override such a
    /// setting, because PostgreSQL resolves it before that file or apart from it
    /// (`SelectConfigFiles`).
    Comment,
}

/// The role of a setting in the isolation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// It stays unchanged with `--keep-archiving`.
    Archiving,
    /// It has an effect during recovery only, so a release leaves it until recovery has ended.
    Recovery,
    /// Everything else.
    General,
}

/// A setting that reaches outside the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isolated {
    /// The name of the setting.
    pub name: &'static str,
    /// The versions that have the setting.
    pub majors: Majors,
    /// The condition on the parent's value.
    pub when: When,
    /// The way in which the setting is isolated.
    pub how: How,
    /// The role of the setting.
    pub group: Group,
    /// The reason, which completes the phrase "would otherwise".
    pub why: &'static str,
}

/// The directory of the copy's socket. It always exists, is accessible to the owner only, and is
/// left out of every base backup (`excludeDirContents` in `basebackup.c`), so a backup of the copy
/// contains no lock file of a socket.
pub const SOCKET_DIRECTORY: &str = "pg_stat_tmp";

const fn row(
    name: &'static str,
    majors: Majors,
    when: When,
    how: How,
    group: Group,
    why: &'static str,
) -> Isolated {
    Isolated {
        name,
        majors,
        when,
        how,
        group,
        why,
    }
}

/// Every setting that is isolated, in the order in which it is reported.
pub const SETTINGS: &[Isolated] = &[
    row(
        "archive_mode",
        Majors::ALL,
        Always,
        Value("off"),
        Archiving,
        "write into its parent's archive",
    ),
    row(
        "archive_command",
        Majors::ALL,
        Always,
        Value(""),
        Archiving,
        "write into its parent's archive",
    ),
    row(
        "archive_library",
        Majors::since(15),
        Always,
        Value(""),
        Archiving,
        "write into its parent's archive",
    ),
    row(
        "synchronous_standby_names",
        Majors::ALL,
        Always,
        Value(""),
        Archiving,
        "wait for its parent's standbys",
    ),
    row(
        "synchronized_standby_slots",
        Majors::since(17),
        Always,
        Value(""),
        General,
        "wait for its parent's standbys",
    ),
    row(
        "archive_cleanup_command",
        Majors::ALL,
        Always,
        Value(""),
        Recovery,
        "remove files from its parent's archive",
    ),
    row(
        "recovery_end_command",
        Majors::ALL,
        Always,
        Value(""),
        Recovery,
        "run its parent's command when recovery ends",
    ),
    row(
        "recovery_min_apply_delay",
        Majors::ALL,
        Always,
        Value("0"),
        Recovery,
        "wait before it replays a commit",
    ),
    row(
        "promote_trigger_file",
        Majors::until(15),
        Always,
        Value(""),
        Recovery,
        "remove a file outside of it, and end recovery early",
    ),
    row(
        "primary_conninfo",
        Majors::ALL,
        Always,
        Value(""),
        General,
        "connect to its parent's primary",
    ),
    row(
        "primary_slot_name",
        Majors::ALL,
        Always,
        Value(""),
        General,
        "use its parent's replication slot",
    ),
    row(
        "sync_replication_slots",
        Majors::since(17),
        Always,
        Value("off"),
        General,
        "connect to its parent's primary",
    ),
    row(
        "max_logical_replication_workers",
        Majors::ALL,
        Always,
        Value("0"),
        General,
        "consume the changes that its parent's subscriptions wait for",
    ),
    row(
        "data_directory",
        Majors::ALL,
        Set,
        Comment,
        General,
        "run on its parent's data directory",
    ),
    row(
        "hba_file",
        Majors::ALL,
        LeadsElsewhere,
        Comment,
        General,
        "follow its parent's file",
    ),
    row(
        "ident_file",
        Majors::ALL,
        LeadsElsewhere,
        Comment,
        General,
        "follow its parent's file",
    ),
    row(
        "external_pid_file",
        Majors::ALL,
        LeadsOutside,
        Value("pg_stat_tmp/external.pid"),
        General,
        "overwrite its parent's pid file",
    ),
    row(
        "unix_socket_directories",
        Majors::ALL,
        Always,
        Value(SOCKET_DIRECTORY),
        General,
        "take connections that are meant for its parent",
    ),
    row(
        "unix_socket_group",
        Majors::ALL,
        Always,
        Value(""),
        General,
        "need a group that this host may not have",
    ),
    row(
        "unix_socket_permissions",
        Majors::ALL,
        Always,
        Value("0700"),
        General,
        "let other users of this host connect without a password",
    ),
    row(
        "listen_addresses",
        Majors::ALL,
        Always,
        Value(""),
        General,
        "take connections that are meant for its parent",
    ),
    row(
        "bonjour",
        Majors::ALL,
        Set,
        Value("off"),
        General,
        "announce itself as its parent",
    ),
    row(
        "ssl",
        Majors::ALL,
        Set,
        Value("off"),
        General,
        "need its parent's certificate, and run ssl_passphrase_command",
    ),
    row(
        "log_directory",
        Majors::ALL,
        LeadsOutside,
        Value("log"),
        General,
        "write into its parent's log",
    ),
    row(
        "log_filename",
        Majors::ALL,
        Contains("/"),
        Value("postgresql-%Y-%m-%d_%H%M%S.log"),
        General,
        "write into its parent's log",
    ),
    row(
        "log_destination",
        Majors::ALL,
        Contains("syslog"),
        Value("stderr"),
        General,
        "write into the host's log in its parent's name",
    ),
    row(
        "stats_temp_directory",
        Majors::until(14),
        LeadsOutside,
        Value("pg_stat_tmp"),
        General,
        "overwrite its parent's statistics",
    ),
    row(
        "basebackup_to_shell.command",
        Majors::since(15),
        Set,
        Value(""),
        General,
        "run its parent's command for a backup",
    ),
];

/// The way in which a library's background workers are prevented from acting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Worker {
    /// The copy does not load the library.
    NotLoaded,
    /// These settings stop its workers; the library is loaded, because its own tables need it.
    Settings(&'static [(&'static str, &'static str)]),
    /// Its workers, if it has any, act inside the data directory only.
    Harmless,
}

/// The known libraries of `shared_preload_libraries`; the output names all others.
pub const LIBRARIES: &[(&str, Worker)] = &[
    ("bdr", Worker::NotLoaded),
    ("bg_mon", Worker::NotLoaded),
    ("percona_pg_telemetry", Worker::NotLoaded),
    ("pg_cron", Worker::NotLoaded),
    ("pg_failover_slots", Worker::NotLoaded),
    ("pg_net", Worker::NotLoaded),
    ("pg_partman_bgw", Worker::NotLoaded),
    ("pg_task", Worker::NotLoaded),
    ("pgautofailover", Worker::NotLoaded),
    ("pglogical", Worker::NotLoaded),
    ("spock", Worker::NotLoaded),
    (
        "citus",
        Worker::Settings(&[
            ("citus.recover_2pc_interval", "-1"),
            ("citus.defer_shard_delete_interval", "-1"),
            ("citus.background_task_queue_interval", "-1"),
            ("citus.distributed_deadlock_detection_factor", "-1"),
            ("citus.enable_statistics_collection", "off"),
        ]),
    ),
    (
        "timescaledb",
        Worker::Settings(&[("timescaledb.max_background_workers", "0")]),
    ),
    ("auth_delay", Worker::Harmless),
    ("auto_explain", Worker::Harmless),
    ("passwordcheck", Worker::Harmless),
    ("pg_hint_plan", Worker::Harmless),
    ("pg_prewarm", Worker::Harmless),
    ("pg_qualstats", Worker::Harmless),
    ("pg_squeeze", Worker::Harmless),
    ("pg_stat_kcache", Worker::Harmless),
    ("pg_stat_monitor", Worker::Harmless),
    ("pg_stat_statements", Worker::Harmless),
    ("pg_wait_sampling", Worker::Harmless),
    ("pgaudit", Worker::Harmless),
    ("plpgsql", Worker::Harmless),
    ("set_user", Worker::Harmless),
    ("test_decoding", Worker::Harmless),
];
