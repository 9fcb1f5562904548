//! WAL that other tools archived: a folder of `cp`, one of `pg_receivewal`, and a pgBackRest repository's layout.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::support::{Place, Server, owned_dir, postgres_bin, succeed};

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
    server.sql("SELECT pg_create_physical_replication_slot('theirs', true)");
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

    // A folder of cp, twice.
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

    // pg_receivewal's, compressed by itself, with an incomplete last one.
    let received = owned_dir();
    let output = server
        .psql(&server.conninfo(), "SELECT pg_current_wal_flush_lsn()")
        .stdout;
    let end = String::from_utf8_lossy(&output).trim().to_owned();
    let mut receive = server.command("pg_receivewal");
    receive.args([
        "--slot=theirs",
        "--compress=gzip:1",
        "--no-loop",
        "--synchronous",
    ]);
    receive
        .arg(format!("--endpos={end}"))
        .arg("-D")
        .arg(received.path());
    let output = receive.args(["-d", &server.conninfo()]).output();
    succeed("pg_receivewal", &output.expect("it runs"));
    let place = Place::new();
    let (code, said) = import(&place, &server, &[], received.path());
    assert_eq!(code, Some(0), "{said}");
    place.assert_equals_pg_wal(&server.data());
    place.verify(&server.conninfo());

    // pgBackRest's layout: a checksum in the name, zstd and LZ4, other files between.
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

/// One bit, one cut, one that we do not have: each is said, and nothing changes.
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
