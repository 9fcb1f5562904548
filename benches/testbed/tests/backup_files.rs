//! Tests the parsers of a cluster's and a base backup's files with files that PostgreSQL wrote, and
//! against PostgreSQL's own programs.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use testbed::{
    cluster::{Cluster, PORT},
    programs::{directory, succeed},
    tools::servers_or_skip,
};
use wal_format::{
    BackupLabel, BackupManifest, ControlFile, Lsn, SegmentSize, control_file::ClusterState,
    tablespace_map,
};

/// A server with a tablespace whose path needs escapes, and a tar backup of it.
struct Taken {
    cluster: Cluster,
    tablespace: TempDir,
    backup: TempDir,
}

fn take(major: u16, bin: &Path) -> Result<Taken> {
    let settings =
        "fsync = off\nmax_connections = 37\nwal_log_hints = on\nmax_prepared_transactions = 3\n";
    let cluster = Cluster::start(bin, 1 << (major % 5), settings)?;
    let tablespace = directory()?;
    let mut client = cluster.connect()?;
    let location = tablespace.path().join("with space and \\ in it");
    let mut mkdir = testbed::programs::command(Path::new("mkdir"))?;
    succeed(mkdir.arg(&location))?;
    client.batch_execute(&format!(
        "create tablespace place location '{}'",
        location.display()
    ))?;
    client.batch_execute("create table placed tablespace place as select 1")?;
    let backup = directory()?;
    let mut pg_basebackup = cluster.program("pg_basebackup")?;
    pg_basebackup.arg("-h").arg(cluster.socket_directory());
    pg_basebackup.args(["-U", "postgres", "-p", &PORT.to_string()]);
    // Version 13 cannot choose a checksum algorithm that keeps the manifest of a fixture short, so
    // all versions use CRC-32C.
    let target = backup.path().join("taken");
    pg_basebackup.args([
        "-X",
        "none",
        "-F",
        "tar",
        "-c",
        "fast",
        "-l",
        "nightly: 'all'",
        "-D",
    ]);
    succeed(pg_basebackup.arg(&target))?;
    Ok(Taken {
        cluster,
        tablespace,
        backup,
    })
}

impl Taken {
    fn file(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.backup.path().join("taken");
        if name == "backup_manifest" {
            return Ok(fs::read(path.join(name))?);
        }
        let output = Command::new("tar")
            .arg("-xOf")
            .arg(path.join("base.tar"))
            .arg(name)
            .output()?;
        ensure!(output.status.success(), "tar cannot find {name}");
        Ok(output.stdout)
    }

    /// Returns the output of `pg_controldata`, for example `Database cluster state: in production`.
    fn control_data(&self) -> Result<BTreeMap<String, String>> {
        let mut pg_controldata = self.cluster.program("pg_controldata")?;
        pg_controldata.env("TZ", "UTC").env("LC_ALL", "C");
        let text = succeed(pg_controldata.arg(self.cluster.data()))?;
        let line = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_owned(), value.trim().to_owned()))
        };
        Ok(text.lines().filter_map(line).collect())
    }
}

/// Compares every field with the output of `pg_controldata`.
fn check_control(
    major: u16,
    control: &ControlFile,
    printed: &BTreeMap<String, String>,
) -> Result<()> {
    let flag = |on: bool| if on { "yes" } else { "no" }.to_owned();
    let setting = |on: bool| if on { "on" } else { "off" }.to_owned();
    let checkpoint = &control.checkpoint;
    let timeline = control
        .min_recovery_timeline
        .map_or(0, wal_format::TimelineId::get);
    let (epoch, xid) = (checkpoint.next_xid >> 32, checkpoint.next_xid & 0xFFFF_FFFF);
    let level = ["minimal", "replica", "logical"];
    let level = usize::try_from(control.wal_level)
        .ok()
        .and_then(|at| level.get(at));
    let clock = |time: wal_format::PgTimestamp| -> Result<String> {
        let time = time.to_jiff().context("a time")?;
        Ok(time.strftime("%a %b %e %H:%M:%S %Y").to_string())
    };
    for (name, ours) in [
        (
            "Database system identifier",
            control.system_identifier.to_string(),
        ),
        ("Database cluster state", control.state.as_str().to_owned()),
        ("pg_control last modified", clock(control.written)?),
        (
            "Latest checkpoint location",
            control.checkpoint_lsn.to_string(),
        ),
        (
            "Latest checkpoint's REDO location",
            checkpoint.redo_lsn.to_string(),
        ),
        (
            "Latest checkpoint's TimeLineID",
            checkpoint.timeline.get().to_string(),
        ),
        (
            "Latest checkpoint's PrevTimeLineID",
            checkpoint.previous_timeline.get().to_string(),
        ),
        (
            "Latest checkpoint's full_page_writes",
            setting(checkpoint.full_page_writes),
        ),
        ("Latest checkpoint's NextXID", format!("{epoch}:{xid}")),
        ("Time of latest checkpoint", clock(checkpoint.time)?),
        (
            "Minimum recovery ending location",
            control.min_recovery_lsn.to_string(),
        ),
        ("Min recovery ending loc's timeline", timeline.to_string()),
        (
            "Backup start location",
            control.backup_start_lsn.to_string(),
        ),
        ("Backup end location", control.backup_end_lsn.to_string()),
        (
            "End-of-backup record required",
            flag(control.backup_end_required),
        ),
        ("wal_level setting", (*level.context("a level")?).to_owned()),
        ("wal_log_hints setting", setting(control.wal_log_hints)),
        (
            "max_connections setting",
            control.max_connections.to_string(),
        ),
        (
            "max_worker_processes setting",
            control.max_worker_processes.to_string(),
        ),
        (
            "max_wal_senders setting",
            control.max_wal_senders.to_string(),
        ),
        (
            "max_prepared_xacts setting",
            control.max_prepared_transactions.to_string(),
        ),
        (
            "max_locks_per_xact setting",
            control.max_locks_per_transaction.to_string(),
        ),
        (
            "track_commit_timestamp setting",
            setting(control.track_commit_timestamp),
        ),
        ("Database block size", control.block_bytes.to_string()),
        ("WAL block size", control.wal_page_bytes.to_string()),
        ("Bytes per WAL segment", control.segment_bytes.to_string()),
    ] {
        let theirs = printed
            .get(name)
            .with_context(|| format!("pg_controldata prints no {name}"))?;
        // Some versions print the lower half of an LSN with leading zeros.
        let same = match (theirs.parse::<Lsn>(), ours.parse::<Lsn>()) {
            (Ok(theirs), Ok(ours)) => theirs == ours,
            _ => *theirs == ours,
        };
        ensure!(same, "{name}: we say {ours}, pg_controldata {theirs}");
    }
    let checksums = printed
        .get("Data page checksum version")
        .map(String::as_str);
    ensure!(checksums == Some(if control.data_checksums { "1" } else { "0" }));
    ensure!(
        control.version.major() == major,
        "it is of {}",
        control.version
    );
    Ok(())
}

fn check(major: u16, bin: &Path) -> Result<()> {
    let taken = take(major, bin)?;
    let control = ControlFile::parse(&fs::read(taken.cluster.data().join("global/pg_control"))?)?;
    check_control(major, &control, &taken.control_data()?)?;
    ensure!(control.state == ClusterState::InProduction);
    ensure!((control.max_connections, control.wal_log_hints) == (37, true));

    let label = BackupLabel::parse(&taken.file("backup_label")?)?;
    let size = SegmentSize::new(u64::from(control.segment_bytes))?;
    ensure!(label.label.as_deref() == Some("nightly: 'all'") && !label.from_standby);
    ensure!(label.start_segment.segment(size) == Some(size.segment_of(label.start_lsn)));
    ensure!(label.checkpoint_lsn >= label.start_lsn);

    let map = tablespace_map::parse(control.version, &taken.file("tablespace_map")?)?;
    let location = taken.tablespace.path().join("with space and \\ in it");
    ensure!(
        map.len() == 1 && Path::new(&map[0].location) == location,
        "{map:?}"
    );

    let manifest = BackupManifest::parse(&taken.file("backup_manifest")?)?;
    let named = manifest
        .system_identifier
        .is_none_or(|found| found == control.system_identifier);
    ensure!(named && manifest.system_identifier.is_some() == (major >= 17));
    ensure!(manifest.files.len() > 900, "{} files", manifest.files.len());
    let range = manifest.wal_ranges.first().context("a range of WAL")?;
    ensure!(range.start_lsn == label.start_lsn && range.timeline == label.start_segment.timeline);
    let in_tablespace = format!("pg_tblspc/{}/", map[0].oid);
    ensure!(
        manifest
            .files
            .iter()
            .any(|file| file.path.starts_with(&in_tablespace))
    );
    ensure!(manifest.files.iter().all(|file| file.checksum.is_some()));
    let label_bytes = taken.file("backup_label")?.len() as u64;
    let listed = manifest
        .files
        .iter()
        .find(|file| file.path == "backup_label");
    ensure!(listed.is_some_and(|file| file.size == label_bytes));

    if let Some(fixtures) = env::var_os("TIDEMARK_FIXTURES").map(PathBuf::from) {
        fs::create_dir_all(&fixtures)?;
        for name in [
            "global/pg_control",
            "backup_label",
            "tablespace_map",
            "backup_manifest",
        ] {
            let short = name.rsplit('/').next().unwrap_or(name);
            fs::write(
                fixtures.join(format!("pg{major}.{short}")),
                taken.file(name)?,
            )?;
        }
    }
    Ok(())
}

#[test]
fn every_file_of_a_backup_parses_and_says_what_postgresql_says() {
    for (major, bin) in servers_or_skip() {
        check(major, &bin).unwrap_or_else(|error| panic!("PostgreSQL {major}: {error:?}"));
        eprintln!(
            "PostgreSQL {major}: pg_control, backup_label, tablespace_map and backup_manifest agree"
        );
    }
}
