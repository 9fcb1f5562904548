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
    let wanted = Wanted {
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
    };
    let isolation = isolate(directory.path(), &wanted).expect("isolated");
    (directory, isolation)
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
        isolation.psql().as_deref(),
        Some("psql \"host=/run/x port=5433 dbname=postgres\"")
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

#[test]
fn a_setting_of_a_file_outside_is_overridden() {
    let outside = tempfile::tempdir().expect("a directory");
    let other = outside.path().join("other.conf");
    fs::write(
        &other,
        "data_directory = '/parent'\nhba_file = '/etc/hba'\n",
    )
    .expect("written");
    let main = format!("include '{}'\n", other.display());
    let (directory, isolation) = isolated(18, &main, "", &[]);
    let root = fs::canonicalize(directory.path()).expect("it exists");
    assert_eq!(
        value(&directory, "data_directory"),
        Some(root.display().to_string())
    );
    let hba = root.join("pg_hba.conf").display().to_string();
    assert_eq!(value(&directory, "hba_file"), Some(hba));
    assert_eq!(isolation.outside_files.len(), 1);
    let untouched = fs::read_to_string(&other).expect("it is there");
    assert!(untouched.starts_with("data_directory = '/parent'"));
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
    let short = isolation(20, "").psql().expect("its socket");
    assert!(short.contains("host=/xxxx"), "{short}");
    assert_eq!(isolation(120, "").psql(), None);
    let listening = isolation(120, "127.0.0.1").psql().expect("its port");
    assert!(
        listening.contains("host=127.0.0.1 port=5432"),
        "{listening}"
    );
}
