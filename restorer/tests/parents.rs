//! Random parents: what a copy does leaves no trace outside of the copy.
//!
//! After restore, start, promotion, writes and stop of a copy, the directories of its parent, the
//! parent's tablespaces, archive and files outside, the repository, and the slots of its publisher
//! are byte for byte what they were, and the parent is sound. The seed is printed. The long tier
//! runs more rounds.

use std::{
    collections::{BTreeMap, hash_map::DefaultHasher},
    fs,
    hash::{Hash, Hasher},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use tempfile::TempDir;
use testbed::{
    cluster::{Cluster, PORT},
    programs::{directory, succeed},
    restored::Restored,
};

use crate::{
    scene::owned,
    support::{Archived, Chance, SETTINGS, long, oldest_and_newest, query, servers, wait_until},
};

/// Settings that reach outside of a data directory, with the versions that have them. `{at}` is a
/// directory outside, `{data}` the data directory.
const OUTSIDE: [(&str, u16, u16); 11] = [
    (
        "archive_mode = on\narchive_command = 'cp %p {at}/archive/%f'",
        13,
        99,
    ),
    (
        "archive_cleanup_command = 'rm -f {at}/archive/* {at}/kept/*'",
        13,
        99,
    ),
    (
        "recovery_end_command = 'rm -f {at}/archive/* {at}/kept/*'",
        13,
        99,
    ),
    ("external_pid_file = '{at}/run/parent.pid'", 13, 99),
    ("log_directory = '{at}/log'\nlogging_collector = on", 13, 99),
    ("data_directory = '{data}'", 13, 99),
    ("hba_file = '{at}/kept/pg_hba.conf'", 13, 99),
    (
        "primary_conninfo = '{conninfo}'\nprimary_slot_name = 'spare'",
        13,
        99,
    ),
    (
        "restore_command = 'mv {at}/archive/%f %p'\nrecovery_min_apply_delay = 1h",
        13,
        99,
    ),
    ("promote_trigger_file = '{at}/kept/pg_hba.conf'", 13, 15),
    ("stats_temp_directory = '{at}/stats'", 13, 14),
];

/// A server with a random selection of what reaches outside of it.
struct Parent {
    archived: Archived,
    /// The server that was promoted, if the parent is one.
    promoted: Option<Cluster>,
    publisher: Option<Cluster>,
    /// Holds everything outside of the data directory.
    outside: TempDir,
    /// Name and directory.
    tablespaces: Vec<(String, PathBuf)>,
    prepared: Vec<String>,
}

impl Parent {
    fn make(major: u16, bin: &Path, chance: &mut Chance) -> Self {
        let outside = directory().expect("a directory");
        for name in ["archive", "kept", "log", "run", "stats"] {
            owned(&outside.path().join(name));
        }
        let first = Cluster::start(bin, 1, &format!("{SETTINGS}wal_level = logical\n"));
        let first = first.expect("a server");
        query(&first.conninfo(), "CREATE EXTENSION amcheck");
        query(
            &first.conninfo(),
            "CREATE TABLE kept (n int PRIMARY KEY, t text); \
             INSERT INTO kept SELECT n, md5(n::text) FROM generate_series(1, 2000) n",
        );
        let mut archived = Archived::of(first);
        let mut promoted = None;
        if chance.below(2) == 0 {
            eprintln!("  a promoted standby");
            let standby = Cluster::standby_of(&archived.cluster, "").expect("a standby");
            archived.finish();
            archived.cluster.stop().expect("the primary stops");
            standby.promote().expect("it is promoted");
            archived.follow(&standby.conninfo());
            promoted = Some(standby);
        }
        let mut parent = Self {
            archived,
            promoted,
            publisher: None,
            outside,
            tablespaces: Vec::new(),
            prepared: Vec::new(),
        };
        parent.configure(major, chance);
        parent.sql("SELECT pg_create_physical_replication_slot('spare', true)");
        if chance.below(2) == 0 {
            parent.sql("SELECT pg_create_logical_replication_slot('decoded', 'test_decoding')");
        }
        if chance.below(2) == 0 {
            parent.subscribe(bin);
        }
        parent.change(chance);
        let place = &parent.archived.place;
        place
            .back_up(&parent.server().conninfo(), &[])
            .expect("a backup");
        parent.change(chance);
        parent
    }

    fn server(&self) -> &Cluster {
        self.promoted.as_ref().unwrap_or(&self.archived.cluster)
    }

    fn sql(&self, sql: &str) -> String {
        query(&self.server().conninfo(), sql)
    }

    fn configure(&self, major: u16, chance: &mut Chance) {
        let server = self.server();
        let at = self.outside.path().join("kept/pg_hba.conf");
        let hba = fs::read(server.data().join("pg_hba.conf")).expect("it is there");
        fs::write(at, hba).expect("written");
        for (lines, from, to) in OUTSIDE {
            if major < from || major > to || chance.below(3) == 0 {
                continue;
            }
            let lines = lines
                .replace("{at}", &self.outside.path().display().to_string())
                .replace("{data}", &server.data().display().to_string())
                .replace("{conninfo}", &server.conninfo());
            eprintln!("  {}", lines.replace('\n', "; "));
            server.configure(&lines).expect("configured");
        }
        server.stop().expect("it stops");
        server.start_again().expect("it starts");
    }

    fn subscribe(&mut self, bin: &Path) {
        eprintln!("  a subscription");
        let publisher = Cluster::start(bin, 1, "fsync = off\nwal_level = logical\n");
        let publisher = publisher.expect("a publisher");
        let conninfo = publisher.conninfo();
        let table = "CREATE TABLE followed (n int PRIMARY KEY)";
        query(&conninfo, table);
        query(&conninfo, "CREATE PUBLICATION everything FOR ALL TABLES");
        self.sql(table);
        self.sql(&format!(
            "CREATE SUBSCRIPTION followed CONNECTION '{conninfo}' PUBLICATION everything"
        ));
        self.publisher = Some(publisher);
        self.publish(1);
        self.wait_followed(1);
    }

    fn publish(&self, n: u32) {
        if let Some(publisher) = &self.publisher {
            let insert = format!("INSERT INTO followed VALUES ({n})");
            query(&publisher.conninfo(), &insert);
        }
    }

    fn wait_followed(&self, n: u32) {
        if self.publisher.is_some() {
            let found = format!("SELECT count(*) FROM followed WHERE n = {n}");
            wait_until("the subscription is in step", || self.sql(&found) == "1");
        }
    }

    /// Rows, and perhaps a tablespace and a prepared transaction.
    fn change(&mut self, chance: &mut Chance) {
        let number = self.tablespaces.len();
        if chance.below(3) > 0 {
            let name = format!("space{number}");
            let location = owned(&self.outside.path().join(&name));
            eprintln!("  tablespace {name}");
            self.sql(&format!(
                "CREATE TABLESPACE {name} LOCATION '{}'",
                location.display()
            ));
            self.sql(&format!(
                "CREATE TABLE in_{name} TABLESPACE {name} AS SELECT generate_series(1, 500) AS n"
            ));
            self.sql(&format!("CREATE INDEX ON in_{name} (n) TABLESPACE {name}"));
            self.tablespaces.push((name, location));
        }
        if chance.below(2) == 0 {
            let gid = format!("prepared {}", self.prepared.len());
            eprintln!("  {gid}");
            self.sql(&format!(
                "BEGIN; INSERT INTO kept VALUES (-1 - {}); PREPARE TRANSACTION '{gid}'",
                self.prepared.len()
            ));
            self.prepared.push(gid);
        }
        self.sql("UPDATE kept SET t = t || 'x' WHERE n % 7 = 0");
        self.sql("SELECT pg_switch_wal()");
        self.sql("DELETE FROM kept WHERE n % 13 = 0");
        self.sql("INSERT INTO kept SELECT n, 'again' FROM generate_series(1, 2000) n ON CONFLICT DO NOTHING");
    }

    /// The sum of all rows. A reader sets hint bits, which is the parent's own change.
    fn ledger(&self) -> String {
        let mut ledger =
            self.sql("SELECT count(*) || ' ' || sum(hashtext(k::text)::bigint) FROM kept k");
        for (name, _) in &self.tablespaces {
            ledger.push_str(&self.sql(&format!("SELECT ' ' || sum(n) FROM in_{name}")));
        }
        ledger
    }

    /// Everything that is not the copy's: each path with what it is.
    fn everything(&self, stopped: bool) -> BTreeMap<PathBuf, u64> {
        let mut found = BTreeMap::new();
        let mut roots = vec![
            self.outside.path().to_owned(),
            self.archived.cluster.data(),
            self.archived.place.path().join("repository"),
        ];
        roots.extend(self.promoted.iter().map(Cluster::data));
        for root in roots {
            record(&root, stopped, &mut found);
        }
        found
    }

    /// Its slots as its publisher sees them: who reads them, and of a stopped parent how far they
    /// are.
    fn slots(&self, stopped: bool) -> Option<String> {
        let publisher = self.publisher.as_ref()?;
        let shown = if stopped {
            "active || ' ' || confirmed_flush_lsn"
        } else {
            "active_pid::text"
        };
        let slots = format!(
            "SELECT string_agg(slot_name || ' ' || {shown}, ', ') FROM pg_replication_slots"
        );
        Some(query(&publisher.conninfo(), &slots))
    }

    /// PostgreSQL's own verification of tables and indexes.
    fn assert_sound(&self, major: u16) {
        if major < 14 {
            let checked = self.sql(
                "SELECT count(bt_index_check(index => indexrelid, heapallindexed => true)::text) \
                 FROM pg_index JOIN pg_class c ON c.oid = indexrelid JOIN pg_am a ON a.oid = relam \
                 WHERE amname = 'btree' AND relpersistence = 'p' AND indisvalid",
            );
            assert_ne!(checked, "0");
            return;
        }
        let mut amcheck = self.server().program("pg_amcheck").expect("a user");
        amcheck.arg("-h").arg(self.server().socket_directory());
        amcheck.args(["-p", &PORT.to_string(), "-U", "postgres"]);
        let said = succeed(amcheck.args(["--heapallindexed", "postgres"]));
        assert_eq!(said.expect("the parent is sound"), "");
    }
}

/// Adds a digest of the kind, the mode and the content of everything below `path`. The WAL of a
/// server that runs counts by its names: it writes a list of running transactions when it likes.
fn record(path: &Path, stopped: bool, found: &mut BTreeMap<PathBuf, u64>) {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return;
    };
    // The statistics of a running server of 13 or 14, which it writes on request.
    if path.ends_with("pg_stat_tmp") || path.ends_with("stats") {
        return;
    }
    let mut digest = DefaultHasher::new();
    metadata.mode().hash(&mut digest);
    if metadata.is_symlink() {
        fs::read_link(path).expect("a link").hash(&mut digest);
    } else if metadata.is_file() && (stopped || !path.parent().is_some_and(is_wal)) {
        fs::read(path).unwrap_or_default().hash(&mut digest);
    }
    found.insert(path.to_owned(), digest.finish());
    if metadata.is_dir() {
        for entry in fs::read_dir(path).expect("it lists").flatten() {
            record(&entry.path(), stopped, found);
        }
    }
}

fn is_wal(directory: &Path) -> bool {
    directory.ends_with("pg_wal")
}

fn differing(before: &BTreeMap<PathBuf, u64>, after: &BTreeMap<PathBuf, u64>) -> Vec<PathBuf> {
    let names = before.keys().chain(after.keys());
    let mut names: Vec<PathBuf> = names
        .filter(|name| before.get(*name) != after.get(*name))
        // The audit trail records the restore.
        .filter(|name| !name.to_string_lossy().contains("/outcome/restore"))
        .cloned()
        .collect();
    names.sort();
    names.dedup();
    names
}

/// Does to a promoted copy what a person who looks for lost rows may do, and worse.
fn work_in(copy: &Restored, parent: &Parent, chance: &mut Chance) {
    let sql = |sql: &str| query(&copy.conninfo(), sql);
    for gid in &parent.prepared {
        let held = sql(&format!(
            "SELECT count(*) FROM pg_prepared_xacts WHERE gid = '{gid}'"
        ));
        let end = ["COMMIT", "ROLLBACK"][chance.below(2)];
        if held == "1" {
            sql(&format!("{end} PREPARED '{gid}'"));
        }
    }
    for (name, _) in &parent.tablespaces {
        let statement = match chance.below(4) {
            0 => format!("TRUNCATE in_{name}"),
            1 => format!("DROP TABLE in_{name}"),
            2 => format!("INSERT INTO in_{name} SELECT generate_series(1, 5000)"),
            _ => format!("VACUUM FULL in_{name}"),
        };
        sql(&statement);
    }
    if chance.below(2) == 0
        && let Some((name, _)) = parent.tablespaces.first()
    {
        sql(&format!("DROP TABLE IF EXISTS in_{name}"));
        sql(&format!("DROP TABLESPACE {name}"));
    }
    sql("SELECT pg_switch_wal()");
    sql("UPDATE kept SET t = 'of the copy'");
    sql("CREATE TABLE of_the_copy AS SELECT generate_series(1, 10000) AS n");
    sql("VACUUM");
    sql("CHECKPOINT");
    sql("SELECT pg_switch_wal()");
    sql("CHECKPOINT");
    sql("SELECT pg_reload_conf()");
}

fn check(major: u16, bin: &Path, chance: &mut Chance) {
    let mut parent = Parent::make(major, bin, chance);
    let conninfo = parent.server().conninfo();
    parent.archived.finish_at(&conninfo);
    let ledger = parent.ledger();
    let stopped = chance.below(2) == 0;
    if stopped {
        eprintln!("  stopped");
        parent.server().stop().expect("it stops");
        // It waits for the parent, and for nobody else.
        parent.publish(2);
    } else {
        parent.sql("CHECKPOINT");
        let mut last = parent.everything(stopped);
        wait_until("the parent is quiet", || {
            sleep(Duration::from_millis(1500));
            let now = parent.everything(stopped);
            let quiet = now == last;
            last = now;
            quiet
        });
    }
    let before = parent.everything(stopped);
    let slots = parent.slots(stopped);

    let elsewhere = directory().expect("a directory");
    let mut arguments: Vec<String> = Vec::new();
    for (name, location) in &parent.tablespaces {
        arguments.push(format!(
            "--tablespace-mapping={}={}",
            location.display(),
            elsewhere.path().join(name).display()
        ));
    }
    // The socket of this copy is open to others, and the rules of a parent that keeps them outside
    // of its data directory are not in the copy: nobody is let in without rules.
    let settings = fs::read_to_string(parent.server().data().join("postgresql.conf"));
    if settings.expect("settings").contains("\nhba_file = ") {
        let rules = elsewhere.path().join("pg_hba.conf");
        fs::write(&rules, "local all all trust\n").expect("rules");
        arguments.push(format!("--set=hba_file={}", rules.display()));
    }
    let copy = Restored::start(&parent.archived.place, bin, &arguments).expect("a copy");
    work_in(&copy, &parent, chance);
    let mut pg_ctl = parent.server().program("pg_ctl").expect("a user");
    pg_ctl.arg("-D").arg(copy.data());
    succeed(pg_ctl.args(["-m", "fast", "-w", "stop"])).expect("the copy stops");
    drop(copy);

    let after = parent.everything(stopped);
    let differing = differing(&before, &after);
    assert!(differing.is_empty(), "the copy changed {differing:#?}");
    assert_eq!(parent.slots(stopped), slots, "the copy consumed a slot");
    if stopped {
        parent.server().start_again().expect("the parent starts");
        parent.wait_followed(2);
    }
    assert_eq!(parent.ledger(), ledger);
    parent.publish(3);
    parent.wait_followed(3);
    parent.assert_sound(major);
}

#[test]
fn a_copy_leaves_no_trace_outside_of_itself() {
    let mut chance = Chance::new();
    let (versions, rounds) = if long() {
        (servers(), 8)
    } else {
        (oldest_and_newest(), 1)
    };
    for (major, bin) in versions {
        for round in 0..rounds {
            eprintln!("PostgreSQL {major}, round {round}");
            check(major, &bin, &mut chance);
        }
    }
}
