//! The owner of a restored copy's files gets in with the command that the restore prints, whatever
//! the parent's access rules are, and nobody else does.

use std::{
    env, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use testbed::{
    cluster::Cluster,
    programs::{command, directory, ours, server_user, succeed},
};

use crate::support::{Archived, SETTINGS, oldest_and_newest, query, said};

/// The users of the parent's rules do not exist on the copy's host.
const PEER: &str = "local all all peer\nhost all all 127.0.0.1/32 scram-sha-256\n";
const SCRAM: &str = "local all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n";

/// A restored copy, which is stopped when dropped.
struct Copied {
    data: PathBuf,
    bin: PathBuf,
    /// The lines that the restore printed.
    report: String,
}

impl Copied {
    fn restore(mut restore: Command, bin: &Path, data: PathBuf, arguments: &[&str]) -> Self {
        restore.env("LD_LIBRARY_PATH", bin.join("../lib"));
        restore.arg("--target-dir").arg(&data);
        restore.arg("--pg-bin").arg(bin).args(arguments);
        restore.args(["--set", "fsync=off", "--set", "shared_buffers=16MB"]);
        let report = succeed(&mut restore).expect("a copy");
        Self {
            data,
            bin: bin.to_owned(),
            report,
        }
    }

    /// Returns what the restore printed after `label`.
    fn printed(&self, label: &str) -> &str {
        let mut lines = self.report.lines();
        let line = lines.find_map(|line| line.strip_prefix(label));
        line.unwrap_or_else(|| panic!("{label}: {}", self.report))
            .trim()
    }

    /// Runs a printed command with more words, as the user of the servers or as the tests' own.
    fn shell(&self, printed: &str, more: &str, as_owner: bool) -> Output {
        let mut shell = if as_owner {
            command(Path::new("/bin/sh")).expect("a user")
        } else {
            Command::new("/bin/sh")
        };
        let usual = env::var_os("PATH").unwrap_or_default();
        let path = [self.bin.clone()]
            .into_iter()
            .chain(env::split_paths(&usual));
        shell.env("PATH", env::join_paths(path).expect("directories"));
        shell.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        shell.arg("-c").arg(format!("{printed} {more}"));
        shell.output().expect("it runs")
    }

    /// Returns the port of the running server.
    fn port(&self) -> String {
        let running = fs::read_to_string(self.data.join("postmaster.pid")).expect("it runs");
        running.lines().nth(3).expect("a port").trim().to_owned()
    }

    fn psql(&self, sql: &str, as_owner: bool) -> String {
        let more = format!("-XAtc \"{sql}\"");
        let output = self.shell(self.printed("connect with"), &more, as_owner);
        let (answer, error) = said(&output);
        assert!(output.status.success(), "{error}: {}", self.report);
        answer
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        if self.data.join("postmaster.pid").exists() {
            let mut pg_ctl = command(&self.bin.join("pg_ctl")).expect("a user");
            pg_ctl.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
            pg_ctl.arg("-D").arg(&self.data);
            drop(pg_ctl.args(["-m", "immediate", "-w", "stop"]).output());
        }
    }
}

/// Starts a parent whose first superuser has an unusual name.
fn parent(bin: &Path) -> Archived {
    let cluster = Cluster::start(bin, 1, SETTINGS).expect("a server");
    query(&cluster.conninfo(), "CREATE ROLE helper SUPERUSER LOGIN");
    let helper = cluster.conninfo().replace("user=postgres", "user=helper");
    query(&helper, "ALTER ROLE postgres RENAME TO \"the boss\"");
    // The archiver's own role.
    query(&helper, "CREATE ROLE postgres SUPERUSER LOGIN");
    Archived::of(cluster)
}

/// Takes a base backup of a parent with these access rules. The running server keeps its own.
fn backup_with(archived: &Archived, rules: &str) -> String {
    let hba = archived.cluster.data().join("pg_hba.conf");
    fs::write(hba, rules).expect("written");
    format!("--backup={}", archived.backup())
}

#[test]
fn the_printed_command_lets_the_owner_in_and_nobody_else() {
    for (major, bin) in oldest_and_newest() {
        eprintln!("PostgreSQL {major}");
        let mut archived = parent(&bin);
        let peer = backup_with(&archived, PEER);
        let scram = backup_with(&archived, SCRAM);
        archived.finish();
        let root = directory().expect("a directory");
        let restore = |name: &str, arguments: &[&str]| {
            Copied::restore(
                archived.pitr_restore(),
                &bin,
                root.path().join(name),
                arguments,
            )
        };

        let started = restore("started", &[&peer, "--start"]);
        assert_eq!(started.psql("SELECT current_user", true), "the boss");
        let rules = fs::read_to_string(started.data.join("pg_hba.conf")).expect("rules");
        assert!(rules.ends_with(PEER), "{rules}");
        let socket = format!("pg_stat_tmp/.s.PGSQL.{}", started.port());
        let socket = fs::metadata(started.data.join(socket)).expect("a socket");
        assert_eq!(socket.mode() & 0o777, 0o700);
        let by_network = format!(
            "psql -w \"host=127.0.0.1 port={} dbname=postgres user='the boss'\"",
            started.port()
        );
        let refused = started.shell(&by_network, "-XAtc \"SELECT 1\"", true);
        assert!(said(&refused).1.contains("password"), "{refused:?}");
        assert!(!refused.status.success());

        // Paused at the target, started by the printed command.
        let paused = restore("paused", &[&scram]);
        let start = format!("{}/log -w", root.path().display());
        let output = paused.shell(
            paused.printed("start it with"),
            &format!("-l {start}"),
            true,
        );
        assert!(output.status.success(), "{}", said(&output).1);
        assert_eq!(
            paused.psql("SELECT current_user, pg_is_in_recovery()", true),
            "the boss|t"
        );
        let rules = "SELECT count(*) FROM pg_hba_file_rules WHERE error IS NOT NULL";
        assert_eq!(paused.psql(rules, true), "0");

        // A socket directory that others may enter.
        let shared = restore("shared", &[&scram, "--set=unix_socket_directories=/tmp"]);
        let rules = fs::read_to_string(shared.data.join("pg_hba.conf")).expect("rules");
        assert_eq!(rules, SCRAM);

        let Some((uid, _)) = server_user().expect("the servers' user") else {
            eprintln!("SKIPPED: only root can restore for another owner");
            continue;
        };
        let mut restore = Command::new(ours("pitr-restore").expect("it is built"));
        let place = archived.place.path().display();
        restore.arg(format!("--repository=file://{place}/repository"));
        restore.args([format!("--spool={place}/spool"), format!("--owner={uid}")]);
        let of_root = root.path().join("of_root");
        let of_root = Copied::restore(restore, &bin, of_root, &[&peer, "--start"]);
        assert_eq!(of_root.psql("SELECT current_user", false), "the boss");
    }
}
