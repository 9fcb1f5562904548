//! An archived cluster that is large enough to interrupt its restore, with a tablespace.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use testbed::{
    programs::{command, directory, server_user, succeed},
    restored::Restored,
};

use crate::support::{Archived, query, servers, wait_until};

pub(crate) const MARKER: &str = "RESTORE_INCOMPLETE";
pub(crate) const SUMS: &str = "SELECT (SELECT count(*) || ' ' || sum(hashtext(filler)::bigint) FROM load) || ' ' \
    || (SELECT count(*) FROM elsewhere)";

/// An archived cluster whose restore takes a while, with a tablespace.
pub(crate) struct Scene {
    pub(crate) archived: Archived,
    pub(crate) bin: PathBuf,
    pub(crate) places: tempfile::TempDir,
    pub(crate) sums: String,
}

impl Scene {
    pub(crate) fn make() -> Option<Self> {
        let (_, bin) = servers().pop()?;
        let places = directory().expect("a directory");
        let tablespace = owned(&places.path().join("tablespace"));
        let mut archived = Archived::start(&bin, "");
        let location = tablespace.display();
        archived.sql(&format!("CREATE TABLESPACE there LOCATION '{location}'"));
        archived.sql(
            "CREATE TABLE elsewhere (n int) TABLESPACE there; INSERT INTO elsewhere SELECT generate_series(1, 100000); \
             CREATE TABLE load (number int, filler text)",
        );
        let load = "INSERT INTO load SELECT n, (SELECT string_agg(md5(n::text || i), '') FROM generate_series(1, 60) i) \
                    FROM generate_series(1, 20000) n";
        archived.sql(load);
        archived.backup();
        archived.sql("INSERT INTO load VALUES (0, 'last'); INSERT INTO elsewhere VALUES (0)");
        archived.finish();
        let sums = archived.sql(SUMS);
        Some(Self {
            archived,
            bin,
            places,
            sums,
        })
    }

    /// Returns the restore into `root`, without a start.
    pub(crate) fn restore(&self, root: &Path) -> Command {
        let mut restore = self.archived.pitr_restore();
        restore.arg("--target-dir").arg(root.join("data"));
        restore.arg("--target-action=promote");
        restore.arg(self.mapping(&root.join("tablespace")));
        let socket = format!("unix_socket_directories={}", root.display());
        restore.args(["--set", "fsync=off", "--set", &socket]);
        restore
    }

    pub(crate) fn mapping(&self, new: &Path) -> String {
        let old = self.places.path().join("tablespace");
        format!("--tablespace-mapping={}={}", old.display(), new.display())
    }

    /// Starts the restored server and compares its content with the primary's.
    pub(crate) fn prove(&self, root: tempfile::TempDir) {
        self.verify(&root.path().join("data"));
        let mut pg_ctl = command(&self.bin.join("pg_ctl")).expect("pg_ctl");
        pg_ctl.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        pg_ctl.arg("-D").arg(root.path().join("data"));
        pg_ctl
            .arg("-l")
            .arg(root.path().join("log"))
            .args(["-w", "start"]);
        let status = pg_ctl.stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(
            status.expect("it runs").success(),
            "{:?}",
            fs::read_to_string(root.path().join("log"))
        );
        let restored = Restored::adopt(root, &self.bin, serde_json::Value::Null);
        wait_until("the restored server is promoted", || {
            query(&restored.conninfo(), "SELECT pg_is_in_recovery()") == "f"
        });
        assert_eq!(query(&restored.conninfo(), SUMS), self.sums);
    }

    /// Runs PostgreSQL's own verification of every file of the backup.
    pub(crate) fn verify(&self, data: &Path) {
        let manifests = find(self.archived.place.path(), "backup_manifest");
        let mut verify = command(&self.bin.join("pg_verifybackup")).expect("pg_verifybackup");
        verify.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        verify.arg("-n").arg("-m").arg(&manifests[0]);
        for ours in [
            "tidemark_plan.json",
            "tidemark_isolation.json",
            "tidemark_isolation.conf",
            // It includes the file above at its end.
            "postgresql.conf",
            "tablespace_map",
            "pg_wal",
        ] {
            verify.args(["-i", ours]);
        }
        succeed(verify.arg(data)).expect("pg_verifybackup");
    }

    /// Checks that an unfinished directory is not a cluster for PostgreSQL and not complete for us.
    pub(crate) fn assert_unfinished(&self, data: &Path) {
        assert!(data.join(MARKER).exists(), "it looks done");
        assert!(
            !data.join("global/pg_control").exists(),
            "it could be started"
        );
        let mut postgres = command(&self.bin.join("postgres")).expect("postgres");
        postgres.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        let refused = postgres.arg("-D").arg(data).output().expect("it runs");
        assert!(!refused.status.success(), "it started");
    }
}

/// Creates a directory of the servers' user.
pub(crate) fn owned(path: &Path) -> PathBuf {
    fs::create_dir(path).expect("a directory");
    if let Some((user, group)) = server_user().expect("the servers' user") {
        chown(path, Some(user), Some(group)).expect("chown");
    }
    path.to_owned()
}

fn find(root: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(find(&path, name));
        } else if entry.file_name() == name {
            found.push(path);
        }
    }
    found
}
