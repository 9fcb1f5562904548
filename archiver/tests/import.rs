//! WAL that other tools archived: a directory of `cp`, one of `pg_receivewal`, and a pgBackRest
//! repository.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::support::{Place, Server, owned_dir, postgres_bin, succeed};

const PGBACKREST: &str = "/usr/bin/pgbackrest";
/// One for each compression method of `pg_receivewal`.
const SLOTS: [&str; 3] = ["theirs_plain", "theirs_gzip", "theirs_lz4"];
const SHA1: &str = "da39a3ee5e6b4b0d3255bfef95601890afd80709";

fn import(
    place: &Place,
    server: &Server,
    arguments: &[&str],
    folder: &Path,
) -> (Option<i32>, String) {
    let mut import = place.command(&server.conninfo());
    let output = import.arg("import").args(arguments).arg(folder).output();
    let output = output.expect("wal-archiver runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    eprintln!("{:?} {said}{errors}", output.status.code());
    (output.status.code(), said)
}

fn tool(program: &str, arguments: &[&str], file: &Path) {
    let output = Command::new(program).args(arguments).arg(file).output();
    succeed(program, &output.expect("it runs"));
}

#[test]
fn wal_of_other_tools_is_taken_over_and_compared() {
    let Some(bin) = postgres_bin() else { return };
    let copies = owned_dir();
    let archive_command = format!(
        "archive_mode=on\narchive_command='cp %p {}/%f'\n",
        copies.path().display()
    );
    let server = Server::start(&bin, &archive_command);
    for slot in SLOTS {
        server.sql(&format!(
            "SELECT pg_create_physical_replication_slot('{slot}', true)"
        ));
    }
    server.write_wal(6000);
    let last = server.sql("SELECT pg_walfile_name(pg_switch_wal())");
    crate::support::wait_until("cp has archived everything", || {
        copies.path().join(&last).exists()
    });
    let segments = || {
        let names = fs::read_dir(copies.path()).expect("a folder").flatten();
        let mut names: Vec<PathBuf> = names.map(|entry| entry.path()).collect();
        names.sort();
        names
    };
    let count = segments().len();
    assert!(count >= 6, "{count}");

    // A directory of cp, twice.
    let place = Place::new();
    let (code, said) = import(&place, &server, &[], copies.path());
    assert_eq!(code, Some(0));
    assert!(
        said.contains(&format!("{count} files imported, 0 were there")),
        "{said}"
    );
    let (code, said) = import(&place, &server, &[], copies.path());
    assert_eq!(code, Some(0));
    assert!(
        said.contains(&format!("0 files imported, {count} were there")),
        "{said}"
    );
    place.assert_equals_pg_wal(&server.data());
    place.verify(&server.conninfo());

    received_ones_are_taken_over(&server);

    // pgBackRest's layout: a checksum in the name, zstd and LZ4, other files in between.
    let backrest = owned_dir();
    let inner = backrest.path().join("archive/main/17-1/0000000100000000");
    fs::create_dir_all(&inner).expect("folders");
    fs::write(
        backrest.path().join("archive/main/archive.info"),
        "[cluster]",
    )
    .expect("a file");
    for (number, path) in segments().iter().enumerate() {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name");
        let copy = inner.join(format!("{name}-{SHA1}"));
        fs::copy(path, &copy).expect("a copy");
        if number % 2 == 0 {
            tool("zstd", &["-q", "--rm"], &copy);
        }
    }
    let (code, said) = import(&place, &server, &["--compare"], backrest.path());
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains(&format!("{count} segments are the same, 0 are missing")),
        "{said}"
    );
    differences_are_named(&server, &place, &segments()[2]);
}

/// Imports directories of `pg_receivewal`, plain and compressed by it, with an incomplete last
/// file.
fn received_ones_are_taken_over(server: &Server) {
    let output = server
        .psql(&server.conninfo(), "SELECT pg_current_wal_flush_lsn()")
        .stdout;
    let end = String::from_utf8_lossy(&output).trim().to_owned();
    for (slot, compress) in SLOTS.into_iter().zip(["none", "gzip:1", "lz4"]) {
        let received = owned_dir();
        let mut receive = server.command("pg_receivewal");
        receive.arg(format!("--slot={slot}"));
        receive.args([
            &format!("--compress={compress}"),
            "--no-loop",
            "--synchronous",
        ]);
        receive.arg(format!("--endpos={end}")).arg("-D");
        receive
            .arg(received.path())
            .args(["-d", &server.conninfo()]);
        let output = receive.output().expect("it runs");
        if String::from_utf8_lossy(&output.stderr).contains("does not support compression") {
            eprintln!("SKIPPED: this pg_receivewal has no {compress}");
            continue;
        }
        succeed("pg_receivewal", &output);
        let place = Place::new();
        let (code, said) = import(&place, server, &[], received.path());
        assert_eq!(code, Some(0), "{compress}: {said}");
        place.assert_equals_pg_wal(&server.data());
        place.verify(&server.conninfo());
    }
}

/// Imports repositories that pgBackRest has written, with each of its compression methods.
#[test]
fn a_real_pgbackrest_repository_is_taken_over_and_compared() {
    let servers = testbed::tools::servers_or_skip();
    // The newest version that the pgBackRest of Debian 12 supports.
    let Some((_, bin)) = servers.into_iter().find(|(major, _)| *major == 15) else {
        return;
    };
    if !Path::new(PGBACKREST).exists() {
        eprintln!("SKIPPED: pgBackRest is not installed; run `make install-tools`");
        return;
    }
    let server = Server::start(&bin, "archive_mode=on\narchive_command='/bin/false'\n");
    server.write_wal(4000);
    let last = server.sql("SELECT pg_walfile_name(pg_switch_wal())");
    let mut segments: Vec<PathBuf> = fs::read_dir(server.data().join("pg_wal"))
        .expect("pg_wal")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.len() == 24 && name <= last.as_str())
        })
        .collect();
    segments.sort();
    let place = Place::new();
    for (round, compress) in ["gz", "lz4", "zst", "none"].into_iter().enumerate() {
        let root = owned_dir();
        backrest(&server, root.path(), compress, &["stanza-create"]);
        for segment in &segments {
            let segment = segment.to_str().expect("UTF-8");
            backrest(&server, root.path(), compress, &["archive-push", segment]);
        }
        let repository = root.path().join("repository");
        let count = segments.len();
        if round == 0 {
            let (code, said) = import(&place, &server, &[], &repository);
            assert_eq!(code, Some(0), "{said}");
            assert!(
                said.contains(&format!("{count} files imported, 0 were there")),
                "{said}"
            );
            place.assert_equals_pg_wal(&server.data());
            place.verify(&server.conninfo());
        }
        let (code, said) = import(&place, &server, &["--compare"], &repository);
        assert_eq!(code, Some(0), "{compress}: {said}");
        let same = format!("{count} segments are the same, 0 are missing");
        assert!(said.contains(&same), "{compress}: {said}");
    }
    // The other archive has a segment with different bytes, and the comparison reports the LSN of
    // the first difference.
    let root = owned_dir();
    let edited = root.path().join(segments[2].file_name().expect("a name"));
    let mut wal = fs::read(&segments[2]).expect("a segment");
    wal[700_000] ^= 1;
    fs::write(&edited, &wal).expect("a file");
    backrest(&server, root.path(), "lz4", &["stanza-create"]);
    let path = edited.to_str().expect("UTF-8");
    backrest(&server, root.path(), "lz4", &["archive-push", path]);
    let repository = root.path().join("repository");
    let (code, said) = import(&place, &server, &["--compare"], &repository);
    assert_eq!(code, Some(4), "{said}");
    let name = segments[2]
        .file_name()
        .and_then(|name| name.to_str())
        .expect("a name");
    let number = u64::from_str_radix(&name[16..], 16).expect("hexadecimal");
    let lsn = format!("at 0/{:X}", (number << 20) + 700_000);
    assert!(
        said.contains("differs") && said.contains(&lsn),
        "{lsn}: {said}"
    );
}

fn backrest(server: &Server, root: &Path, compress: &str, arguments: &[&str]) {
    let root = root.display();
    let mut backrest = server.command(PGBACKREST);
    // It needs its own libpq, not the server's.
    backrest.env_remove("LD_LIBRARY_PATH");
    for option in [
        format!("--repo1-path={root}/repository"),
        format!("--log-path={root}"),
        format!("--lock-path={root}/lock"),
        format!("--spool-path={root}"),
        format!("--pg1-path={}", server.data().display()),
        format!("--pg1-socket-path={}", server.directory().display()),
        format!("--pg1-port={}", server.port),
        format!("--compress-type={compress}"),
    ] {
        // Each command supports only some options. As environment variables the others are ignored.
        let (name, value) = option.split_once('=').expect("an option");
        let name = name
            .trim_start_matches('-')
            .replace('-', "_")
            .to_uppercase();
        backrest.env(format!("PGBACKREST_{name}"), value);
    }
    backrest.env("PGBACKREST_LOG_LEVEL_FILE", "off");
    backrest.env("PGBACKREST_PG1_USER", "postgres");
    let output = backrest
        .args(["--stanza=main", "--no-config"])
        .args(arguments)
        .output();
    succeed("pgbackrest", &output.expect("it runs"));
}

/// Checks that a flipped bit, a truncated file and a file that we do not have are each reported,
/// and that nothing changes.
fn differences_are_named(server: &Server, place: &Place, segment: &Path) {
    let other = owned_dir();
    let name = segment.file_name().expect("a name");
    let copy = other.path().join(name);
    let mut wal = fs::read(segment).expect("a segment");
    wal[700_000] ^= 1;
    fs::write(&copy, &wal).expect("a file");
    for arguments in [&["--compare"][..], &[]] {
        let (code, said) = import(place, server, arguments, other.path());
        assert_eq!(code, Some(4), "{said}");
        assert!(said.contains("differs") && said.contains("at 0/"), "{said}");
    }
    fs::write(&copy, &wal[..8192]).expect("a file");
    let (code, said) = import(place, server, &[], other.path());
    assert_eq!(code, Some(1));
    assert!(said.contains("refused"), "{said}");
    fs::remove_file(&copy).expect("it goes");
    let (code, _) = import(place, server, &[], other.path());
    assert_eq!(code, Some(2), "an empty folder");
    place.assert_equals_pg_wal(&server.data());
    let empty = Place::new();
    let (code, _) = import(
        &empty,
        server,
        &["--compare"],
        segment.parent().expect("a folder"),
    );
    assert_eq!(code, Some(2), "nothing to compare with");
}
