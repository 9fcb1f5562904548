//! Every light is deliberately broken once on a real server: the page, the API, the metric, and the
//! shipped rule in a real Prometheus turn on, and turn off again after the repair.
//!
//! Prints how long each took. `TIDEMARK_LONG=1` requires at most 10 s.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt, chown},
    path::PathBuf,
    time::{Duration, Instant},
};

use wal_format::OutcomeKind;

use super::{body, outcome, prometheus::Prometheus, record, report};
use crate::support::{
    Archiver, Place, Server, postgres_bin, server_user, wait_flushed, wait_until,
};

/// The time within which a fault must be shown everywhere.
const SHOWN_WITHIN: Duration = Duration::from_secs(10);
const SETTINGS: &str = "wal_keep_size=0\nmin_wal_size=2MB\nmax_slot_wal_keep_size=1GB\n\
    archive_mode=on\narchive_command='true'";
/// Small enough to be filled quickly.
const SPOOL_LIMIT: u32 = 64 << 20;

/// A fault, and the alert that must report it.
struct Light {
    alert: &'static str,
    /// Another alert that the same fault raises.
    also: &'static str,
    state: &'static str,
    breaks: fn(&World),
    mends: fn(&World),
    /// True if everything is well after the repair, or the next fault follows directly.
    whole: bool,
}

/// Alerts that this test does not break. `tls` tests the certificate's light, because it has a
/// certificate. The conditions of the others take hours, or need standbys and several repositories:
/// unit tests check them.
const TESTED_ELSEWHERE: [&str; 12] = [
    "PitrCertificateExpiry",
    "PitrDrillWithoutResult",
    "PitrFailoverLoss",
    "PitrOffsiteBehind",
    "PitrRepositoryAway",
    "PitrRtoOverTarget",
    "PitrSlotInactive",
    "PitrSlotMissing",
    "PitrSpoolFilling",
    "PitrStandbySlot",
    "PitrVerifyOverdue",
    "PitrWindowShort",
];

/// Ordered so that each fault leaves the state that the next one needs.
const LIGHTS: [Light; 13] = [
    Light {
        alert: "PitrStreamDown",
        also: "PitrRpoOverTarget",
        state: "at_risk",
        breaks: |world| {
            world.cut_the_stream();
            world.server.write_wal(100);
        },
        mends: World::let_it_stream,
        whole: true,
    },
    Light {
        alert: "PitrRepositoryFailing",
        also: "PitrSpoolNearFull",
        state: "at_risk",
        breaks: |world| {
            world.take_the_store();
            world.server.write_wal(SPOOL_LIMIT >> 10);
        },
        mends: |_| {},
        whole: false,
    },
    Light {
        alert: "PitrSpoolNearFull",
        also: "PitrRpoOverTarget",
        state: "at_risk",
        breaks: |_| {},
        mends: World::give_the_store_back,
        whole: true,
    },
    Light {
        alert: "PitrCorruptObject",
        also: "PitrBroken",
        state: "broken",
        breaks: |world| {
            world.flip_a_bit();
            assert_eq!(world.run(&["verify"]), Some(4));
        },
        mends: |world| {
            world.flip_a_bit();
            assert_eq!(world.run(&["verify"]), Some(0));
        },
        whole: true,
    },
    Light {
        alert: "PitrDrillFailed",
        also: "PitrBroken",
        state: "broken",
        breaks: |world| record(&world.place, &outcome(OutcomeKind::Drill, false)),
        mends: |world| record(&world.place, &outcome(OutcomeKind::Drill, true)),
        whole: true,
    },
    Light {
        alert: "PitrDrillOverdue",
        also: "PitrBackupOverdue",
        state: "degraded",
        breaks: |world| world.configure("drill_max_age = '1s'\nbackup_max_age = '1s'"),
        mends: |world| world.configure(""),
        whole: true,
    },
    Light {
        alert: "PitrBackupFailed",
        also: "PitrBackupFailed",
        state: "degraded",
        breaks: |world| {
            world.forbid_backups();
            assert_ne!(world.run(&["backup"]), Some(0));
        },
        mends: |world| {
            world.allow_backups();
            assert_eq!(world.run(&["backup"]), Some(0));
        },
        whole: true,
    },
    Light {
        alert: "PitrExpireFailed",
        also: "PitrExpireFailed",
        state: "degraded",
        breaks: |world| record(&world.place, &outcome(OutcomeKind::Expire, false)),
        mends: |world| record(&world.place, &outcome(OutcomeKind::Expire, true)),
        whole: true,
    },
    Light {
        alert: "PitrPushFailing",
        also: "PitrPushFailing",
        state: "degraded",
        breaks: |world| {
            world.server_setting("archive_command", "false");
            // Without new WAL there is nothing to switch.
            world.server.write_wal(10);
            world.server.sql("SELECT pg_switch_wal()");
        },
        mends: |world| {
            world.server_setting("archive_command", "true");
            world.server.write_wal(10);
            world.server.sql("SELECT pg_switch_wal()");
        },
        whole: true,
    },
    Light {
        alert: "PitrClockStep",
        also: "PitrClockStep",
        state: "degraded",
        breaks: |world| {
            // The archiver's search_path has public before pg_catalog, so this function shifts the
            // server's clock by an hour.
            world.server.sql(
                "CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql \
                 RETURN pg_catalog.clock_timestamp() + interval '1 hour'",
            );
        },
        mends: |world| {
            world.server.sql("DROP FUNCTION public.clock_timestamp()");
        },
        whole: true,
    },
    Light {
        alert: "PitrSlotAtRisk",
        also: "PitrStreamDown",
        state: "at_risk",
        breaks: |world| {
            world.server_setting("max_slot_wal_keep_size", "16MB");
            world.cut_the_stream();
            let share = "SELECT safe_wal_size < 3 << 20 FROM pg_replication_slots";
            while world.server.sql(share) != "t" {
                world.server.write_wal(500);
            }
        },
        mends: |_| {},
        whole: false,
    },
    Light {
        alert: "PitrSlotLost",
        also: "PitrStreamDown",
        state: "broken",
        breaks: |world| {
            world.server_setting("max_slot_wal_keep_size", "1MB");
            world.server_setting("max_wal_size", "2MB");
            wait_until("the slot is lost", || {
                world.server.write_wal(2000);
                world.server.sql("CHECKPOINT");
                world
                    .server
                    .sql("SELECT wal_status FROM pg_replication_slots")
                    == "lost"
            });
        },
        mends: |_| {},
        whole: false,
    },
    Light {
        alert: "PitrGap",
        also: "PitrBackupFailed",
        state: "broken",
        breaks: |world| {
            // Otherwise the archive would repair itself at once.
            world.forbid_backups();
            world.let_it_stream();
        },
        mends: World::allow_backups,
        whole: true,
    },
];

struct World {
    server: Server,
    place: Place,
    archiver: Archiver,
    prometheus: Option<Prometheus>,
    configuration: PathBuf,
}

impl World {
    fn start() -> Option<Self> {
        let bin = postgres_bin()?;
        let server = Server::start(&bin, SETTINGS);
        let place = Place::new();
        let configuration = place.spool().with_extension("toml");
        fs::write(&configuration, configured("")).expect("a configuration");
        let archiver = place.run_with(command(&place, &server, &configuration));
        archiver.wait_for_log("INFO streaming");
        let prometheus = Prometheus::start(&archiver.address());
        let world = Self {
            server,
            place,
            archiver,
            prometheus,
            configuration,
        };
        world.server.write_wal(200);
        assert_eq!(world.run(&["backup"]), Some(0));
        record(&world.place, &outcome(OutcomeKind::Drill, true));
        wait_flushed(&world.server, world.server.lsn());
        Some(world)
    }

    /// Returns the exit code of another `wal-archiver` on the same host.
    fn run(&self, arguments: &[&str]) -> Option<i32> {
        let mut command = command(&self.place, &self.server, &self.configuration);
        let output = command.args(arguments).output();
        output.expect("wal-archiver runs").status.code()
    }

    /// Returns the standard output and the exit code of a command that queries the daemon.
    fn ask(&self, arguments: &[&str]) -> (String, Option<i32>) {
        let asking = self.configuration.with_extension("status");
        let text = format!("http = '{}'\n{}", self.archiver.address(), configured(""));
        fs::write(&asking, text).expect("a configuration");
        let mut command = command(&self.place, &self.server, &asking);
        let output = command.args(arguments).output().expect("it runs");
        (
            String::from_utf8(output.stdout).expect("UTF-8"),
            output.status.code(),
        )
    }

    fn configure(&self, more: &str) {
        fs::write(&self.configuration, configured(more)).expect("a configuration");
        self.archiver.signal(rustix::process::Signal::HUP);
    }

    fn server_setting(&self, name: &str, value: &str) {
        self.server
            .sql(&format!("ALTER SYSTEM SET {name} = '{value}'"));
        self.server.sql("SELECT pg_reload_conf()");
        wait_until(name, || self.server.sql(&format!("SHOW {name}")) == value);
    }

    /// Refuses replication connections but not SQL.
    fn cut_the_stream(&self) {
        self.access("local replication all reject\n");
        wait_until("the stream is cut", || {
            self.server
                .sql("SELECT pg_terminate_backend(pid) FROM pg_stat_replication");
            self.server.sql("SELECT count(*) FROM pg_stat_replication") == "0"
        });
    }

    fn let_it_stream(&self) {
        self.access("local replication all trust\n");
    }

    fn access(&self, of_replication: &str) {
        let file = self.server.data().join("pg_hba.conf");
        fs::write(file, format!("{of_replication}local all all trust\n")).expect("pg_hba.conf");
        self.server.sql("SELECT pg_reload_conf()");
    }

    /// Makes every put fail. A repository that is not in its place is another fault
    /// (`unmounted.rs`).
    fn take_the_store(&self) {
        let temporary = self.place.repository().join(".tidemark-tmp");
        drop(fs::remove_dir_all(&temporary));
        fs::write(&temporary, "a file is no folder").expect("in its place");
    }

    fn give_the_store_back(&self) {
        let temporary = self.place.repository().join(".tidemark-tmp");
        fs::remove_file(&temporary).expect("the file goes");
    }

    /// Flips a bit of a backup. A second call restores the original.
    fn flip_a_bit(&self) {
        let slice = self.place.files_below("base.000001");
        let slice = slice.first().expect("a slice");
        let mut object = fs::read(slice).expect("an object");
        object[100] ^= 1;
        fs::write(slice, object).expect("it is written");
    }

    /// Makes every base backup fail, by a file in the data directory that the server cannot read.
    fn forbid_backups(&self) {
        let file = self.server.data().join("base/unreadable");
        fs::write(&file, "").expect("a file");
        if let Some((user, group)) = server_user() {
            chown(&file, Some(user), Some(group)).expect("chown");
        }
        fs::set_permissions(&file, Permissions::from_mode(0o000)).expect("chmod");
    }

    fn allow_backups(&self) {
        fs::remove_file(self.server.data().join("base/unreadable")).expect("it goes");
    }

    /// Returns the firing alerts according to the page, the API, the metric and Prometheus.
    fn shown(&self) -> [Vec<String>; 4] {
        let page = body(&self.archiver.get("/"));
        let (_, alerts) = page
            .split_once("id=\"alerts\"")
            .expect("the page has alerts");
        let (alerts, _) = alerts.split_once("</section>").expect("it ends");
        let metrics = body(&self.archiver.get("/metrics"));
        let of_metrics = metrics
            .lines()
            .filter_map(|line| line.strip_prefix("pitr_alert_firing{cluster=\"main\",alert=\""))
            .filter_map(|line| line.strip_suffix("\"} 1.0"));
        let report = report(&self.archiver);
        let of_api = report["alerts"].as_array().expect("a list").iter();
        let known = status::alerts::RULES
            .iter()
            .map(|rule| rule.name.to_owned());
        [
            known
                .filter(|name| alerts.contains(&format!("<strong>{name}</strong>")))
                .collect(),
            of_api
                .map(|alert| alert["name"].as_str().expect("a name").to_owned())
                .collect(),
            of_metrics.map(str::to_owned).collect(),
            self.prometheus
                .as_ref()
                .map(Prometheus::firing)
                .unwrap_or_default(),
        ]
    }

    /// Waits until all four report it, or none does.
    fn wait_for(&self, alert: &str, on: bool) -> Duration {
        let began = Instant::now();
        let installed = if self.prometheus.is_some() { 4 } else { 3 };
        wait_until(&format!("{alert} is shown: {on}"), || {
            let shown = self.shown();
            let mut shown = shown.iter().take(installed);
            shown.all(|names| names.iter().any(|name| name == alert) == on)
        });
        began.elapsed()
    }

    fn wait_until_well(&self) {
        wait_until("nothing is wrong", || {
            let page = body(&self.archiver.get("/"));
            self.shown().iter().all(Vec::is_empty)
                && page.contains("Nothing needs you.")
                && report(&self.archiver)["state"] == "ok"
        });
    }
}

fn configured(more: &str) -> String {
    format!("gap_grace = '1s'\nrpo_target = '3s'\nspool_limit_bytes = {SPOOL_LIMIT}\n{more}\n")
}

fn command(place: &Place, server: &Server, configuration: &PathBuf) -> std::process::Command {
    let conninfo = format!(
        "{} options='-c search_path=public,pg_catalog'",
        server.conninfo()
    );
    let mut command = place.command(&conninfo);
    command.arg("--config").arg(configuration);
    command
}

#[test]
fn every_light_is_broken_once_and_recovers() {
    let Some(world) = World::start() else { return };
    world.wait_until_well();
    let nagios = ["status", "--nagios"];
    let (line, code) = world.ask(&nagios);
    assert_eq!(
        (line.starts_with("TIDEMARK OK"), code),
        (true, Some(0)),
        "{line}"
    );
    for light in LIGHTS {
        (light.breaks)(&world);
        let took = world.wait_for(light.alert, true);
        eprintln!(
            "{}: shown everywhere after {:.1} s",
            light.alert,
            took.as_secs_f64()
        );
        if testbed::is_long() {
            assert!(took <= SHOWN_WITHIN, "{}: {took:?}", light.alert);
        }
        world.wait_for(light.also, true);
        wait_until(&format!("{} is {}", light.alert, light.state), || {
            report(&world.archiver)["state"] == light.state
        });
        if light.alert == "PitrRepositoryFailing" {
            let metrics = body(&world.archiver.get("/metrics"));
            let failed =
                "pitr_repository_errors_total{cluster=\"main\",op=\"put\",kind=\"unreachable\"} ";
            let failed = metrics.lines().find_map(|line| line.strip_prefix(failed));
            assert_ne!(failed.expect("a counter"), "0");
        }
        if light.alert == "PitrPushFailing" {
            let (line, code) = world.ask(&nagios);
            assert!(
                line.starts_with("TIDEMARK WARNING - main: archive_command fails"),
                "{line}"
            );
            assert_eq!(code, Some(1));
            let (text, _) = world.ask(&["status"]);
            assert!(text.contains("archive_command fails"), "{text}");
            let page = body(&world.archiver.get("/"));
            assert!(page.contains("archive_command fails"), "{page}");
        }
        if light.alert == "PitrStreamDown" {
            let (line, code) = world.ask(&nagios);
            assert!(
                line.starts_with("TIDEMARK CRITICAL - main: losing the primary"),
                "{line}"
            );
            assert_eq!(code, Some(2));
        }
        // Only the state that the daemon reports is wrong here.
        if light.alert == "PitrDrillFailed" {
            let (said, code) = world.ask(&["check"]);
            assert!(said.contains("FAIL  state of main: broken: "), "{said}");
            assert_eq!(code, Some(1), "{said}");
        }
        (light.mends)(&world);
        if light.whole {
            world.wait_for(light.alert, false);
            world.wait_until_well();
        }
    }
    let events = || body(&world.archiver.get("/api/v1/clusters/main/events"));
    // A report shows at once that an alert is over; its event comes with the next check.
    wait_until("the last alert has an event of its end", || {
        events().contains("PitrGap: over after")
    });
    let events = events();
    for name in status::alerts::RULES.map(|rule| rule.name) {
        if !TESTED_ELSEWHERE.contains(&name) {
            let told = events.matches(&format!("{name}: ")).count();
            assert!(told >= 2, "{name} is told and resolved in {events}");
        }
    }
    let failed = "could not open file";
    assert!(
        events.contains(failed),
        "why the backup failed is told in {events}"
    );
    // Only Prometheus reports an archiver that does not answer.
    if let Some(prometheus) = &world.prometheus {
        world.archiver.signal(rustix::process::Signal::STOP);
        wait_until("the archiver is down", || {
            prometheus.firing() == ["PitrArchiverDown"]
        });
        world.archiver.signal(rustix::process::Signal::CONT);
    }
    world.wait_until_well();
    assert_eq!(world.archiver.terminate().code(), Some(0));
}
