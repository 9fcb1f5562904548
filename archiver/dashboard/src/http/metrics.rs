//! `/metrics`: the reports as Prometheus text. Every metric has a sample from the start, and so has
//! every known label value of a counter. An unknown value is `NaN`, never 0.

mod exposition;
mod process;
mod schedules;

pub(super) use exposition::Exposition;

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use repository::{FAILURE_KINDS, store::REQUESTS};
use status::{
    alerts::RULES,
    cluster_status::RECONNECT_REASONS,
    instruments::{Instruments, Labels},
    outcomes::RUNS,
    report::{ClusterReport, TierReport},
    state::State,
};
use wal_format::PgTimestamp;

type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;
type Counters = Family<Labels, Counter>;

/// Renders the reports in the format `exposition`.
pub(super) fn render(
    reports: &[ClusterReport],
    instruments: &Instruments,
    exposition: Exposition,
) -> String {
    let mut page = Page {
        registry: Registry::default(),
        reports,
    };
    page.build_info();
    page.exposure();
    page.stream();
    page.durations(instruments);
    page.counters();
    page.slot();
    page.restorable();
    page.schedules();
    process::register(&mut page.registry, instruments.started);
    let mut text = String::new();
    match encode(&mut text, &page.registry) {
        Ok(()) => exposition.convert(text),
        // Writing to a String does not fail. An empty answer would look like "no clusters".
        Err(error) => format!("# encoding failed: {error}\n"),
    }
}

struct Page<'a> {
    registry: Registry,
    reports: &'a [ClusterReport],
}

/// A family's samples of one cluster: labels in addition to `cluster`, and the value.
type Samples<V> = Vec<(Labels, V)>;

impl Page<'_> {
    fn gauges(
        &mut self,
        name: &str,
        help: &str,
        samples: impl Fn(&ClusterReport) -> Samples<Option<f64>>,
    ) {
        let family = Gauges::default();
        for report in self.reports {
            for (labels, value) in samples(report) {
                let value = value.unwrap_or(f64::NAN);
                family
                    .get_or_create(&with_cluster(report, labels))
                    .set(value);
            }
        }
        self.registry.register(name, help, family);
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Fn(&ClusterReport) -> Option<f64>) {
        self.gauges(name, help, |report| vec![(Vec::new(), value(report))]);
    }

    /// Registers a counter. `name` lacks `_total`, which the encoder appends.
    fn counter(
        &mut self,
        name: &str,
        help: &str,
        samples: impl Fn(&ClusterReport) -> Samples<u64>,
    ) {
        let family = Counters::default();
        for report in self.reports {
            for (labels, value) in samples(report) {
                family
                    .get_or_create(&with_cluster(report, labels))
                    .inc_by(value);
            }
        }
        self.registry.register(name, help, family);
    }

    fn build_info(&mut self) {
        let family = Gauges::default();
        let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        family.get_or_create(&version).set(1.0);
        self.registry
            .register("pitr_build_info", "The build that runs", family);
        let family = Gauges::default();
        for report in self.reports {
            let text = |text: Option<String>| text.unwrap_or_default();
            let source = &report.source;
            let identifier = source.system_identifier.map(|system| system.to_string());
            let labels = vec![
                ("system_identifier", text(identifier)),
                ("server_version", text(source.server_version.clone())),
            ];
            family.get_or_create(&with_cluster(report, labels)).set(1.0);
        }
        self.registry.register(
            "pitr_cluster_info",
            "The PostgreSQL cluster; a label is empty until the server was seen",
            family,
        );
    }

    fn exposure(&mut self) {
        self.gauges(
            "pitr_rpo_seconds",
            "Age of the oldest WAL flushed on the primary that the tier does not hold",
            |report| tiers(report, |tier| tier.rpo_seconds),
        );
        self.gauge(
            "pitr_rpo_target_seconds",
            "The RPO that the operator set",
            |report| Some(report.rpo_target_seconds),
        );
        self.gauges(
            "pitr_lag_bytes",
            "WAL flushed on the primary that the tier does not hold",
            |report| tiers(report, |tier| tier.lag_bytes.map(number)),
        );
        self.gauges(
            "pitr_state",
            "1 for the state the cluster is in",
            |report| {
                State::ALL
                    .into_iter()
                    .map(|state| {
                        (
                            vec![("state", state.name().to_owned())],
                            Some(flag(report.state == state)),
                        )
                    })
                    .collect()
            },
        );
    }

    fn stream(&mut self) {
        self.gauge(
            "pitr_stream_connected",
            "Whether a replication stream is up",
            |report| Some(flag(report.source.stream_connected)),
        );
        self.gauge(
            "pitr_timeline_id",
            "The timeline being streamed",
            |report| {
                report
                    .source
                    .timeline
                    .map(|timeline| f64::from(timeline.get()))
            },
        );
        self.counter(
            "pitr_stream_reconnects",
            "Reconnections of the stream",
            |report| {
                // A counter that appears with its first event hides that event from `increase()`.
                let known = RECONNECT_REASONS.map(|reason| (reason.to_owned(), 0));
                let counted = report.counters.reconnects.iter().cloned();
                known
                    .into_iter()
                    .chain(counted)
                    .map(|(reason, count)| (vec![("reason", reason)], count))
                    .collect()
            },
        );
    }

    fn durations(&mut self, instruments: &Instruments) {
        for report in self.reports {
            // Creates a sample from the start, even before the first fsync or put.
            drop(instruments.flush_duration(&report.cluster));
            for op in REQUESTS {
                for outcome in ["error", "ok"] {
                    drop(instruments.repository_request(&report.cluster, op, outcome));
                }
            }
        }
        self.registry.register(
            "pitr_flush_duration_seconds",
            "How long writing WAL through to the spool's disk took",
            instruments.flush_duration.clone(),
        );
        self.registry.register(
            "pitr_repository_request_duration_seconds",
            "How long requests to the repository took",
            instruments.repository_request_duration.clone(),
        );
    }

    fn counters(&mut self) {
        self.counter("pitr_wal_received_bytes", "WAL received", |report| {
            vec![(Vec::new(), report.counters.wal_received_bytes)]
        });
        self.counter(
            "pitr_wal_stored_bytes",
            "Bytes of WAL objects put",
            |report| vec![(Vec::new(), report.counters.wal_stored_bytes)],
        );
        self.counter(
            "pitr_wal_segments_completed",
            "Segments sealed, stored and verified",
            |report| vec![(Vec::new(), report.counters.segments_completed)],
        );
        self.counter(
            "pitr_repository_errors",
            "Repository requests that failed, after the store's retries",
            |report| {
                let ops = REQUESTS.into_iter().chain(["open"]);
                let known = ops
                    .flat_map(|op| FAILURE_KINDS.map(|kind| (op.to_owned(), kind.to_owned(), 0)));
                let counted = report.counters.repository_errors.iter().cloned();
                known
                    .into_iter()
                    .chain(counted)
                    .map(|(op, kind, count)| (vec![("op", op), ("kind", kind)], count))
                    .collect()
            },
        );
        self.counter(
            "pitr_repository_requests",
            "Requests that this daemon sent to its buckets, each attempt, page and part; none for folders",
            |report| {
                let counts = report.requests.unwrap_or_default().total.each();
                counts
                    .into_iter()
                    .map(|(op, count)| (vec![("op", op.to_owned())], count))
                    .collect()
            },
        );
        self.counter(
            "pitr_repository_objects_locked",
            "Superfluous objects that the repository does not let go",
            |report| vec![(Vec::new(), report.counters.objects_locked)],
        );
        self.gauge(
            "pitr_upload_queue_bytes",
            "WAL that waits for the repository",
            |report| Some(number(report.counters.upload_queue_bytes)),
        );
        self.gauge(
            "pitr_spool_full_in_seconds",
            "When the spool is full at the growth of the last 30 minutes; NaN while it does not grow",
            |report| report.spool_full_in_seconds,
        );
        self.gauge(
            "pitr_upload_queue_age_seconds",
            "Age of the oldest WAL that waits for the repository",
            |report| report.counters.upload_queue_age_seconds,
        );
        self.counter(
            "pitr_runs_failed",
            "Base backups, drills, applications of retention and verifications that failed",
            |report| {
                let known = RUNS.map(|kind| (kind, 0));
                let counted = report.counters.runs_failed.iter().copied();
                known
                    .into_iter()
                    .chain(counted)
                    .map(|(kind, count)| (vec![("kind", kind.name().to_owned())], count))
                    .collect()
            },
        );
        self.gauge(
            "pitr_spool_used_bytes",
            "WAL files in the spool",
            |report| Some(number(report.counters.spool_used_bytes)),
        );
        self.gauge(
            "pitr_spool_limit_bytes",
            "What the spool may grow to: what it uses and what its disk has left",
            |report| report.counters.spool_limit_bytes.map(number),
        );
    }

    fn slot(&mut self) {
        self.gauge(
            "pitr_slot_active",
            "Whether a walsender uses the slot",
            |report| report.slot.as_ref().map(|slot| flag(slot.active)),
        );
        self.gauge(
            "pitr_slot_missing",
            "Whether the server was asked and has no slot of the archiver",
            |report| Some(flag(report.slot_missing)),
        );
        self.gauge(
            "pitr_archive_command_failing",
            "Whether the last archive_command failed on the server; NaN while it is not asked",
            |report| Some(flag(report.archive_command.as_ref()?.failing)),
        );
        self.gauge(
            "pitr_slot_retained_bytes",
            "WAL the slot keeps on the primary",
            |report| report.slot.as_ref()?.retained_bytes.map(number),
        );
        self.gauges(
            "pitr_slot_wal_status",
            "1 for the slot's wal_status",
            |report| {
                let known = report
                    .slot
                    .as_ref()
                    .and_then(|slot| slot.wal_status.as_deref());
                ["reserved", "extended", "unreserved", "lost"]
                    .into_iter()
                    .map(|status| {
                        let value = known.map(|known| flag(known == status));
                        (vec![("status", status.to_owned())], value)
                    })
                    .collect()
            },
        );
        self.gauge(
            "pitr_slot_safe_wal_bytes",
            "WAL that can be written before the slot is lost; NaN without a limit",
            |report| report.slot.as_ref()?.safe_wal_bytes.map(number),
        );
    }

    fn restorable(&mut self) {
        self.gauge(
            "pitr_drill_last_success_timestamp_seconds",
            "When a restore drill last passed; NaN before the first",
            |report| unix_seconds(report.last_drill_passed),
        );
        self.gauge(
            "pitr_drill_last_passed",
            "Whether the last restore drill passed; NaN before the first",
            |report| report.last_drill.as_ref().map(|drill| flag(drill.passed)),
        );
        self.gauge(
            "pitr_drill_rto_seconds",
            "How long the last drill took until PostgreSQL answered; NaN before the first",
            |report| report.rto.measured_seconds,
        );
        self.gauge(
            "pitr_rto_estimate_seconds",
            "How long a restore is estimated to take; NaN while no rate was measured",
            |report| report.rto.estimate_seconds,
        );
        self.gauge(
            "pitr_rto_target_seconds",
            "The RTO that the operator set; NaN without one",
            |report| report.rto.target_seconds,
        );
        self.gauge(
            "pitr_window_open_gaps",
            "Gaps with no base backup behind them: later times cannot be restored",
            |report| report.window.open_gaps.map(number),
        );
        self.gauge(
            "pitr_failover_loss_timestamp_seconds",
            "When a failover that lost commits was last found; NaN where none was",
            |report| unix_seconds(report.last_failover_loss),
        );
        self.gauge(
            "pitr_corrupt_objects",
            "Objects of the repository found damaged or missing; NaN before a verification",
            |report| report.corrupt_objects.map(number),
        );
        self.gauge(
            "pitr_catalog_read",
            "Whether the catalog was read since the start: before, backups and drills are not known",
            |report| Some(flag(report.looked)),
        );
        self.gauge(
            "pitr_window_missing_seconds",
            "The part of keep_window that could once be restored and no longer can; NaN without keep_window",
            |report| report.window_missing_seconds,
        );
        self.gauge(
            "pitr_offsite_lag_seconds",
            "For how long the oldest WAL that a repository among several lacks has waited there; NaN with one repository",
            |report| {
                let lags = report.repositories.iter().map(|place| place.lag_seconds);
                lags.reduce(f64::max)
            },
        );
        self.gauge(
            "pitr_standby_slots_failing",
            "Configured standbys on which the slot is not kept",
            |report| {
                let mut standbys = report.standbys.iter();
                let failing = standbys
                    .by_ref()
                    .filter(|standby| standby.problem.is_some());
                Some(number(failing.count() as u64))
            },
        );
        self.gauge(
            "pitr_verify_max_age_seconds",
            "The age at which the newest verification is overdue; NaN where none is demanded",
            |report| report.verify_max_age_seconds,
        );
        self.gauge(
            "pitr_verify_last_run_timestamp_seconds",
            "When the repository was last verified; NaN before the first verification",
            |report| unix_seconds(report.last_verify.as_ref().map(|verify| verify.finished)),
        );
        self.gauge(
            "pitr_verify_last_passed",
            "Whether the last verification passed; NaN before the first",
            |report| {
                report
                    .last_verify
                    .as_ref()
                    .map(|verify| flag(verify.passed))
            },
        );
        self.gauge(
            "pitr_backup_last_failed",
            "Whether the newest base backup failed",
            |report| Some(flag(report.failed_backup.is_some())),
        );
        self.gauge(
            "pitr_expire_last_failed",
            "Whether the newest application of retention failed",
            |report| Some(flag(report.failed_expire.is_some())),
        );
        self.gauge(
            "pitr_backup_max_age_seconds",
            "The age at which the newest base backup is overdue",
            |report| Some(report.backup_max_age_seconds),
        );
        self.gauge(
            "pitr_drill_max_age_seconds",
            "The age at which the newest drill is overdue; NaN where none is demanded",
            |report| report.drill_max_age_seconds,
        );
        self.gauge(
            "pitr_clock_offset_seconds",
            "The server's clock minus the archiver's; NaN while the server is not asked",
            |report| report.clock_offset_seconds,
        );
        self.gauge(
            "pitr_certificate_expiry_timestamp_seconds",
            "When the dashboard's certificate ends; NaN without TLS",
            |report| unix_seconds(report.certificate_expiry),
        );
        self.gauge(
            "pitr_repository_failing",
            "Whether the repository refuses or does not answer; of several, all that are needed",
            |report| Some(flag(report.repository_error.is_some())),
        );
        self.gauges(
            "pitr_repository_place_failing",
            "Whether this place of the repository refuses, does not answer, or held an older state",
            |report| places(report, |place| Some(flag(place.error.is_some()))),
        );
        self.gauges(
            "pitr_repository_place_lag_seconds",
            "Age of the oldest WAL that this place of the repository lacks; NaN while that is not known",
            |report| places(report, |place| place.lag_seconds),
        );
        self.gauges(
            "pitr_repository_place_queue_bytes",
            "Bytes that wait for this place of the repository",
            |report| places(report, |place| Some(number(place.queued_bytes))),
        );
        self.gauges(
            "pitr_alert_firing",
            "Whether the archiver's own alert fires",
            |report| {
                RULES
                    .iter()
                    .map(|rule| {
                        let fires = report.alerts.iter().any(|alert| alert.name == rule.name);
                        (vec![("alert", rule.name.to_owned())], Some(flag(fires)))
                    })
                    .collect()
            },
        );
        self.gauge(
            "pitr_window_earliest_timestamp_seconds",
            "The earliest time that can be restored",
            |report| unix_seconds(report.window.earliest),
        );
        self.gauge(
            "pitr_window_latest_timestamp_seconds",
            "The last instant that can be restored, by the server's clock",
            |report| unix_seconds(report.window.latest),
        );
        self.gauge(
            "pitr_window_gaps",
            "Interruptions of the WAL in the window",
            |report| report.window.gaps.map(number),
        );
        self.gauge(
            "pitr_backup_last_success_timestamp_seconds",
            "When the last base backup became restorable",
            |report| unix_seconds(report.last_backup.as_ref().map(|backup| backup.finished)),
        );
        self.gauge(
            "pitr_backup_duration_seconds",
            "How long the last base backup took",
            |report| {
                let backup = report.last_backup.as_ref()?;
                let micros = backup.finished.micros_since(backup.started);
                u64::try_from(micros)
                    .ok()
                    .map(|micros| number(micros) / 1e6)
            },
        );
        self.gauge(
            "pitr_backup_stored_bytes",
            "Bytes of the last base backup",
            |report| {
                report
                    .last_backup
                    .as_ref()
                    .map(|backup| number(backup.stored_bytes))
            },
        );
    }
}

fn with_cluster(report: &ClusterReport, labels: Labels) -> Labels {
    let mut all = vec![("cluster", report.cluster.to_string())];
    all.extend(labels);
    all
}

fn tiers(
    report: &ClusterReport,
    value: impl Fn(&TierReport) -> Option<f64>,
) -> Samples<Option<f64>> {
    [
        ("local", &report.durable.local),
        ("remote", &report.durable.remote),
    ]
    .into_iter()
    .map(|(name, tier)| (vec![("tier", name.to_owned())], value(tier)))
    .collect()
}

/// One place of the repository.
struct Place<'a> {
    url: &'a str,
    error: Option<&'a str>,
    lag_seconds: Option<f64>,
    queued_bytes: u64,
}

/// Returns a sample for each place of the repository, also if there is only one place.
fn places(
    report: &ClusterReport,
    value: impl Fn(&Place<'_>) -> Option<f64>,
) -> Samples<Option<f64>> {
    let only = Place {
        url: &report.repository,
        error: report.repository_error.as_deref(),
        lag_seconds: report.durable.remote.rpo_seconds,
        queued_bytes: report.counters.upload_queue_bytes,
    };
    let several = report.repositories.iter().map(|place| Place {
        url: &place.url,
        error: place.problem(),
        lag_seconds: Some(place.lag_seconds),
        queued_bytes: place.queued_bytes as u64,
    });
    let is_alone = report.repositories.is_empty();
    let all = is_alone.then_some(only).into_iter().chain(several);
    all.map(|place| (vec![("repository", place.url.to_owned())], value(&place)))
        .collect()
}

fn number(value: u64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "Prometheus keeps every number as a float"
    )]
    let value = value as f64;
    value
}

fn unix_seconds(time: Option<PgTimestamp>) -> Option<f64> {
    Some(time?.to_jiff()?.as_duration().as_secs_f64())
}

fn flag(value: bool) -> f64 {
    if value { 1.0 } else { 0.0 }
}
