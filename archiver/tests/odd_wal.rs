//! WAL of unusual form: huge records, many segment switches, LSNs over the 32-bit boundary, a crash
//! within a record.

use std::{fs, path::PathBuf};

use wal_format::{Lsn, SealedReader, SegmentName, SegmentSize, TimelineId};

use crate::support::{Place, Server, postgres_bin, succeed, wait_flushed, wait_until};

/// The memory that the daemon may use for any WAL. RocksDB's caches and two segments of 1 MiB need
/// far less.
const MEMORY_KIB_MAX: u64 = 192 << 10;

/// Runs `pg_resetwal` on the stopped server: its WAL continues in this segment.
fn reset_wal(server: &Server, segment: &str) {
    let mut reset = server.command("pg_resetwal");
    reset.arg("-D").arg(server.data()).args(["-l", segment]);
    succeed("pg_resetwal", &reset.output().expect("pg_resetwal runs"));
}

#[test]
fn a_record_of_many_megabytes_is_streamed_in_bounded_memory() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    let megabytes = if testbed::is_long() { 900 } else { 200 };
    server.sql(&format!(
        "SELECT pg_logical_emit_message(false, 'huge', repeat('x', {megabytes} * 1000000))"
    ));
    server.write_wal(100);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    let peak = archiver.peak_memory_kib();
    assert!(peak < MEMORY_KIB_MAX, "{peak} KiB");
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
}

#[test]
fn a_storm_of_segment_switches_costs_almost_nothing() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.sql("CREATE TABLE load (number int, filler text)");
    for number in 0..40 {
        server.sql(&format!("INSERT INTO load VALUES ({number}, 'x')"));
        server.sql("SELECT pg_switch_wal()");
    }
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.sealed() >= 40, "{} segments", place.sealed());
    let bytes = |path: &PathBuf| fs::metadata(path).expect("an object").len();
    let stored: u64 = place.files_below("/wal/").iter().skip(8).map(bytes).sum();
    assert!(
        stored < 32 * 64 * 1024,
        "{stored} bytes for segments that hold a commit each"
    );
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
    place.verify(&server.conninfo());
}

#[test]
fn lsns_cross_the_32_bit_boundary() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    server.down("fast");
    // With 1 MiB segments the last one below the boundary has number FFF.
    reset_wal(&server, "000000010000000000000FFE");
    server.up();
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(4500);
    let lsn = server.lsn();
    assert!(lsn.0 > u64::from(u32::MAX), "{lsn}");
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
    let verdict = place.verify(&server.conninfo());
    assert!(verdict.contains("no gap"), "{verdict}");
}

#[test]
fn a_crash_within_a_record_is_streamed_over() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "autovacuum=off");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(300);
    wait_flushed(&server, server.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    // As in PostgreSQL's `026_overwrite_contrecord.pl`: a record that crosses into a segment which
    // a crash removes.
    server.sql(
        "DO $$ BEGIN LOOP INSERT INTO load SELECT g, repeat(md5(g::text), 20) FROM generate_series(1, 10) g; \
         EXIT WHEN (1 << 20) - (pg_current_wal_insert_lsn() - '0/0') % (1 << 20) < 16384; END LOOP; END $$",
    );
    server.sql("SELECT pg_logical_emit_message(true, 'x', repeat('xyzxz', 123456))");
    let gone = server.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
    server.down("immediate");
    fs::remove_file(server.data().join("pg_wal").join(gone)).expect("it goes");
    server.up();
    let archiver = place.run(&server.conninfo());
    server.write_wal(1500);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    let backup = place.command(&server.conninfo()).arg("backup").output();
    succeed("backup", &backup.expect("wal-archiver runs"));
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
    let verdict = place.verify(&server.conninfo());
    assert!(verdict.contains("no gap"), "{verdict}");
}

/// Returns the end of the WAL in the repository.
fn archived_end(place: &Place) -> Lsn {
    let objects = [place.files_below("/wal/"), place.files_below("/tail/")].concat();
    let end = |path: &PathBuf| {
        // A tail may be removed meanwhile.
        let object = fs::read(path).ok()?;
        Some(SealedReader::open(&object).ok()?.header().end_lsn)
    };
    objects.iter().filter_map(end).max().unwrap_or(Lsn::ZERO)
}

/// Returns the LSN of the stopped server's newest checkpoint.
fn checkpoint(server: &Server) -> Lsn {
    let mut control = server.command("pg_controldata");
    let output = control.arg("-D").arg(server.data()).output();
    let text = succeed("pg_controldata", &output.expect("pg_controldata runs"));
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Latest checkpoint location:"))
        .expect("a checkpoint");
    line.trim().parse().expect("an LSN")
}

#[test]
fn a_shutdown_checkpoint_is_archived_while_the_server_is_down() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    for _ in 0..2 {
        server.write_wal(700);
        // Wait for the connection. Otherwise the checkpoint would be archived only after the next
        // start.
        wait_flushed(&server, server.lsn());
        server.down("fast");
        let checkpoint = checkpoint(&server);
        // The server has ended, and its last WAL is being uploaded.
        wait_until("the shutdown checkpoint is archived", || {
            archived_end(&place) > checkpoint
        });
        server.up();
    }
    server.write_wal(700);
    place.assert_whole(&server, archiver);
}

#[test]
fn pages_of_an_unknown_version_are_refused_by_name_and_wait_on_the_server() {
    let Some(bin) = postgres_bin() else { return };
    // Otherwise the server sends the segments from memory.
    let server = Server::start(&bin, "wal_buffers=64kB");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(300);
    wait_flushed(&server, server.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    let size = SegmentSize::new(1 << 20).expect("1 MiB");
    let next = size.segment_of(server.lsn()).next();
    server.write_wal(3500);
    let name = SegmentName::new(TimelineId::FIRST, next, size).to_string();
    let path = server.data().join("pg_wal").join(name);
    let sound = fs::read(&path).expect("a segment");
    let page = 5 * 8192;
    let mut forged = sound.clone();
    forged[page..page + 2].copy_from_slice(&0xD1FF_u16.to_le_bytes());
    fs::write(&path, &forged).expect("it is forged");

    let mut archiver = place.run(&server.conninfo());
    archiver.wait_for_log("0xD1FF");
    wait_until("it is red", || {
        archiver
            .get("/api/v1/clusters")
            .contains("\"state\":\"broken\"")
    });
    let log = archiver.log();
    if testbed::is_long() {
        // The WAL is requested again, in case it was damaged in transit.
        assert_eq!(archiver.wait().code(), Some(4));
    } else {
        archiver.kill();
    }
    let at = next.start_lsn(size).add(page as u64);
    assert!(
        log.contains("0xD1FF") && log.contains(&at.to_string()),
        "{log}"
    );
    let kept: Lsn = server
        .sql("SELECT restart_lsn FROM pg_replication_slots")
        .parse()
        .expect("an LSN");
    assert!(kept <= at, "{kept} was acknowledged, {at} cannot be read");

    fs::write(&path, &sound).expect("it is mended");
    let archiver = place.run(&server.conninfo());
    place.assert_whole(&server, archiver);
}

#[test]
#[ignore = "long: make test-long"]
fn segments_of_a_gigabyte() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start_with_segments(&bin, 1024, "max_wal_size=3GB\nwal_keep_size=3GB");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    for _ in 0..2 {
        server.write_wal(3000);
        server.sql("SELECT pg_switch_wal()");
    }
    server.write_wal(3000);
    wait_flushed(&server, server.lsn());
    archiver.kill();
    let archiver = place.run(&server.conninfo());
    server.write_wal(300);
    wait_flushed(&server, server.lsn());
    eprintln!("peak: {} KiB", archiver.peak_memory_kib());
    place.assert_whole(&server, archiver);
    let sealed = place.files_below("/wal/");
    assert!(sealed.len() >= 2, "{sealed:?}");
    for path in sealed {
        let object = fs::read(path).expect("an object");
        let header = *SealedReader::open(&object).expect("sound").header();
        assert_eq!(header.raw_bytes(), 1 << 30);
    }
}
