//! The table of alerts. It states what each alert means, when it fires, and the remedy.
//!
//! The page, the daemon's notifications, the metric, Nagios and `monitoring/tidemark.rules.yml`
//! come from this table. A test compares the shipped files with it.

use crate::alert::{Rule, Severity};

/// Every alert.
pub const RULES: [Rule; 28] = [
    Rule {
        name: "PitrRpoOverTarget",
        severity: Severity::Critical,
        condition: "the RPO of the repository is greater than rpo_target",
        patience_seconds: 0,
        expression: "pitr_rpo_seconds{tier=\"remote\"} > on(cluster, instance) group_left() \
            pitr_rpo_target_seconds",
        rule_summary: "Losing the primary of {{ $labels.cluster }} now loses {{ $value | \
            humanizeDuration }}",
        past: "Losing the primary would have lost more than the target",
        inhibited_by: &["PitrStreamDown", "PitrRepositoryFailing", "PitrBroken"],
        runbook: "More would be lost than you allow. Check the stream and the repository; the \
            failing one is named. If both work, the repository is slower than the WAL: raise \
            seal_threads, or give it a faster network.",
    },
    Rule {
        name: "PitrStreamDown",
        severity: Severity::Critical,
        condition: "no replication stream is up",
        patience_seconds: 5,
        expression: "pitr_stream_connected == 0",
        rule_summary: "No WAL of {{ $labels.cluster }} arrives",
        past: "The stream was down",
        inhibited_by: &[],
        runbook: "No WAL arrives. Is PostgreSQL up, are host, port, password and pg_hba.conf \
            still right? `wal-archiver check` names what is refused. The slot keeps WAL on the \
            server meanwhile.",
    },
    Rule {
        name: "PitrBroken",
        severity: Severity::Critical,
        condition: "the state is broken",
        patience_seconds: 0,
        expression: "pitr_state{state=\"broken\"} == 1",
        rule_summary: "Archiving of {{ $labels.cluster }} needs an operator",
        past: "Archiving was broken",
        inhibited_by: &[
            "PitrGap",
            "PitrSlotLost",
            "PitrDrillFailed",
            "PitrCorruptObject",
        ],
        runbook: "Archiving or restoring needs an operator; the reason names what is wrong. It \
            is retried every 30 s where a retry can help.",
    },
    Rule {
        name: "PitrGap",
        severity: Severity::Critical,
        condition: "WAL is missing and no base backup follows the gap",
        patience_seconds: 0,
        expression: "pitr_window_open_gaps > 0",
        rule_summary: "WAL of {{ $labels.cluster }} is missing and no base backup follows the gap",
        past: "WAL was missing and no base backup followed the gap",
        inhibited_by: &[],
        runbook: "WAL is missing: times inside the gap cannot be restored. Take a base backup \
            now (`wal-archiver backup`), so that everything after it can be restored. If a \
            standby or a copy of pg_wal has the range, name it in heal_from.",
    },
    Rule {
        name: "PitrSlotAtRisk",
        severity: Severity::Warning,
        condition: "wal_status is unreserved, or less than 25 % of the WAL that the slot may \
            keep is left",
        patience_seconds: 0,
        expression: "pitr_slot_wal_status{status=\"unreserved\"} == 1 or \
            pitr_slot_safe_wal_bytes / (pitr_slot_safe_wal_bytes + pitr_slot_retained_bytes) < \
            0.25",
        rule_summary: "The replication slot of {{ $labels.cluster }} is near its loss",
        past: "The replication slot was near its loss",
        inhibited_by: &["PitrSlotLost"],
        runbook: "PostgreSQL will soon remove WAL that the archiver does not have. Make the \
            archiver catch up, or raise max_slot_wal_keep_size.",
    },
    Rule {
        name: "PitrSlotLost",
        severity: Severity::Critical,
        condition: "wal_status is lost",
        patience_seconds: 0,
        expression: "pitr_slot_wal_status{status=\"lost\"} == 1",
        rule_summary: "The replication slot of {{ $labels.cluster }} is lost",
        past: "The replication slot was lost",
        inhibited_by: &[],
        runbook: "PostgreSQL removed WAL that the archiver did not have. The archiver looks for \
            it elsewhere, or declares it lost and takes a base backup. Raise \
            max_slot_wal_keep_size.",
    },
    Rule {
        name: "PitrSpoolNearFull",
        severity: Severity::Warning,
        condition: "the spool uses more than 90 % of its limit",
        patience_seconds: 0,
        expression: "pitr_spool_used_bytes / pitr_spool_limit_bytes > 0.9",
        rule_summary: "The spool of {{ $labels.cluster }} has used {{ $value | \
            humanizePercentage }} of its room",
        past: "The spool was nearly full",
        inhibited_by: &[],
        runbook: "The spool's disk is nearly full. Usually the repository does not take WAL: \
            repair that first. Never delete files of the spool: they are the only copy.",
    },
    Rule {
        name: "PitrRepositoryFailing",
        severity: Severity::Critical,
        condition: "the last request to the repository failed",
        patience_seconds: 5,
        expression: "pitr_repository_failing == 1",
        rule_summary: "The repository of {{ $labels.cluster }} refuses or does not answer",
        past: "The repository refused requests or did not answer",
        inhibited_by: &[],
        runbook: "The repository refuses or does not answer; the error is named. WAL waits in \
            the spool and nothing is lost while it has room. Check credentials, network, quota.",
    },
    Rule {
        name: "PitrRepositoryAway",
        severity: Severity::Warning,
        condition: "the last request to one of several repositories failed, or it held an older state",
        patience_seconds: 5,
        expression: "pitr_repository_place_failing == 1 and on(cluster, instance) \
            count by (cluster, instance) (pitr_repository_place_failing) > 1",
        rule_summary: "The repository {{ $labels.repository }} of {{ $labels.cluster }} refuses, \
            does not answer or held an older state of the archive",
        past: "One of several repositories refused, did not answer or held an older state",
        inhibited_by: &["PitrRepositoryFailing"],
        runbook: "Check the credentials, the network and the quota of the repository that is \
            named, and that the right disk or bucket is there. As long as another one answers, WAL is stored there, and this one is filled \
            from it when it is back. Until then one copy fewer exists.",
    },
    Rule {
        name: "PitrBackupOverdue",
        severity: Severity::Warning,
        condition: "there is no base backup, or the newest is older than backup_max_age",
        patience_seconds: 0,
        expression: "(time() - pitr_backup_last_success_timestamp_seconds > \
            pitr_backup_max_age_seconds) or ((pitr_catalog_read == 1) unless \
            pitr_backup_last_success_timestamp_seconds > 0)",
        rule_summary: "{{ $labels.cluster }} has no base backup that is young enough",
        past: "The base backup was overdue",
        inhibited_by: &["PitrBackupFailed"],
        runbook: "Run `wal-archiver backup`. The older the backup, the longer a restore replays \
            WAL; without one nothing can be restored.",
    },
    Rule {
        name: "PitrBackupFailed",
        severity: Severity::Warning,
        condition: "the newest base backup failed",
        patience_seconds: 0,
        expression: "pitr_backup_last_failed == 1",
        rule_summary: "The last base backup of {{ $labels.cluster }} failed",
        past: "The last base backup had failed",
        inhibited_by: &[],
        runbook: "The last base backup failed; its message says why. Run `wal-archiver backup` \
            after the repair.",
    },
    Rule {
        name: "PitrExpireFailed",
        severity: Severity::Warning,
        condition: "the newest application of retention failed",
        patience_seconds: 0,
        expression: "pitr_expire_last_failed == 1",
        rule_summary: "Retention of {{ $labels.cluster }} was not applied",
        past: "Retention was not applied",
        inhibited_by: &[],
        runbook: "Retention was not applied, so nothing is removed and the repository grows; \
            the message says the reason. Run `wal-archiver expire` after the repair.",
    },
    Rule {
        name: "PitrDrillOverdue",
        severity: Severity::Warning,
        condition: "drill_max_age is set and no drill passed within it",
        patience_seconds: 0,
        expression: "(time() - pitr_drill_last_success_timestamp_seconds > \
            pitr_drill_max_age_seconds) or ((pitr_drill_max_age_seconds > 0 and \
            pitr_catalog_read == 1) unless pitr_drill_last_success_timestamp_seconds > 0)",
        rule_summary: "No recent restore drill of {{ $labels.cluster }} has passed",
        past: "The restore drill was overdue",
        inhibited_by: &[],
        runbook: "No recent restore drill has proved that a restore works. Run \
            `pitr-restore drill`, and set `drill_schedule` to repeat it.",
    },
    Rule {
        name: "PitrDrillFailed",
        severity: Severity::Critical,
        condition: "the newest drill failed",
        patience_seconds: 0,
        expression: "pitr_drill_last_passed == 0",
        rule_summary: "The last restore drill of {{ $labels.cluster }} failed",
        past: "The last restore drill had failed",
        inhibited_by: &[],
        runbook: "A restore was tried and failed: treat the archive as not restorable until a \
            drill passes. Its message says what failed; `wal-archiver verify --deep` finds what \
            is damaged. After the repair, run `pitr-restore drill`.",
    },
    Rule {
        name: "PitrDrillWithoutResult",
        severity: Severity::Warning,
        condition: "the last scheduled restore drill ended without a result",
        patience_seconds: 0,
        expression: "pitr_drill_without_result == 1",
        rule_summary: "The last scheduled restore drill of {{ $labels.cluster }} ended without \
            a result",
        past: "The last scheduled restore drill had ended without a result",
        inhibited_by: &[],
        runbook: "The drill that the daemon started could not begin or was killed, so it tested \
            nothing. `wal-archiver status` shows its message. Run `pitr-restore drill` as the \
            daemon's user to see it again: usually a program, the scratch directory or a \
            permission is missing. The daemon tries again.",
    },
    Rule {
        name: "PitrCorruptObject",
        severity: Severity::Critical,
        condition: "a verification or a read found damaged or missing objects",
        patience_seconds: 0,
        expression: "pitr_corrupt_objects > 0",
        rule_summary: "{{ $value }} object(s) of {{ $labels.cluster }} are damaged or missing",
        past: "Objects in the repository were damaged or missing",
        inhibited_by: &[],
        runbook: "Objects in the repository are damaged or missing. `wal-archiver verify` names \
            them. Take a base backup now; restore the objects from a copy of the repository if \
            there is one. Give a damaged backup up with `wal-archiver backup delete ID`; accept \
            what is lost for good with `wal-archiver verify --accept-loss`.",
    },
    Rule {
        name: "PitrClockStep",
        severity: Severity::Warning,
        condition: "the server's clock differs from this host's by more than 5 s",
        patience_seconds: 0,
        expression: "abs(pitr_clock_offset_seconds) > 5",
        rule_summary: "The clocks of the server and the archiver of {{ $labels.cluster }} \
            differ by {{ $value | humanizeDuration }}",
        past: "The server's clock differed from the archiver's",
        inhibited_by: &[],
        runbook: "The server's clock and this host's differ. Restoring by time follows the \
            server's clock: set both by NTP, and restore by LSN or transaction across the step.",
    },
    Rule {
        name: "PitrCertificateExpiry",
        severity: Severity::Warning,
        condition: "the dashboard's certificate ends within 14 days",
        patience_seconds: 0,
        expression: "pitr_certificate_expiry_timestamp_seconds - time() < 14 * 86400",
        rule_summary: "The certificate of the dashboard of {{ $labels.instance }} ends in {{ \
            $value | humanizeDuration }}",
        past: "The dashboard's certificate was about to end",
        inhibited_by: &[],
        runbook: "The dashboard's certificate ends soon. Replace the file; it is read again \
            automatically.",
    },
    Rule {
        name: "PitrFailoverLoss",
        severity: Severity::Critical,
        condition: "a failover that lost commits was found within the last day",
        patience_seconds: 0,
        expression: "time() - pitr_failover_loss_timestamp_seconds < 86400",
        rule_summary: "A failover of {{ $labels.cluster }} lost commits",
        past: "A failover that lost commits was reported",
        inhibited_by: &[],
        runbook: "Commits that the old primary had confirmed are not on the new one. Their WAL \
            is kept: `pitr-restore list` names each transaction, and a restore with \
            --target-timeline of the old timeline shows their rows. Name the archiver and a \
            standby in synchronous_standby_names, so that the next failover loses none. It ends \
            a day after it was found.",
    },
    Rule {
        name: "PitrOffsiteBehind",
        severity: Severity::Warning,
        condition: "a repository among several lacks WAL for more than 15 minutes",
        patience_seconds: 60,
        expression: "pitr_offsite_lag_seconds > 900",
        rule_summary: "A repository of {{ $labels.cluster }} is {{ $value | humanizeDuration }} \
            behind the others",
        past: "A repository was behind the others",
        inhibited_by: &["PitrRepositoryFailing"],
        runbook: "Another repository has everything, and this one is filled from it. If the lag \
            grows, its network or its store is slower than the WAL: `wal-archiver status` shows \
            the bytes that wait.",
    },
    Rule {
        name: "PitrPushFailing",
        severity: Severity::Warning,
        condition: "archive_mode is on and the last run of archive_command failed",
        patience_seconds: 5,
        expression: "pitr_archive_command_failing == 1",
        rule_summary: "archive_command of {{ $labels.cluster }} fails",
        past: "archive_command failed on the server",
        inhibited_by: &[],
        runbook: "The server keeps every segment that archive_command has not archived, until \
            its disk is full. The server's log has the message of the command. `wal-archiver \
            push FILE`, run as the server's user, shows the error again. If the stream suffices, \
            set archive_command to `true`.",
    },
    Rule {
        name: "PitrSlotMissing",
        severity: Severity::Critical,
        condition: "the server has no replication slot of the archiver",
        patience_seconds: 30,
        expression: "pitr_slot_missing == 1",
        rule_summary: "The replication slot of {{ $labels.cluster }} does not exist",
        past: "The replication slot was missing",
        inhibited_by: &["PitrSlotLost", "PitrStreamDown"],
        runbook: "Nothing on the server keeps the WAL that is not archived yet. Restart the \
            archiver, which creates the slot, and find out who dropped it. After a failover, \
            name the standbys in `standbys`.",
    },
    Rule {
        name: "PitrSlotInactive",
        severity: Severity::Warning,
        condition: "the replication slot exists and nobody uses it",
        patience_seconds: 60,
        expression: "pitr_slot_active == 0 and on(cluster, instance) \
            pitr_slot_wal_status{status=\"lost\"} >= 0",
        rule_summary: "The replication slot of {{ $labels.cluster }} is not in use",
        past: "The replication slot was not in use",
        inhibited_by: &["PitrStreamDown"],
        runbook: "The slot keeps WAL on the server until the archiver streams from it again. \
            `wal-archiver check` names the reason.",
    },
    Rule {
        name: "PitrStandbySlot",
        severity: Severity::Warning,
        condition: "the slot on a configured standby is not kept",
        patience_seconds: 120,
        expression: "pitr_standby_slots_failing > 0",
        rule_summary: "A failover of {{ $labels.cluster }} may need a new base backup",
        past: "The slot on a standby was not kept",
        inhibited_by: &[],
        runbook: "A standby has no slot of the archiver, so after a failover to it WAL may be \
            missing. The reason is named; correct the entry in `standbys` or the privileges of \
            its role.",
    },
    Rule {
        name: "PitrSpoolFilling",
        severity: Severity::Warning,
        condition: "at the growth of the last 30 minutes the spool is full within 4 hours",
        patience_seconds: 300,
        expression: "pitr_spool_full_in_seconds < 4 * 3600",
        rule_summary: "The spool of {{ $labels.cluster }} is full in {{ $value | \
            humanizeDuration }}",
        past: "The spool was filling up",
        inhibited_by: &["PitrRepositoryFailing", "PitrSpoolNearFull"],
        runbook: "WAL arrives faster than the repository takes it. Check the repository and its \
            network, raise seal_threads, or give the spool more room. Never delete files of the \
            spool: they are the only copy.",
    },
    Rule {
        name: "PitrVerifyOverdue",
        severity: Severity::Warning,
        condition: "verify_max_age is set and no verification ran within it",
        patience_seconds: 0,
        expression: "(time() - pitr_verify_last_run_timestamp_seconds > \
            pitr_verify_max_age_seconds) or ((pitr_verify_max_age_seconds > 0 and \
            pitr_catalog_read == 1) unless pitr_verify_last_run_timestamp_seconds > 0)",
        rule_summary: "The repository of {{ $labels.cluster }} was not verified recently",
        past: "The verification was overdue",
        inhibited_by: &[],
        runbook: "Run `wal-archiver verify`, for example by a timer. Damage that nobody looks \
            for is found at the restore.",
    },
    Rule {
        name: "PitrWindowShort",
        severity: Severity::Warning,
        condition: "the restorable window has become shorter than keep_window by more than an hour",
        patience_seconds: 0,
        expression: "pitr_window_missing_seconds > 3600",
        rule_summary: "The window of {{ $labels.cluster }} is {{ $value | humanizeDuration }} \
            shorter than keep_window",
        past: "The restorable window was shorter than keep_window",
        inhibited_by: &["PitrGap", "PitrCorruptObject", "PitrBroken"],
        runbook: "Times that keep_window promises can no longer be restored: a base backup or \
            WAL of them is gone. `pitr-restore list` shows what is left, and `wal-archiver \
            verify` names what is missing.",
    },
    Rule {
        name: "PitrRtoOverTarget",
        severity: Severity::Warning,
        condition: "the estimated duration of a restore is greater than rto_target",
        patience_seconds: 0,
        expression: "pitr_rto_estimate_seconds > pitr_rto_target_seconds",
        rule_summary: "A restore of {{ $labels.cluster }} takes {{ $value | humanizeDuration \
            }}, more than its target",
        past: "A restore would have taken longer than the target",
        inhibited_by: &["PitrBackupOverdue", "PitrBackupFailed"],
        runbook: "Take a base backup now (`wal-archiver backup`): the less WAL follows it, the \
            shorter the restore is. If that does not suffice, shorten the interval of the \
            backups.",
    },
];
