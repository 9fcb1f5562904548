//! Makes the report that every view shows from the status of a cluster.

use std::sync::atomic::Ordering;

use repository::{config::ClusterSettings, store::MemberState};
use wal_format::{Lsn, OutcomeKind, PgTimestamp};

use super::{ClusterStatus, Facts};
use crate::{
    alerts,
    details::Details,
    light::{Facts as Judged, causes},
    report::{
        ClusterReport, Counters, DurableReport, SlotReport, SourceReport, TierReport, WindowReport,
    },
    state::State,
};

impl ClusterStatus {
    /// Returns the complete report on the cluster, from memory. `repositories` are the members of
    /// the repository, if there are several.
    #[must_use]
    pub fn report(
        &self,
        settings: &ClusterSettings,
        repositories: Vec<MemberState>,
    ) -> ClusterReport {
        let mut facts = self.facts();
        if let (None, Some(silent)) = (&facts.repository_error, self.open_puts.silent_for()) {
            let seconds = silent.as_secs();
            let error = format!("the repository has not answered a request for {seconds} s");
            facts.repository_error = Some(error);
        }
        let (local, remote) = self.exposure();
        let details = self.details();
        let drill = details.newest(OutcomeKind::Drill).cloned();
        let verified = details.newest(OutcomeKind::Verify);
        let found = verified.map(|verify| verify.damaged.len() as u64);
        let lost = facts.losses.iter();
        let lost: Vec<String> = lost
            .map(|found| format!("{}, missing since {}", found.loss, found.found))
            .collect();
        // An older verification may have found no damage.
        let is_known = !details.unread.contains_key(&OutcomeKind::Verify);
        let found = found.filter(|found| *found > 0 || is_known);
        let corrupt_objects = match (found, details.damaged.len().max(lost.len()) as u64) {
            (None, 0) => None,
            (found, damaged) => Some(found.unwrap_or_default().max(damaged)),
        };
        let newest_backup = details.backups.last().map(|backup| backup.finished);
        let failed_backup = details
            .newest(OutcomeKind::Backup)
            .filter(|outcome| !outcome.passed && Some(outcome.finished) > newest_backup)
            .cloned();
        let failed_expire = details
            .newest(OutcomeKind::Expire)
            .filter(|outcome| !outcome.passed)
            .cloned();
        let not_restorable = match (&drill, corrupt_objects) {
            (Some(drill), _) if !drill.passed => {
                Some(format!("the last restore drill failed: {}", drill.message))
            }
            _ if !lost.is_empty() => Some(lost_reason(&lost)),
            _ if facts.identity_problem.is_some() => facts.identity_problem.clone(),
            _ if facts.losses_problem.is_some() => facts.losses_problem.clone(),
            (_, Some(objects @ 1..)) => {
                let problems = verified.map_or(&[][..], |verify| verify.damaged.as_slice());
                let first = problems.first().or(details.damaged.first());
                let first =
                    first.map_or_else(String::new, |first| format!(", the first is {first}"));
                Some(format!(
                    "{objects} object(s) of the repository are damaged or missing{first}: run `wal-archiver verify`"
                ))
            }
            _ => None,
        };
        // After a promotion the server is on another timeline. Until the next check of the catalog,
        // nothing is known about it.
        let server_branch = facts.server_path.as_ref().and_then(|path| path.current());
        let has_backup = match facts.last_backup.is_some() {
            true if details.judged != server_branch => None,
            has_backup => facts.looked.then_some(has_backup),
        };
        let unread = unread(&details);
        let rpo_target_seconds = settings.rpo_target.as_secs_f64();
        let shortage = shortage(&facts);
        let locks = facts
            .lock_error
            .as_ref()
            .map(|problem| format!("retention locks could not be extended: {problem}"));
        let catalog = facts
            .catalog_error
            .as_ref()
            .map(|problem| format!("archiving continues without the catalog on disk: {problem}"));
        let store_is_away =
            facts.stream_error.is_some() && facts.stream_error == facts.repository_error;
        let failing: Vec<&str> = shortage
            .iter()
            .chain(&catalog)
            .chain(&locks)
            .map(String::as_str)
            .chain(facts.repository_error.as_deref())
            .chain(facts.stream_error.as_deref().filter(|_| !store_is_away))
            .collect();
        let failing = (!failing.is_empty()).then(|| failing.join("; "));
        let standby = facts.standbys.iter().find_map(|standby| {
            let problem = standby.problem.as_ref()?;
            let server = &standby.server;
            Some(format!(
                "a failover to the standby {server} may need a new base backup: {problem}"
            ))
        });
        let standby = standby.or_else(|| facts.walsender_problem.clone());
        // A full spool is the consequence of an unavailable repository. Both reasons are shown.
        let problems = facts.repository_broken.values();
        let repository = problems
            .chain(&facts.repository_older)
            .chain(facts.hole.as_ref().map(|hole| &hole.reason))
            .next()
            .map(|problem| {
                let room = shortage.as_ref().map(|shortage| format!("; {shortage}"));
                format!("{problem}{}", room.unwrap_or_default())
            });
        let causes = causes(Judged {
            broken: facts
                .broken
                .as_deref()
                .or(repository.as_deref())
                .or(facts.lost.as_deref())
                .or(facts.push_differs.values().next().map(String::as_str)),
            failing: failing.as_deref(),
            source_known: remote.source_known,
            source_asked: !store_is_away,
            stream_connected: facts.connected,
            remote_rpo_seconds: remote.rpo.map(|age| age.as_secs_f64()),
            proved_rpo_seconds: remote.proved.map(|age| age.as_secs_f64()),
            rpo_target_seconds,
            danger: facts.danger,
            standby: standby.as_deref(),
            has_backup,
            unreached: facts.unreached.as_deref(),
            unread: unread.as_deref(),
            slot_wal_status: facts
                .slot_report
                .as_ref()
                .and_then(|slot| slot.wal_status.as_deref()),
            not_restorable: not_restorable.as_deref(),
        });
        let mut window = facts.window;
        if facts.lost.is_some() {
            // The loss was declared after the last check of the catalog.
            window.open_gaps = window.open_gaps.max(Some(1));
            window.gaps = window.gaps.max(window.open_gaps);
            window.refusal = window.refusal.or_else(|| facts.lost.clone());
        }
        if facts.repository_older.is_some() {
            // On this host, a restore of the newest state is refused.
            window.refusal = facts.repository_older.clone();
        }
        if facts.repository_gone {
            window = WindowReport::gone(facts.repository_error.as_deref());
        }
        let known = |lsn: Lsn| (lsn > Lsn::ZERO).then_some(lsn);
        let path = facts.server_path.unwrap_or_default();
        let durable = self.positions.durable(&path.parts);
        let stored = known(durable.remote_on_path.unwrap_or(durable.remote));
        let mut report = ClusterReport {
            schema: "v1",
            cluster: self.cluster.clone(),
            as_of: PgTimestamp::from_jiff(jiff::Timestamp::now()),
            state: State::Ok,
            reason: String::new(),
            causes,
            source: SourceReport {
                system_identifier: facts.system_identifier,
                server_version: facts.server_version,
                timeline: path
                    .current()
                    .or(facts.branch)
                    .map(|branch| branch.timeline),
                flush_lsn: self.source_lsn(),
                stream_connected: facts.connected,
                last_contact: facts.last_message,
            },
            durable: DurableReport {
                local: TierReport::new(known(durable.flushed), local),
                remote: TierReport::new(stored, remote),
            },
            rpo_target_seconds,
            window,
            // While the server is not seen, its last answer says nothing about the slot.
            slot: facts
                .slot_report
                .filter(|_| remote.source_known)
                .or_else(|| {
                    facts.slot.map(|name| SlotReport {
                        name,
                        active: facts.connected,
                        wal_status: None,
                        retained_bytes: None,
                        safe_wal_bytes: None,
                        full_in_seconds: None,
                    })
                }),
            gap: facts.gap,
            standbys: facts.standbys,
            last_backup: facts.last_backup,
            counters: Counters {
                wal_received_bytes: self.wal_received_bytes.load(Ordering::Relaxed),
                wal_stored_bytes: self.wal_stored_bytes.load(Ordering::Relaxed),
                segments_completed: self.segments_completed.load(Ordering::Relaxed),
                objects_locked: self.objects_locked.count(),
                reconnects: facts
                    .reconnects
                    .iter()
                    .map(|(reason, count)| ((*reason).to_owned(), *count))
                    .collect(),
                repository_errors: self.repository_errors(),
                spool_used_bytes: facts.spool_used_bytes,
                spool_limit_bytes: facts.spool_limit_bytes,
                upload_queue_bytes: durable.queued_bytes,
                upload_queue_age_seconds: match durable.queued_bytes {
                    0 => Some(0.0),
                    _ => remote.proved.or(remote.rpo).map(|age| age.as_secs_f64()),
                },
                runs_failed: Vec::new(),
            },
            repository: settings.repository.to_string(),
            requests: settings.repository.request_report(),
            rpo_max_24h_seconds: None,
            repositories,
            wal_bytes_per_second: None,
            caught_up_as_of: self.caught_up_as_of(),
            rto: details.rto(
                stored,
                settings.rto_target.map(|target| target.as_secs_f64()),
            ),
            last_drill_passed: details
                .of_kind(OutcomeKind::Drill)
                .filter(|drill| drill.passed)
                .map(|drill| drill.finished)
                .max(),
            last_drill: drill,
            last_verify: details.newest(OutcomeKind::Verify).cloned(),
            failed_backup,
            failed_expire,
            last_failover_loss: details
                .failover_losses
                .iter()
                .filter(|loss| loss.commits > 0)
                .map(|loss| loss.found)
                .max(),
            failover_loss: details
                .failover_losses
                .iter()
                .filter(|loss| loss.commits > 0)
                .max_by_key(|loss| loss.found)
                .map(ToString::to_string),
            corrupt_objects,
            unread_outcomes: details.unread.keys().copied().collect(),
            lost_objects: lost,
            backup_max_age_seconds: settings.backup_max_age.as_secs_f64(),
            drill_max_age_seconds: settings.drill_max_age.map(|age| age.as_secs_f64()),
            verify_max_age_seconds: settings.verify_max_age.map(|age| age.as_secs_f64()),
            backup_progress: facts.backup_progress,
            backup_schedule: facts.backup_schedule,
            drill_schedule: facts.drill_schedule,
            archive_command: facts.archive_command,
            slot_missing: facts.slot_missing,
            spool_full_in_seconds: None,
            window_missing_seconds: None,
            clock_offset_seconds: facts.clock_offset_seconds,
            certificate_expiry: None,
            looked: facts.looked,
            stream_error: facts.stream_error.filter(|_| !facts.connected),
            repository_error: facts.repository_error,
            alerts: Vec::new(),
        };
        if report.causes.is_empty() {
            report.causes.extend(alerts::worst_cause(&report));
        }
        report.settle();
        report
    }
}

/// Returns the reason why it is not known what the newest verification or drill found. Either can
/// prove that the archive cannot be restored.
fn unread(details: &Details) -> Option<String> {
    let kinds = [OutcomeKind::Verify, OutcomeKind::Drill];
    let (kind, problem) = kinds
        .iter()
        .find_map(|kind| Some((kind, details.unread.get(kind)?)))?;
    Some(format!(
        "the result of the newest {kind} cannot be read, so what it found is not known: {problem}"
    ))
}

/// Returns the reason for a state in which the repository lacks what was archived there.
fn lost_reason(lost: &[String]) -> String {
    let more = match lost.len() {
        0 | 1 => String::new(),
        several => format!(" (and {} more)", several - 1),
    };
    format!(
        "the repository has lost {}{more}: bring the objects back from a copy of the repository, \
         or accept the loss with `wal-archiver verify --accept-loss`",
        lost.first().map_or("", String::as_str)
    )
}

/// Returns a warning about a resource that runs out. It is given at four fifths, so that there is
/// time to act.
fn shortage(facts: &Facts) -> Option<String> {
    if let Some(full) = facts.spool_full {
        return Some(full.to_owned());
    }
    let used = facts.spool_used_bytes;
    if let Some(limit) = facts.spool_limit_bytes.filter(|limit| *limit > 0)
        && used >= limit / 5 * 4
    {
        let percent = used.saturating_mul(100) / limit;
        return Some(format!(
            "the spool is {percent} % full: it takes {} bytes more while the repository takes nothing",
            limit.saturating_sub(used)
        ));
    }
    let slot = facts.slot_report.as_ref()?;
    let (kept, safe) = (slot.retained_bytes?, slot.safe_wal_bytes?);
    (safe < kept.saturating_add(safe) / 5).then(|| {
        format!("the slot may keep {safe} bytes more on the primary before PostgreSQL removes WAL (max_slot_wal_keep_size)")
    })
}
