//! Connection strings as a user writes them, correct and wrong, through the programs: files and
//! variables, and one clear line for each mistake.

use std::{fs, os::unix::fs::PermissionsExt, rc::Rc};

use crate::{
    certificates::{Certificates, private_file},
    connect::Secured,
    support::{Place, Server, postgres_bin, succeed, wait_flushed},
};

#[test]
fn wal_is_streamed_over_tls_by_service_and_password_file() {
    let Some(bin) = postgres_bin() else { return };
    let secured = Secured::start(&bin);
    let place = Place::new();
    let home = tempfile::tempdir().expect("a directory");
    fs::write(
        home.path().join(".pg_service.conf"),
        format!(
            "[ours]\nhost=localhost\nhostaddr=127.0.0.1\nport={}\nuser=u_scram\nsslmode=verify-full\nsslrootcert={}\n\
             channel_binding=require\n",
            secured.server.port,
            secured.certificates.shown("ca.crt")
        ),
    )
    .expect("a file");
    let passwords = home.path().join(".pgpass");
    private_file(
        &passwords,
        "localhost:*:replication:u_scram:S3CRET\nlocalhost:*:postgres:u_scram:S3CRET\n",
    );
    secured.server.write_wal(3000);
    let mut command = place.command("service=ours");
    command.env("HOME", home.path());
    let archiver = place.run_with(command);
    archiver.wait_for_log("streaming");
    secured.server.write_wal(3000);
    let lsn = secured.server.lsn();
    wait_flushed(&secured.server, lsn);
    let seen = secured.server.sql(
        "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'tidemark'",
    );
    assert_eq!(seen, "t");
    let mut backup = place.command("service=ours");
    let output = backup.env("HOME", home.path()).arg("backup").output();
    succeed("backup", &output.expect("wal-archiver runs"));
    assert!(!archiver.log().contains("S3CRET"), "{}", archiver.log());
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&secured.server.data()) >= lsn);
}

#[test]
fn bad_input_is_one_clear_line_with_its_exit_code() {
    let Some(bin) = postgres_bin() else { return };
    let secured = Secured::start(&bin);
    let place = Place::new();
    let (port, socket) = (secured.server.port, secured.server.conninfo());
    let tcp = secured.tcp("");
    let run = |conninfo: &str, arguments: &[&str], variables: &[(&str, &str)]| {
        let mut command = place.command(conninfo);
        let output = command
            .env("NO_COLOR", "1")
            .envs(variables.iter().copied())
            .args(arguments)
            .output()
            .expect("wal-archiver runs");
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    };
    let expect = |conninfo: &str, arguments: &[&str], code: i32, expected: &str| {
        let (found, said) = run(conninfo, arguments, &[]);
        assert_eq!(found, Some(code), "{conninfo}: {said}");
        let line = said.lines().find(|line| line.contains(expected));
        assert!(line.is_some(), "{conninfo}: \"{expected}\" was due: {said}");
        assert!(!said.contains("S3CRET"), "{said}");
    };
    let check = &["check"][..];
    let daemon = &["run", "--http", "127.0.0.1:0"][..];
    let wrong = format!("{tcp} user=u_scram password=S3CRET-wrong");
    for arguments in [check, daemon, &["backup"][..]] {
        expect(&wrong, arguments, 2, "check the password");
        expect("hots=S3CRET", arguments, 2, "did you mean \"host\"");
        expect("host=h password=my S3CRET", arguments, 2, "quote a value");
        expect(
            &format!("{tcp} user=u_nobody password=S3CRET"),
            arguments,
            2,
            "REPLICATION attribute",
        );
        expect(
            &format!("{tcp} user=nobody password=S3CRET"),
            arguments,
            2,
            "pg_hba.conf needs a line",
        );
        expect(
            &format!("{tcp} user=u_tls sslmode=verify-full host=h sslrootcert=/none"),
            arguments,
            2,
            "sslrootcert=system",
        );
    }
    expect(
        "postgresql://u:S3CRET%ZZ@h/",
        &["config", "check"],
        2,
        "invalid %XX",
    );
    let (code, shown) = run("postgresql://u:S3CRET@h/", &["config", "show"], &[]);
    assert!(
        code == Some(0) && shown.contains("password=…") && !shown.contains("S3CRET"),
        "{shown}"
    );
    for arguments in [check, &["backup"][..]] {
        expect(
            "host=no-such-host.invalid user=x password=S3CRET",
            arguments,
            5,
            "no-such-host.invalid:5432",
        );
        expect(
            "host=127.0.0.1 port=1 user=x password=S3CRET",
            arguments,
            5,
            "is the server running",
        );
        expect(
            &format!(
                "host=127.0.0.1 port={port} user=u_tls sslmode=require connect_timeout=5 service=x"
            ),
            arguments,
            2,
            "is not defined",
        );
    }

    // A password file that others can read is ignored, with a message.
    let passwords = place.spool().with_extension("pgpass");
    private_file(&passwords, "*:*:*:u_scram:S3CRET\n");
    let scram = format!("{tcp} user=u_scram");
    let named = [("PGPASSFILE", passwords.to_str().expect("UTF-8"))];
    let (code, said) = run(&scram, check, &named);
    assert_eq!(code, Some(0), "{said}");
    fs::set_permissions(&passwords, fs::Permissions::from_mode(0o644)).expect("chmod");
    let (code, said) = run(&scram, check, &named);
    assert!(
        code == Some(2) && said.contains("chmod 0600") && said.contains("PGPASSWORD"),
        "{said}"
    );
    let (code, said) = run(&scram, check, &[("PGPASSWORD", "S3CRET")]);
    assert!(code == Some(0) && !said.contains("S3CRET"), "{said}");

    secured.restart("wal_level=minimal\nmax_wal_senders=0");
    for arguments in [check, daemon, &["backup"][..]] {
        expect(&socket, arguments, 2, "wal_level = replica");
    }
}

#[test]
fn a_slot_that_is_not_ours_is_named_with_its_remedy() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "wal_level=logical");
    let (first, second) = (Place::new(), Place::new());
    let archiver = first.run(&server.conninfo());
    archiver.wait_for_log("streaming");
    // Another repository and another spool, but the same slot.
    let other = second.run(&server.conninfo());
    other.wait_for_log("pg_terminate_backend");
    assert!(other.log().contains("is active for PID"), "{}", other.log());
    assert_eq!(other.terminate().code(), Some(0));
    assert_eq!(archiver.terminate().code(), Some(0));
    server.sql("SELECT pg_drop_replication_slot('tidemark_main')");
    server.sql("SELECT pg_create_logical_replication_slot('tidemark_main', 'pgoutput')");
    let output = first.command(&server.conninfo()).arg("check").output();
    let output = output.expect("wal-archiver runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("is a logical slot"), "{said}");
    let archiver = first.run(&server.conninfo());
    archiver.wait_for_log("the name belongs to a logical slot");
    assert_eq!(archiver.terminate().code(), Some(0));
    let log = fs::read_to_string(server.directory().join("log")).expect("a log");
    assert!(!log.contains("unexpected EOF"), "{log}");
}

#[test]
fn a_role_that_may_only_replicate_is_enough() {
    let certificates = Rc::new(Certificates::make());
    for (major, bin) in testbed::tools::servers_or_skip() {
        if ![14, 15, 18].contains(&major) {
            continue;
        }
        let secured = Secured::start_with(&bin, &certificates);
        let conninfo = secured.tcp("user=u_stream");
        let place = Place::new();
        let check = || {
            let output = place.command(&conninfo).arg("check").output();
            let output = output.expect("wal-archiver runs");
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert_eq!(output.status.code(), Some(0), "{major}: {said}");
            said
        };
        let before = check();
        assert!(before.contains("note  SQL connection: refused"), "{before}");
        // Twice: the slot is created, then found.
        for round in 0..2 {
            let archiver = place.run(&conninfo);
            archiver.wait_for_log("streaming");
            secured.server.write_wal(100);
            wait_flushed(&secured.server, secured.server.lsn());
            if round == 1 {
                let backup = place.command(&conninfo).arg("backup").output();
                succeed("backup", &backup.expect("wal-archiver runs"));
            }
            assert_eq!(archiver.terminate().code(), Some(0));
        }
        let after = check();
        let expected = if major >= 15 {
            "keeps WAL from"
        } else {
            "not to be seen without SQL"
        };
        assert!(after.contains(expected), "{major}: {after}");
        place.assert_equals_pg_wal(&secured.server.data());
    }
}
