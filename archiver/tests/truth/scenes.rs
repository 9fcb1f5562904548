//! The matrix of states: in each of them, before and after a restart of the archiver, everything
//! that is shown is compared with what a restore gives, and pictures of the page are taken.
//!
//! All of it belongs to the long tier.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt, chown},
    process::Command,
};

use repository::durable::rename;
use rustix::process::{Pid, Signal, kill_process};
use testbed::object_store::ObjectStoreServer;

use super::{compare, configured, damage_in_the_middle, flip, verify};
use crate::{
    dashboard::camera::Camera,
    present::{backup, report},
    support::{
        Archiver, Load, Place, Server, postgres_bin, run_command, server_user, store_refuses,
        succeed, wait_flushed, wait_until,
    },
};

/// A state: its name, the lights of which it shows one, and a function that begins it and returns
/// the function that ends it.
struct Scene {
    name: &'static str,
    light: &'static [&'static str],
    /// False if the archiver would not start in this state.
    restarts: bool,
    begin: fn(&Place, &Server) -> Box<dyn FnOnce()>,
}

/// The number of walsenders: one for the stream, one for a backup, one for a new stream while the
/// server still has the previous one, and one more.
const WALSENDERS: usize = 4;

/// Ordered so that each state leaves what the next one needs.
const SCENES: &[Scene] = &[
    Scene {
        name: "idle",
        light: &["ok"],
        restarts: true,
        begin: |_, _| Box::new(|| ()),
    },
    Scene {
        name: "load",
        light: &["ok"],
        restarts: true,
        begin: |_, server| {
            let load = server.load();
            Box::new(move || drop(load))
        },
    },
    Scene {
        name: "the stream is cut",
        // After a restart, nothing of the primary is known without a stream.
        light: &["at_risk", "unknown"],
        restarts: true,
        begin: |_, server| {
            let taken = take_the_walsenders(server);
            server.write_wal(100);
            Box::new(move || drop(taken))
        },
    },
    Scene {
        name: "stalled",
        light: &["at_risk", "degraded"],
        restarts: true,
        begin: |_, server| {
            let pid = server.sql("SELECT pid FROM pg_stat_replication LIMIT 1");
            let pid = pid
                .parse()
                .ok()
                .and_then(Pid::from_raw)
                .expect("a walsender");
            kill_process(pid, Signal::STOP).expect("it stops");
            server.write_wal(100);
            Box::new(move || kill_process(pid, Signal::CONT).expect("it goes on"))
        },
    },
    Scene {
        name: "the repository refuses",
        light: &["at_risk"],
        restarts: true,
        begin: |place, server| {
            let comes_back = store_refuses(place);
            server.write_wal(100);
            Box::new(comes_back)
        },
    },
    Scene {
        name: "the repository is emptied",
        light: &["broken"],
        restarts: true,
        begin: |place, server| {
            let (here, aside) = (
                place.repository().join("main"),
                place.repository().with_extension("emptied"),
            );
            rename(&here, &aside).expect("the archive goes");
            server.write_wal(100);
            Box::new(move || {
                drop(fs::remove_dir_all(&here));
                rename(&aside, &here).expect("the archive is back");
            })
        },
    },
    Scene {
        name: "a segment is damaged",
        light: &["broken"],
        restarts: true,
        begin: |place, server| {
            let (object, _) = damage_in_the_middle(place, server);
            assert_eq!(verify(place, server), Some(4));
            let again = place.command(&server.conninfo());
            Box::new(move || {
                flip(&object);
                let mut again = again;
                let verified = again.arg("verify").output().expect("it runs");
                assert_eq!(verified.status.code(), Some(0), "{verified:?}");
            })
        },
    },
    Scene {
        name: "a gap",
        light: &["broken"],
        restarts: true,
        begin: |_, server| {
            // Otherwise the archive would repair itself at once by a backup.
            let unreadable = server.data().join("base/unreadable");
            fs::write(&unreadable, "").expect("a file");
            if let Some((user, group)) = server_user() {
                chown(&unreadable, Some(user), Some(group)).expect("chown");
            }
            fs::set_permissions(&unreadable, Permissions::from_mode(0o000)).expect("chmod");
            let file = cut_the_stream(server);
            for setting in ["max_slot_wal_keep_size = '1MB'", "max_wal_size = '2MB'"] {
                server.sql(&format!("ALTER SYSTEM SET {setting}"));
            }
            server.sql("SELECT pg_reload_conf()");
            wait_until("the slot is lost", || {
                server.write_wal(2000);
                server.sql("CHECKPOINT");
                server.sql("SELECT wal_status FROM pg_replication_slots") == "lost"
            });
            let_it_stream(&file, server.command("pg_ctl"), &server.data());
            Box::new(move || fs::remove_file(unreadable).expect("it goes"))
        },
    },
];

/// Ends the stream and takes every walsender, so that no replication connection is accepted.
/// Returns the clients that have them.
fn take_the_walsenders(server: &Server) -> Vec<Load> {
    let ours = "FROM pg_stat_replication WHERE application_name <> 'psql'";
    let taken = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'psql'";
    let mut clients = Vec::new();
    wait_until("every walsender is taken", || {
        server.sql(&format!("SELECT pg_terminate_backend(pid) {ours}"));
        // A client that is refused ends, because the archiver was faster.
        clients.retain_mut(Load::is_running);
        while clients.len() < WALSENDERS {
            clients.push(server.replication_client());
        }
        server.sql(taken) == WALSENDERS.to_string()
    });
    clients
}

/// Refuses replication connections, but not SQL. Returns the file of the access rules.
fn cut_the_stream(server: &Server) -> std::path::PathBuf {
    let file = server.data().join("pg_hba.conf");
    let rules = "local replication all reject\nlocal all all trust\n";
    fs::write(&file, rules).expect("pg_hba.conf");
    server.sql("SELECT pg_reload_conf()");
    wait_until("the stream is cut", || {
        server.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_replication");
        server.sql("SELECT count(*) FROM pg_stat_replication") == "0"
    });
    file
}

fn let_it_stream(file: &std::path::Path, mut reload: Command, data: &std::path::Path) {
    fs::write(file, "local all all trust\nlocal replication all trust\n").expect("pg_hba.conf");
    let reloaded = reload.arg("-D").arg(data).arg("reload").output();
    succeed("pg_ctl reload", &reloaded.expect("pg_ctl runs"));
}

fn wait_until_well(archiver: &Archiver) {
    wait_until("all is well", || report(archiver)["state"] == "ok");
}

fn shoot(camera: &mut Option<Camera>, name: &str, archiver: &Archiver) {
    if let Some(camera) = camera {
        camera.shoot(name, archiver, "/");
    }
}

/// Kills the archiver, starts it again and waits until it knows what can be restored.
fn restart(archiver: Archiver, place: &Place, command: Command) -> Archiver {
    let starts = archiver.log().matches("serving HTTP").count();
    archiver.kill();
    let archiver = place.run_with(command);
    wait_until("it serves", || {
        archiver.log().matches("serving HTTP").count() > starts
    });
    archiver
}

/// Compares a state before and after a restart, and takes its pictures.
fn check(
    (name, light): (&str, &[&str]),
    restarts: bool,
    camera: &mut Option<Camera>,
    place: &Place,
    command: &dyn Fn() -> Command,
    mut archiver: Archiver,
) -> Archiver {
    let rounds = ["", ", after a restart"]
        .into_iter()
        .take(1 + usize::from(restarts));
    for round in rounds {
        let name = format!("{name}{round}");
        if !round.is_empty() {
            archiver = restart(archiver, place, command());
            wait_until("it is known what can be restored", || {
                report(&archiver)["looked"] == true
            });
        }
        wait_until(&format!("{name}: {light:?}"), || {
            let state = report(&archiver)["state"].clone();
            light.iter().any(|light| state == *light)
        });
        compare(&name, &archiver, place);
        shoot(camera, &name, &archiver);
    }
    archiver
}

/// Tests every scene, before and after a restart of the archiver.
#[test]
#[ignore = "long: make test-long"]
fn every_state_shows_what_a_restore_gives() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(
        &bin,
        &format!(
            "wal_sender_timeout=0\nwal_keep_size=0\nmin_wal_size=2MB\nmax_wal_senders={WALSENDERS}"
        ),
    );
    let place = Place::new();
    let mut camera = Camera::start();
    let mut archiver = place.run_with(configured(&place, &server));
    archiver.wait_for_log("INFO streaming");
    server.write_wal(100);
    let command = || configured(&place, &server);
    let none = ("no backup", &["at_risk"][..]);
    archiver = check(none, true, &mut camera, &place, &command, archiver);
    backup(&place, &server);
    for scene in SCENES {
        wait_until_well(&archiver);
        let end = (scene.begin)(&place, &server);
        let (shown, how) = ((scene.name, scene.light), scene.restarts);
        archiver = check(shown, how, &mut camera, &place, &command, archiver);
        end();
    }
    wait_until_well(&archiver);
    server.down("immediate");
    let away = ("the primary is away", &["unknown"][..]);
    archiver = check(away, true, &mut camera, &place, &command, archiver);
    drop(archiver);
}

/// Tests the states after a promotion of a standby that had all WAL, that lagged the archive, and
/// that had more than the archive.
#[test]
#[ignore = "long: make test-long"]
fn the_states_after_a_promotion_show_what_a_restore_gives() {
    let Some(bin) = postgres_bin() else { return };
    let mut camera = Camera::start();
    for (name, light) in [
        ("a promotion in step", "ok"),
        // The failover lost commits, which is at risk for a day.
        ("a promotion of a lagging standby", "at_risk"),
        ("a promotion of a standby ahead", "ok"),
    ] {
        let primary = Server::start(&bin, "");
        let standby = Server::standby_of(&primary);
        let place = Place::new();
        let list = primary.conninfo_with(&standby);
        let command = || place.command(&list);
        let archiver = place.run_with(command());
        archiver.wait_for_log("INFO streaming");
        primary.write_wal(300);
        backup(&place, &primary);
        primary.write_wal(300);
        wait_flushed(&primary, primary.lsn());
        wait_until_well(&archiver);
        let has_all = || {
            let lsn = primary.lsn();
            wait_until("the standby has all WAL", || {
                standby.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'")) == "t"
            });
        };
        has_all();
        let mut restarted = None;
        if name.contains("lagging") {
            standby.down("fast");
            primary.write_wal(900);
            wait_flushed(&primary, primary.lsn());
            primary.down("immediate");
            standby.up();
        } else if name.contains("ahead") {
            archiver.signal(Signal::KILL);
            primary.write_wal(900);
            has_all();
            primary.down("immediate");
            restarted = Some(place.run_with(command()));
        } else {
            primary.down("immediate");
        }
        let archiver = restarted.unwrap_or(archiver);
        standby.promote();
        standby.write_wal(300);
        wait_until("the new timeline is archived", || {
            let report = report(&archiver);
            report["source"]["timeline"] == 2 && report["durable"]["remote"]["lag_bytes"] == 0
        });
        check(
            (name, &[light]),
            true,
            &mut camera,
            &place,
            &command,
            archiver,
        );
    }
}

/// Tests a repository that accepts connections and never answers, before and after a restart. Its
/// plan cannot be asked for, because it would wait too.
#[test]
#[ignore = "long: make test-long"]
fn a_repository_that_hangs_is_told_and_freezes_nothing() {
    let Some(bin) = postgres_bin() else { return };
    let Some(store) = ObjectStoreServer::start_or_skip() else {
        return;
    };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let command = place.command_in_bucket(&store, server.conninfo());
    let directory = place.repository();
    let directory = directory.parent().expect("a directory");
    let mut camera = Camera::start();
    let archiver = run_command(command(), directory);
    archiver.wait_for_log("INFO streaming");
    server.write_wal(100);
    succeed(
        "backup",
        &command().arg("backup").output().expect("it runs"),
    );
    wait_until_well(&archiver);
    store.signal(Signal::STOP).expect("it stops");
    server.write_wal(100);
    wait_until("it is an alert", || {
        let report = report(&archiver);
        assert_ne!(report["state"], "broken", "{report}");
        let alerts = report["alerts"].to_string();
        alerts.contains("PitrRepositoryFailing") && report["state"] == "at_risk"
    });
    let told = report(&archiver)["repository_error"].to_string();
    assert!(told.contains("has not answered a request for "), "{told}");
    shoot(&mut camera, "the repository hangs", &archiver);
    archiver.kill();
    let archiver = run_command(command(), directory);
    wait_until("it serves", || {
        archiver.log().matches("serving HTTP").count() == 2
    });
    wait_until("the report names it after a restart", || {
        let report = report(&archiver);
        assert_ne!(report["state"], "ok", "{report}");
        report["reason"].to_string().contains("repository")
    });
    shoot(
        &mut camera,
        "the repository hangs, after a restart",
        &archiver,
    );
    store.signal(Signal::CONT).expect("it goes on");
    wait_until_well(&archiver);
}
