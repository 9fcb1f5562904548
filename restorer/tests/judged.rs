//! Every setting of PostgreSQL that could reach outside of a restored copy is isolated or judged
//! harmless.
//!
//! A new version of PostgreSQL that brings a setting of such a class fails here until somebody has
//! judged it.

use std::collections::BTreeMap;

use restorer::isolation::table::SETTINGS;
use testbed::{cluster::Cluster, tools::servers_or_skip};

/// Settings that may reach outside: texts, which name commands, files, directories, hosts and
/// libraries, and everything about connections, replication, archiving, recovery, log files and
/// workers.
const OF_CLASS: &str = "SELECT name FROM pg_settings WHERE context <> 'internal' AND name NOT LIKE '%.%' AND (\
    vartype = 'string' OR category ~ '^Replication|File Locations|Archiv|Recovery Target|Connection Settings|\
    Where to Log|Preloading|SSL' OR name ~ 'worker|_command|_file|_director|passphrase')";

/// Settings of that class that stay as they are, each group with the reason.
const HARMLESS: &[(&str, &str)] = &[
    (
        "it changes how values are read or shown",
        "DateStyle TimeZone client_encoding lc_messages lc_monetary lc_numeric lc_time default_text_search_config \
         timezone_abbreviations log_timezone search_path createrole_self_grant restrict_nonsystem_relation_kind \
         default_table_access_method",
    ),
    (
        "a name that is only shown",
        "application_name cluster_name event_source syslog_ident bonjour_name",
    ),
    (
        "the restore writes it, and removes it when recovery has ended",
        "restore_command recovery_target recovery_target_action recovery_target_inclusive recovery_target_lsn \
         recovery_target_name recovery_target_time recovery_target_timeline recovery_target_xid",
    ),
    (
        "the restore removes the libraries whose workers act without being asked from it",
        "shared_preload_libraries",
    ),
    (
        "code that is loaded from the installation, and acts for a session that asks for it",
        "dynamic_library_path extension_control_path extension_destdir jit_provider local_preload_libraries \
         session_preload_libraries oauth_validator_libraries output_plugin_libraries",
    ),
    (
        "a file that is only read, and only with ssl, which is off, or for a client that asks",
        "ssl_ca_file ssl_cert_file ssl_crl_dir ssl_crl_file ssl_dh_params_file ssl_key_file krb_server_keyfile",
    ),
    (
        "it counts with ssl only, which is off",
        "ssl_ciphers ssl_ecdh_curve ssl_groups ssl_tls13_ciphers ssl_max_protocol_version ssl_min_protocol_version \
         ssl_passphrase_command ssl_passphrase_command_supports_reload ssl_prefer_server_ciphers ssl_renegotiation_limit",
    ),
    (
        "not in a file: only the command line of a start sets it",
        "config_file",
    ),
    (
        "a name of an object inside of the cluster, or a list of kinds",
        "default_tablespace temp_tablespaces wal_consistency_checking backtrace_functions debug_io_direct log_connections",
    ),
    (
        "a form of the log in the log's own place",
        "log_line_prefix log_file_mode log_rotation_age log_rotation_size log_truncate_on_rotation logging_collector \
         log_replication_commands log_temp_files syslog_facility syslog_sequence_numbers syslog_split_messages",
    ),
    (
        "without archiving it switches segments, and nothing leaves",
        "archive_timeout",
    ),
    (
        "a socket in a private directory, a port of the loopback address; --start chooses a free port",
        "port",
    ),
    (
        "a limit on clients that connect to the copy",
        "client_connection_check_interval max_connections reserved_connections superuser_reserved_connections \
         tcp_keepalives_count tcp_keepalives_idle tcp_keepalives_interval tcp_user_timeout max_wal_senders \
         wal_sender_timeout",
    ),
    (
        "it counts for a walreceiver only, and the copy has none",
        "hot_standby_feedback wal_receiver_create_temp_slot wal_receiver_status_interval wal_receiver_timeout",
    ),
    (
        "workers inside of the cluster",
        "autovacuum_max_workers autovacuum_worker_slots io_workers max_parallel_maintenance_workers max_parallel_workers \
         max_parallel_workers_per_gather max_worker_processes",
    ),
    (
        "workers of subscriptions, of which the copy starts none",
        "max_parallel_apply_workers_per_subscription max_sync_workers_per_subscription max_active_replication_origins",
    ),
    (
        "it concerns the copy's own WAL and slots, or its recovery",
        "hot_standby idle_replication_slot_timeout max_replication_slots max_slot_wal_keep_size max_standby_archive_delay \
         max_standby_streaming_delay track_commit_timestamp vacuum_defer_cleanup_age wal_keep_size \
         wal_retrieve_retry_interval",
    ),
    (
        "a limit on the copy's own files",
        "max_files_per_process temp_file_limit remove_temp_files_after_crash",
    ),
];

#[test]
fn every_setting_that_could_reach_outside_is_judged() {
    let harmless: BTreeMap<&str, &str> = HARMLESS
        .iter()
        .flat_map(|(why, names)| names.split_whitespace().map(|name| (name, *why)))
        .collect();
    let mut unjudged = Vec::new();
    for (major, bin) in servers_or_skip() {
        let cluster = Cluster::start(&bin, 1, "fsync = off\n").expect("a server");
        let mut client = cluster.connect().expect("a connection");
        let mut names = |sql: &str| -> Vec<String> {
            let rows = client.query(sql, &[]).expect("pg_settings");
            rows.iter().map(|row| row.get(0)).collect()
        };
        let of_class = names(OF_CLASS);
        assert!(of_class.len() > 80, "{} settings only", of_class.len());
        for name in of_class {
            let isolated = SETTINGS
                .iter()
                .any(|row| row.name == name && row.majors.has(major));
            if !isolated && !harmless.contains_key(name.as_str()) {
                unjudged.push(format!("{name} of PostgreSQL {major}"));
            }
        }
        // A name that a version does not know keeps its server from starting.
        let all = names("SELECT name FROM pg_settings");
        for row in SETTINGS.iter().filter(|row| !row.name.contains('.')) {
            let known = all.iter().any(|name| name == row.name);
            assert_eq!(
                row.majors.has(major),
                known,
                "{} of PostgreSQL {major}",
                row.name
            );
        }
    }
    assert!(
        unjudged.is_empty(),
        "judge each: isolate it in restorer/src/isolation/table.rs, or say here why it is harmless: {unjudged:#?}"
    );
}
