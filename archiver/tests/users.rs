//! Several users on one repository and one spool: a group shares them, and every other user is
//! told why not.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    process::Command,
};

use crate::{
    preconditions::outcome,
    support::{Place, Server, postgres_bin, server_user},
};

/// Users and a group that no host has.
const DAEMON: u32 = 54_321;
const GROUP: u32 = 54_322;
const STRANGER: u32 = 54_323;

/// On a bucket, only the files of this host differ by user. Needs root to become other users.
#[test]
fn a_user_who_may_not_read_a_file_of_the_configuration_is_told_whose_it_is() {
    if server_user().is_none() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    let mode = |name: &str, mode| {
        let set = fs::set_permissions(path(name), fs::Permissions::from_mode(mode));
        set.expect("chmod");
    };
    mode("", 0o755);
    fs::create_dir(path("spool")).expect("a directory");
    let key = "11".repeat(32);
    let credentials = "[default]\naws_access_key_id = a\naws_secret_access_key = b\n";
    let keys = format!(
        "repository = \"s3://bucket/p\"\ns3_endpoint = \"http://127.0.0.1:1\"\ns3_region = \"us-east-1\"\n\
         s3_credentials_file = \"{}\"\nencryption_key_file = \"{}\"\nspool = \"{}\"\n",
        path("credentials").display(),
        path("key").display(),
        path("spool").display()
    );
    for (name, content) in [
        ("tidemark.toml", &*keys),
        ("key", &*key),
        ("credentials", credentials),
    ] {
        fs::write(path(name), content).expect("a file");
    }
    for name in ["tidemark.toml", "key", "credentials", "spool"] {
        chown(path(name), Some(DAEMON), Some(GROUP)).expect("chown");
        mode(name, if name == "spool" { 0o2770 } else { 0o640 });
    }
    let run = |program: &str, (user, group), arguments: &[&str]| {
        let program = testbed::programs::ours(program).expect("it is built");
        let mut command = Command::new(program);
        command.current_dir("/").uid(user).gid(group);
        outcome(
            command
                .arg("--config")
                .arg(path("tidemark.toml"))
                .args(arguments),
        )
    };
    let commands: [(&str, &[&str]); 3] = [
        ("wal-archiver", &["verify"]),
        (
            "wal-archiver",
            &["push", "/absent/000000010000000000000001"],
        ),
        ("pitr-restore", &["list"]),
    ];
    // A member of the group gets as far as the bucket.
    for (program, arguments) in commands {
        let (_, said) = run(program, (STRANGER, GROUP), arguments);
        assert!(!said.contains("ermission denied"), "{said}");
    }
    for name in ["credentials", "key", "tidemark.toml"] {
        mode(name, 0o600);
        let shown = path(name).display().to_string();
        for (program, arguments) in commands {
            let (code, said) = run(program, (STRANGER, GROUP), arguments);
            assert_eq!(code, 2, "{said}");
            for part in [
                format!("{shown} belongs to user {DAEMON}, group {GROUP}, mode 0600"),
                format!("this is user {STRANGER}"),
                format!("`chgrp GROUP {shown} && chmod 0640 {shown}`"),
            ] {
                assert!(said.contains(&part), "{name} {arguments:?}: {said}");
            }
        }
    }
}

/// Needs root to become other users.
#[test]
fn a_group_shares_a_repository_and_a_spool_and_other_users_are_told_why_not() {
    let (Some(bin), Some((postgres, _))) = (postgres_bin(), server_user()) else {
        return;
    };
    let server = Server::start(&bin, "");
    fs::set_permissions(server.directory(), fs::Permissions::from_mode(0o711)).expect("chmod");
    let place = Place::new();
    let repository = place.repository();
    let above = repository.parent().expect("a directory");
    fs::set_permissions(above, fs::Permissions::from_mode(0o755)).expect("chmod");
    // A socket's path may have at most 107 bytes.
    let spool = above.join("long".repeat(30));
    fs::create_dir(&spool).expect("a directory");
    for path in [&repository, &spool] {
        chown(path, Some(DAEMON), Some(GROUP)).expect("chown");
        fs::set_permissions(path, fs::Permissions::from_mode(0o2770)).expect("chmod");
    }
    let as_user = |mut command: Command, user: u32, group: u32| {
        command.current_dir("/").uid(user).gid(group);
        command
    };
    let command = || place.command_with_spool(&server.conninfo(), &spool);
    let of_archiver = |user, group| as_user(command(), user, group);
    let push = |user, group| {
        server.write_wal(100);
        let segment = server.sql("SELECT pg_walfile_name(pg_switch_wal())");
        let path = server.data().join("pg_wal").join(segment);
        outcome(of_archiver(user, group).arg("push").arg(path))
    };
    let restorer = |user, group, arguments: &[&str]| {
        let program = testbed::programs::ours("pitr-restore").expect("it is built");
        let mut command = as_user(Command::new(program), user, group);
        let url = format!("file://{}", repository.display());
        outcome(command.args(["--repository", &url]).args(arguments))
    };

    let mut daemon = of_archiver(DAEMON, GROUP);
    daemon.env("HOME", "/");
    let archiver = place.run_with(daemon);
    archiver.wait_for_log("INFO streaming");
    assert!(spool.join("main.push").exists());
    // The daemon's socket, the repository and the spool are open to the group.
    let (code, said) = push(postgres, GROUP);
    assert_eq!(code, 0, "{said}");
    let (code, said) = outcome(of_archiver(postgres, GROUP).arg("backup"));
    assert_eq!(code, 0, "{said}");
    assert_eq!(archiver.terminate().code(), Some(0));
    let (code, said) = push(postgres, GROUP);
    assert_eq!(code, 0, "without a daemon: {said}");
    let (code, said) = restorer(postgres, GROUP, &["list"]);
    assert_eq!(code, 0, "{said}");
    // The files of both users belong to the group. `check` names a file that does not.
    let file = above.join("groups.toml");
    let keys = format!("repository_group = \"{GROUP}\"\nspool_group = \"{GROUP}\"\n");
    fs::write(&file, keys).expect("a configuration");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("chmod");
    let check = || {
        outcome(
            of_archiver(DAEMON, GROUP)
                .arg("check")
                .arg("--config")
                .arg(&file),
        )
    };
    let (_, said) = check();
    for key in ["repository_group", "spool_group"] {
        let shared = format!("ok    {key}: {GROUP} shares it");
        assert!(said.contains(&shared), "{said}");
    }
    let object = place
        .files_below("/backup_manifest")
        .pop()
        .expect("a backup");
    fs::set_permissions(&object, fs::Permissions::from_mode(0o600)).expect("chmod");
    let (code, said) = check();
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("FAIL  repository_group: 1 of the ")
            && said.contains(&object.display().to_string())
            && said.contains(&format!("`chgrp -R {GROUP} {}", repository.display())),
        "{said}"
    );
    fs::set_permissions(&object, fs::Permissions::from_mode(0o660)).expect("chmod");
    let (code, said) = outcome(of_archiver(DAEMON, GROUP).arg("verify"));
    assert_eq!(code, 0, "what another user of the group wrote: {said}");
    // No restore needs the recorded result of an earlier verification.
    let recorded = place.files_below("/outcome/verify/").pop();
    let recorded = recorded.expect("a result");
    fs::write(&recorded, "{").expect("it is damaged");
    let (code, said) = outcome(of_archiver(DAEMON, GROUP).arg("verify"));
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("this result is ignored"), "{said}");
    // A failed request says nothing about the object.
    fs::set_permissions(&recorded, fs::Permissions::from_mode(0o000)).expect("chmod");
    let (code, said) = outcome(of_archiver(DAEMON, GROUP).arg("verify"));
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("this result could not be read: ") && !said.contains("Remove the object"),
        "{said}"
    );

    let owner = format!("belongs to user {DAEMON}, group {GROUP}, mode 2770");
    let before = place.files_below("/");
    let segment = "000000010000000000000001";
    let open = above.join("open");
    fs::create_dir(&open).expect("a directory");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).expect("chmod");
    let destination = open.join(segment).display().to_string();
    for (code, said) in [
        outcome(of_archiver(STRANGER, STRANGER).arg("backup")),
        outcome(of_archiver(STRANGER, STRANGER).arg("expire")),
        outcome(of_archiver(STRANGER, STRANGER).arg("check")),
        restorer(STRANGER, STRANGER, &["list"]),
        restorer(STRANGER, STRANGER, &["wal-fetch", segment, &destination]),
    ] {
        assert_ne!(code, 0, "{said}");
        let remedy = format!("su -s /bin/sh {DAEMON}");
        assert!(
            said.contains(&owner)
                && said.contains(&format!("this is user {STRANGER}"))
                && said.contains(&remedy),
            "{said}"
        );
    }
    assert_eq!(place.files_below("/"), before);
}
