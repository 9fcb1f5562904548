use super::*;

/// Isolates a copy with this configuration.
fn isolated(
    major: u16,
    main: &str,
    auto: &str,
    set: &[(String, String)],
) -> (tempfile::TempDir, Isolation) {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join(MAIN), main).expect("written");
    fs::write(directory.path().join(AUTO), auto).expect("written");
    let isolation = isolate(directory.path(), &wanted(major, set)).expect("isolated");
    (directory, isolation)
}

fn wanted(major: u16, set: &[(String, String)]) -> Wanted<'_> {
    Wanted {
        system: SystemIdentifier(7),
        major,
        keep_archiving: false,
        port: None,
        recovery: vec![
            ("restore_command", "ours %f %p".to_owned()),
            ("recovery_end_command", "ours".to_owned()),
            ("recovery_target", String::new()),
            ("recovery_target_time", String::new()),
            ("recovery_target_lsn", "0/5000000".to_owned()),
            ("recovery_target_timeline", "3".to_owned()),
        ],
        set,
        heading: "a backup".to_owned(),
    }
}

fn value(directory: &tempfile::TempDir, name: &str) -> Option<String> {
    Configuration::read(directory.path())
        .value(name)
        .map(str::to_owned)
}

const PARENT: &str = "archive_command = 'cp %p /archive/%f'\narchive_mode = on\nport = 5433\n\
    external_pid_file = '/run/main.pid'\ndata_directory = '/somewhere/else'\n\
    shared_preload_libraries = 'pg_stat_statements, pg_cron, own_lib'\nlog_directory = '../log'\n\
    recovery_target_time = '2020-01-01'\n";

#[test]
fn the_parents_settings_do_not_count_until_the_release() {
    let auto = "archive_command = 'auto %p'\nwork_mem = '8MB'\n";
    let (directory, isolation) = isolated(17, PARENT, auto, &[]);
    for (name, expected) in [
        ("archive_command", Some("")),
        ("archive_mode", Some("off")),
        ("external_pid_file", Some("pg_stat_tmp/external.pid")),
        ("data_directory", None),
        ("log_directory", Some("log")),
        (
            "shared_preload_libraries",
            Some("\"pg_stat_statements\", \"own_lib\""),
        ),
        ("restore_command", Some("ours %f %p")),
        ("port", Some("5433")),
        ("work_mem", Some("8MB")),
        ("stats_temp_directory", None),
    ] {
        assert_eq!(value(&directory, name).as_deref(), expected, "{name}");
    }
    assert_eq!(isolation.unknown_libraries, ["own_lib"]);
    assert_eq!(isolation.port, 5433);
    let names: Vec<&str> = isolation
        .switched_off
        .iter()
        .map(|one| one.name.as_str())
        .collect();
    for name in [
        "archive_mode",
        "archive_command",
        "data_directory",
        "external_pid_file",
    ] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert!(!names.contains(&"primary_conninfo"), "{names:?}");

    assert!(recovery_ended(directory.path()).expect("it is cleaned up"));
    assert!(!recovery_ended(directory.path()).expect("it is clean"));
    for (name, expected) in [
        ("restore_command", Some("")),
        ("recovery_end_command", Some("")),
        ("recovery_target_lsn", None),
        ("recovery_target_timeline", None),
        ("recovery_target_time", Some("")),
        ("archive_command", Some("")),
    ] {
        assert_eq!(value(&directory, name).as_deref(), expected, "{name}");
    }

    release::release(directory.path()).expect("released");
    for (name, expected) in [
        ("archive_command", Some("auto %p")),
        ("archive_mode", Some("on")),
        ("external_pid_file", Some("/run/main.pid")),
        ("data_directory", None),
        ("log_directory", Some("../log")),
        (
            "shared_preload_libraries",
            Some("pg_stat_statements, pg_cron, own_lib"),
        ),
        ("restore_command", None),
        ("recovery_target_time", Some("2020-01-01")),
    ] {
        assert_eq!(value(&directory, name).as_deref(), expected, "{name}");
    }
    let auto_now = fs::read_to_string(directory.path().join(AUTO)).expect("it is there");
    assert_eq!(auto_now.trim(), auto.trim());
    assert!(!directory.path().join(STATE_FILE).exists());
    release::release(directory.path()).expect_err("it is released");
}

#[test]
fn a_release_before_the_recovery_leaves_what_the_recovery_needs() {
    let main = "archive_command = 'cp'\nrecovery_min_apply_delay = 5min\n";
    let (directory, _) = isolated(13, main, "", &[]);
    fs::write(directory.path().join("recovery.signal"), "").expect("written");
    let release = release::release(directory.path()).expect("released");
    assert!(release.recovery_pending);
    for (name, expected) in [
        ("archive_command", Some("cp")),
        ("recovery_min_apply_delay", Some("0")),
        ("restore_command", Some("ours %f %p")),
        ("recovery_target_lsn", Some("0/5000000")),
    ] {
        assert_eq!(value(&directory, name).as_deref(), expected, "{name}");
    }
    assert!(!recovery_ended(directory.path()).expect("it is pending"));
    fs::remove_file(directory.path().join("recovery.signal")).expect("removed");
    assert!(recovery_ended(directory.path()).expect("it is cleaned up"));
    for (name, expected) in [
        ("recovery_min_apply_delay", Some("5min")),
        ("restore_command", None),
        ("recovery_target_lsn", None),
    ] {
        assert_eq!(value(&directory, name).as_deref(), expected, "{name}");
    }
    assert!(!directory.path().join(STATE_FILE).exists());
}

#[test]
fn what_the_user_sets_wins_and_stays() {
    let set = [
        ("Listen_Addresses".to_owned(), String::new()),
        ("archive_command".to_owned(), "mine\nit's".to_owned()),
        ("unix_socket_directories".to_owned(), "/run/x".to_owned()),
    ];
    let (directory, isolation) = isolated(18, PARENT, "", &set);
    assert_eq!(
        isolation.psql_arguments().as_deref(),
        Some("\"host=/run/x port=5433 dbname=postgres\"")
    );
    for _ in 0..2 {
        assert_eq!(
            value(&directory, "archive_command").as_deref(),
            Some("mine\nit's")
        );
        assert_eq!(value(&directory, "listen_addresses").as_deref(), Some(""));
        // The second round tests the copy after a release.
        drop(release::release(directory.path()));
    }
}

#[test]
fn a_line_that_somebody_changed_belongs_to_them() {
    let (directory, _) = isolated(18, PARENT, "", &[]);
    let auto = directory.path().join(AUTO);
    let text = fs::read_to_string(&auto).expect("it is there");
    let text = text.replace("archive_command = ''", "archive_command = 'theirs'");
    fs::write(&auto, text).expect("written");
    release::release(directory.path()).expect("released");
    assert_eq!(
        value(&directory, "archive_command").as_deref(),
        Some("theirs")
    );
}

/// Includes of each kind lead to the parent's files, from `postgresql.conf` and from `conf.d` of
/// the copy.
#[test]
fn files_outside_are_taken_into_the_copy() {
    let outside = tempfile::tempdir().expect("a directory");
    let at = |name: &str| outside.path().join(name);
    let write = |path: PathBuf, content: &[u8]| fs::write(path, content).expect("written");
    fs::create_dir(at("more")).expect("a directory");
    let other = b"data_directory = '/parent'\ninclude 'nested.conf'\ninclude_dir 'more'\n\
        include_if_exists 'none.conf'\nx.text = 'caf\xe9'\n";
    write(at("other.conf"), other);
    write(
        at("nested.conf"),
        b"hba_file = '/etc/hba'\nwork_mem = 3MB\n",
    );
    write(at("more/a.conf"), b"work_mem = 5MB\nx.list = 1\n");
    let directory = tempfile::tempdir().expect("a directory");
    let copy = |name: &str| directory.path().join(name);
    fs::create_dir(copy("conf.d")).expect("a directory");
    let other = at("other.conf").display().to_string();
    write(
        copy("conf.d/a.conf"),
        format!("include '{other}'").as_bytes(),
    );
    let later = at("later.conf").display().to_string();
    let main = format!("include_dir 'conf.d'\ninclude_if_exists '{later}'\n");
    write(copy(MAIN), main.as_bytes());
    let auto = b"y.text = 'caf\xe9'\nwork_mem = 7MB";
    write(copy(AUTO), auto);
    let before = Configuration::read(directory.path());
    assert_eq!(before.value("data_directory"), Some("/parent"));

    let isolation = isolate(directory.path(), &wanted(18, &[])).expect("isolated");
    // Files that are created or changed after the restore have no effect.
    write(at("later.conf"), b"data_directory = '/parent'\n");
    write(
        at("nested.conf"),
        b"ident_file = '/etc/ident'\nx.list = 2\n",
    );
    let names = ["other.conf", "nested.conf", "more", "more/a.conf"];
    let names = names.map(|name| at(name).display().to_string());
    let mut files = isolation.outside_files.clone();
    files.sort();
    let mut names = names.to_vec();
    names.sort();
    assert_eq!(files, names);
    assert_eq!(isolation.problems, [] as [String; 0]);
    for (name, expected) in [
        ("data_directory", None),
        ("hba_file", None),
        ("ident_file", None),
        ("work_mem", Some("7MB")),
        ("x.list", Some("1")),
        ("x.text", Some("caf\u{10FFE9}")),
    ] {
        assert_eq!(value(&directory, name).as_deref(), expected, "{name}");
    }
    let counts = Configuration::read(directory.path());
    let root = fs::canonicalize(directory.path()).expect("it exists");
    assert!(counts.files.iter().all(|file| file.starts_with(&root)));

    // The parent's file sets `data_directory`, so the release does not restore the include.
    let described = release::describe(directory.path()).expect("isolated");
    let include = described.changes.iter().find(|one| one.name == "include");
    let stays = include.and_then(|one| one.stays.clone());
    let stays = stays.expect("the include stays");
    assert!(stays.contains("it sets data_directory"), "{stays}");
    write(at("other.conf"), b"work_mem = 9MB\n");
    fs::remove_file(&later).expect("removed");
    release::release(directory.path()).expect("released");
    assert_eq!(fs::read(copy(MAIN)).expect("it is there"), main.as_bytes());
    let line = fs::read_to_string(copy("conf.d/a.conf")).expect("it is there");
    assert_eq!(line, format!("include '{other}'"));
    let now = fs::read(copy(AUTO)).expect("it is there");
    assert_eq!(now.trim_ascii_end(), auto);
    for number in 1..=4 {
        assert!(!copy(&format!("tidemark_included.{number}")).exists());
    }
}

/// The parent's own directory is here, with files that have changed since the backup. Only its
/// system identifier, or the setting `data_directory`, shows that it is the parent's.
#[test]
fn files_of_the_parents_data_directory_are_the_copys_own() {
    let parent = tempfile::tempdir().expect("a directory");
    let outside = tempfile::tempdir().expect("a directory");
    let directory = tempfile::tempdir().expect("a directory");
    let write = |path: PathBuf, content: &str| fs::write(path, content).expect("written");
    for root in [parent.path(), directory.path()] {
        fs::create_dir(root.join("conf.d")).expect("a directory");
    }
    fs::create_dir(parent.path().join("global")).expect("a directory");
    let control = parent.path().join("global/pg_control");
    fs::write(control, 7_u64.to_le_bytes()).expect("written");
    let (now, then) = (parent.path(), directory.path());
    for (root, size) in [(now, "9MB"), (then, "3MB")] {
        write(root.join("a.conf"), &format!("work_mem = {size}\n"));
        write(root.join("conf.d/b.conf"), &format!("x.b = {size}\n"));
        write(root.join("users"), "one\n");
    }
    let of_parent = now.display();
    let other = outside.path().join("other.conf");
    write(other.clone(), &format!("include '{of_parent}/a.conf'\n"));
    let main = format!(
        "include_dir '{of_parent}/conf.d'\ninclude '{}'\ninclude '/gone/data/a.conf'\n\
         data_directory = '/gone/data'\n",
        other.display()
    );
    write(then.join(MAIN), &main);
    write(then.join(AUTO), "");
    write(
        then.join("pg_hba.conf"),
        &format!("local all @{of_parent}/users peer\n"),
    );
    let isolation = isolate(then, &wanted(18, &[])).expect("isolated");
    assert_eq!(isolation.outside_files, [other.display().to_string()]);
    assert_eq!(isolation.problems, [] as [String; 0]);
    for released in [false, true] {
        if released {
            fs::remove_file(&other).expect("removed");
            release::release(then).expect("released");
        }
        for name in ["work_mem", "x.b"] {
            assert_eq!(value(&directory, name).as_deref(), Some("3MB"), "{name}");
        }
        let hba = fs::read_to_string(then.join("pg_hba.conf")).expect("it is there");
        assert_eq!(hba, "local all @\"users\" peer\n");
    }
}

#[test]
fn the_copys_log_gets_a_directory_that_no_file_of_the_parent_is_named_like() {
    let directory = tempfile::tempdir().expect("a directory");
    let write = |name: &str, content: &str| {
        fs::write(directory.path().join(name), content).expect("written");
    };
    write(MAIN, "log_directory = '/parent/log'\n");
    write(AUTO, "");
    write("log", "a file\n");
    isolate(directory.path(), &wanted(17, &[])).expect("isolated");
    assert_eq!(value(&directory, "log_directory").as_deref(), Some("log_1"));
}

/// The parent does not start with such files either: one sentence says so.
#[test]
fn a_loop_of_includes_is_one_problem() {
    let (directory, outside) = (tempfile::tempdir(), tempfile::tempdir());
    let (directory, outside) = (directory.expect("made"), outside.expect("made"));
    let folder = outside.path().display();
    for name in ["a", "b", "c", "d"] {
        let lines = format!("include_dir '{folder}'\nx.{name} = 1\n");
        fs::write(outside.path().join(format!("{name}.conf")), lines).expect("written");
    }
    let main = format!("include_dir '{folder}'\n");
    fs::write(directory.path().join(MAIN), main).expect("written");
    fs::write(directory.path().join(AUTO), "").expect("written");
    let isolation = isolate(directory.path(), &wanted(17, &[])).expect("isolated");
    assert_eq!(isolation.problems.len(), 1, "{:?}", isolation.problems);
    assert!(
        isolation.problems[0].contains("in a loop"),
        "{:?}",
        isolation.problems
    );
}

/// A released copy must not follow rules that its parent did not use either.
#[test]
fn rules_that_the_parent_did_not_use_let_nobody_in_before_its_own_are_there() {
    let outside = tempfile::tempdir().expect("a directory");
    let file = outside.path().join("hba.conf");
    let main = format!("hba_file = '{}'\n", file.display());
    let unused = "host all all 127.0.0.1/32 trust\n";
    for is_there in [false, true] {
        let copy = tempfile::tempdir().expect("a directory");
        let read = |name: &str| fs::read_to_string(copy.path().join(name)).expect("it is there");
        fs::write(copy.path().join(MAIN), &main).expect("written");
        fs::write(copy.path().join(AUTO), "").expect("written");
        fs::write(copy.path().join("pg_hba.conf"), unused).expect("written");
        let isolation = isolate(copy.path(), &wanted(17, &[])).expect("isolated");
        assert!(!isolation.parent_access);
        let rules = read("pg_hba.conf");
        let rejected = rules.split_once("host all all all reject");
        assert!(rejected.is_some_and(|(_, below)| below.contains(unused)));
        if is_there {
            fs::write(&file, "local all all peer\n").expect("written");
        }
        let released = release::release(copy.path()).expect("released");
        let stays = |name: &str| {
            let mut changes = released.changes.iter();
            changes.any(|change| change.name == name && change.stays.is_some())
        };
        assert_eq!(stays("hba_file"), !is_there);
        assert_eq!(stays("pg_hba.conf rule"), !is_there);
        let rules = read("pg_hba.conf");
        assert_eq!(
            rules.contains("host all all all reject"),
            !is_there,
            "{rules}"
        );
        assert!(!rules.contains("trust # pitr-restore"), "{rules}");
        let configuration = Configuration::read(copy.path());
        assert_eq!(configuration.value("hba_file").is_some(), is_there);
    }
}

/// Relative paths that lead out of the copy are resolved from where it is at the release.
#[test]
fn a_moved_copy_is_released_where_it_is() {
    let (before, after) = (tempfile::tempdir(), tempfile::tempdir());
    let (before, after) = (before.expect("a directory"), after.expect("a directory"));
    let write = |path: PathBuf, content: &str| fs::write(path, content).expect("written");
    for (root, size) in [(before.path(), "1MB"), (after.path(), "2MB")] {
        write(root.join("shared"), &format!("work_mem = {size}\n"));
        write(root.join("users"), "one\n");
    }
    let copy = before.path().join("data");
    fs::create_dir(&copy).expect("a directory");
    let (main, hba) = (
        "include '../shared'\n",
        "local all @../users,two,@../users trust\nlocal \\\n @../users all peer\n",
    );
    write(copy.join(MAIN), main);
    write(copy.join(AUTO), "");
    write(copy.join("pg_hba.conf"), hba);
    let isolation = isolate(&copy, &wanted(17, &[])).expect("isolated");
    assert_eq!(isolation.outside_files.len(), 4);
    let rules = fs::read_to_string(copy.join("pg_hba.conf")).expect("it is there");
    assert!(!rules.contains("../"), "{rules}");
    for file in &isolation.outside_files {
        fs::remove_file(file).unwrap_or_else(|error| assert_eq!(error.kind(), ErrorKind::NotFound));
    }
    let moved = after.path().join("data");
    #[expect(clippy::disallowed_methods, reason = "a test's directory")]
    fs::rename(&copy, &moved).expect("moved");
    let found = |name: &str| Configuration::read(&moved).value(name).map(str::to_owned);
    assert_eq!(found("work_mem").as_deref(), Some("1MB"));
    release::release(&moved).expect("released");
    assert_eq!(found("work_mem").as_deref(), Some("2MB"));
    for (name, expected) in [(MAIN, main), ("pg_hba.conf", hba)] {
        let content = fs::read_to_string(moved.join(name)).expect("it is there");
        assert_eq!(content, expected);
    }
    let files = fs::read_dir(&moved).expect("it lists").flatten();
    let mut names = files.map(|file| file.file_name().to_string_lossy().into_owned());
    assert!(!names.any(|name| name.starts_with("tidemark_included")));
}

/// The server of the parent answers only at the port that `postgresql.auto.conf` sets.
#[test]
fn a_parent_is_asked_at_the_addresses_that_count() {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let sockets = tempfile::tempdir().expect("a directory");
    let main = format!(
        "port = 1\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\n",
        sockets.path().display()
    );
    let state = |directory: &tempfile::TempDir| {
        release::parent_state(directory.path(), &release::Asked::default()).expect("isolated")
    };
    let (silent, _) = isolated(17, &main, "", &[]);
    let release::ParentState::Unknown(parent::Doubt::Addresses(asked)) = state(&silent) else {
        panic!("it may run elsewhere");
    };
    let expected = format!("{}/.s.PGSQL.1, 127.0.0.1:1", sockets.path().display());
    assert_eq!(asked, expected);

    let (answers, _) = isolated(17, &main, &format!("port = {port}\n"), &[]);
    let server = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut client, _) = listener.accept().expect("a client");
        client.read_exact(&mut [0; 8]).expect("a request");
        client.write_all(b"N").expect("an answer");
    });
    let address = format!("127.0.0.1:{port}");
    assert_eq!(state(&answers), release::ParentState::Answers(address));
    server.join().expect("it answered");

    // The parent's data directory exists on this host, and no server runs in it.
    let parent = tempfile::tempdir().expect("a directory");
    fs::create_dir(parent.path().join("global")).expect("a directory");
    fs::write(parent.path().join("global/pg_control"), "").expect("written");
    let with_data = format!("{main}data_directory = '{}'\n", parent.path().display());
    let (known, _) = isolated(17, &with_data, "", &[]);
    assert_eq!(state(&known), release::ParentState::Silent);
    // A server with this process ID may run in another container. Here, the process is not a
    // server, or does not exist.
    let lock = parent.path().join("postmaster.pid");
    for process in [std::process::id(), i32::MAX.unsigned_abs()] {
        let pid = format!("{process}\n/data\n0\n1\n/nowhere\n\n");
        fs::write(&lock, pid).expect("written");
        let real = fs::canonicalize(&lock).expect("it exists");
        let unknown = release::ParentState::Unknown(parent::Doubt::LockFile(real));
        assert_eq!(state(&known), unknown);
    }
}

#[test]
fn paths_lead_outside_or_not() {
    let root = Path::new("/copy");
    for (path, outside) in [
        ("log", false),
        ("a/../log", false),
        ("../log", true),
        ("a/../../log", true),
        ("/copy/log", false),
        ("/copy/../log", true),
        ("/copy2/log", true),
        ("./x", false),
    ] {
        assert_eq!(leads_outside(root, path), outside, "{path}");
    }
}

#[test]
fn the_readme_names_every_isolated_setting_and_library() {
    let readme = include_str!("../../../README.md");
    let (_, section) = readme
        .split_once("### A restored copy is isolated")
        .expect("the section");
    let section = section.split("\n## ").next().unwrap_or_default();
    let settings = SETTINGS.iter().map(|row| row.name);
    let libraries = LIBRARIES
        .iter()
        .filter(|(_, worker)| *worker != Worker::Harmless);
    for name in settings.chain(libraries.map(|(name, _)| *name)) {
        assert!(section.contains(&format!("`{name}`")), "{name}");
    }
}

#[test]
fn a_copy_whose_socket_nobody_can_reach_is_not_looked_for_at_its_parents_port() {
    let isolation = |length: usize, addresses: &str| Isolation {
        port: 5432,
        socket_directory: Some(PathBuf::from("/".to_owned() + &"x".repeat(length))),
        listen_addresses: addresses.to_owned(),
        ..Isolation::default()
    };
    let short = isolation(20, "").psql_arguments().expect("its socket");
    assert!(short.contains("host=/xxxx"), "{short}");
    assert_eq!(isolation(120, "").psql_arguments(), None);
    let at = |directory: &str| Isolation {
        socket_directory: Some(PathBuf::from(directory)),
        ..isolation(0, "")
    };
    assert_eq!(
        at("/a b").psql_arguments().as_deref(),
        Some("\"host='/a b' port=5432 dbname=postgres\"")
    );
    let told = at("/it's $x").psql_arguments().expect("its socket");
    assert_eq!(
        told,
        r"'host='\''/it\'\''s $x'\'' port=5432 dbname=postgres'"
    );
    let listening = isolation(120, "127.0.0.1")
        .psql_arguments()
        .expect("its port");
    assert!(
        listening.contains("host=127.0.0.1 port=5432"),
        "{listening}"
    );
}
