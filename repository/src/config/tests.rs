//! Tests of the configuration: typed settings, their resolved values, and refused settings.

use std::path::Path;

use super::*;

fn resolve(text: &str, args: &CommonArgs) -> Result<Settings> {
    Settings::from_file(args, &ConfigFile::parse(text)?)
}

fn refused(text: &str) -> String {
    resolve(text, &CommonArgs::default())
        .expect_err("it is refused")
        .to_string()
}

#[test]
fn flags_alone_are_enough() {
    let args = CommonArgs {
        repository: Some("file:///r".parse().expect("a URL")),
        ..CommonArgs::default()
    };
    let settings = resolve("", &args).expect("it resolves");
    let main = settings.cluster().expect("one cluster");
    assert_eq!(
        (main.name.as_str(), main.slot.as_str()),
        ("main", "tidemark_main")
    );
    assert_eq!(
        main.catalog,
        Path::new("/var/lib/tidemark/spool/main/catalog")
    );
    assert_eq!(main.remote_flush_interval, Duration::from_secs(1));
    assert_eq!(settings.http.to_string(), "127.0.0.1:8432");
}

#[test]
fn tables_override_the_defaults_and_flags_override_both() {
    let text = "repository = 'file:///r'\nrpo_target = '1min'\n\
                [cluster.a-b]\nrpo_target = '30s'\nacknowledge = 'remote'\n[cluster.c]\nspool = '/s'\n";
    let both = resolve(text, &CommonArgs::default()).expect("it resolves");
    assert_eq!(both.clusters.len(), 2);
    assert_eq!(both.clusters[0].rpo_target, Duration::from_secs(30));
    assert_eq!(both.clusters[0].slot, "tidemark_a_b");
    assert_eq!(both.clusters[0].acknowledge, Acknowledge::Remote);
    assert_eq!(both.clusters[1].rpo_target, Duration::from_secs(60));
    let error = both.cluster().expect_err("there are two").to_string();
    assert!(error.contains("--cluster: a-b, c"), "{error}");
    let args = CommonArgs {
        cluster: Some("c".parse().expect("a name")),
        spool: Some("/t".into()),
        ..CommonArgs::default()
    };
    let one = resolve(text, &args).expect("it resolves");
    assert_eq!(one.cluster().expect("one cluster").spool, Path::new("/t"));
}

#[test]
fn a_repository_is_listed_once() {
    let twice = |first: &str, second: &str| {
        let text = format!(
            "repository = '{first}'\ns3_endpoint = 'http://127.0.0.1:9000'\n[cluster.main]\n\
             [[cluster.main.repositories]]\nurl = '{second}'\n"
        );
        let resolved = resolve(&text, &CommonArgs::default());
        resolved.map(drop).map_err(|error| error.to_string())
    };
    for place in ["file:///r", "s3://bucket/p"] {
        let with_endpoint = "s3://bucket/p'\ns3_endpoint = 'http://127.0.0.1:9000";
        let second = if place.starts_with("s3") {
            with_endpoint
        } else {
            place
        };
        let error = twice(place, second).expect_err("the same place");
        assert!(error.contains("is listed twice"), "{error}");
    }
    // The same bucket of another provider is a second place.
    let other = "s3://bucket/p'\ns3_endpoint = 'http://127.0.0.1:9001";
    assert_eq!(twice("s3://bucket/p", other), Ok(()));
}

#[test]
fn a_mistyped_key_is_named_with_the_nearest_one() {
    assert_eq!(
        refused("repositroy = 'file:///r'"),
        "unknown key \"repositroy\"; did you mean \"repository\"?"
    );
    assert_eq!(
        refused("htpp = 'x'"),
        "unknown key \"htpp\"; did you mean \"http\"?"
    );
    assert_eq!(
        refused("[cluster.main]\nsloot = 'x'"),
        "unknown key \"sloot\" in [cluster.main]; did you mean \"slot\"?"
    );
}

#[test]
fn wrong_values_say_how_to_write_them() {
    for (text, part) in [
        ("repository = 'file://r'", "file:///directory"),
        ("repository = 's3://b/p'", "cannot name a bucket"),
        (
            "repository = 's3://bucket//p'",
            "empty or begins with a dot",
        ),
        (
            "repository = 's3://bucket/p'\ns3_endpoint = 'localhost:9000'",
            "write \"https://host:port\"",
        ),
        (
            "repository = 's3://bucket/p'\ns3_access_key = 'a'",
            "go together",
        ),
        (
            "repository = 's3://bucket/p'\ns3_access_key = 'a'\ns3_secret_key = 'b'\ns3_profile = 'c'",
            "only one way to sign",
        ),
        (
            "repository = 'file:///r'\nremote_flush_bytes = 10",
            "every tail is a request",
        ),
        (
            "repository = 'file:///r'\nspool_limit_bytes = 10",
            "less than 4194304",
        ),
        (
            "repository = 'file:///r'\nwhen_full = 'protect'",
            "protect-archive",
        ),
        ("repository = '/r'", "not a URL; write file:///r or"),
        (
            "repository = 'gs://b/p'",
            "Google Cloud Storage is not supp",
        ),
        (
            "repository = 'az://a/c/p'",
            "Azure Blob Storage is not supp",
        ),
        (
            "repository = 'ftp://h/p'",
            "\"ftp\" is not a kind of repository",
        ),
        (
            "gap_grace = 30",
            "gap_grace = 30 has no unit; write gap_grace = \"30s\"",
        ),
        (
            "[cluster.main]\nkeep_window = 7",
            "with ms, min, h or d in [cluster.main]",
        ),
        ("seal_threads = 'two'", "seal_threads: invalid type"),
        ("repository = 'file:///r'\nrpo_target = '5'", "write 500ms"),
        (
            "repository = 'file:///r'\nrpo_target = '0s'",
            "not a duration",
        ),
        (
            "repository = 'file:///r'\ncompression_level = 99",
            "1 to 19",
        ),
        ("repository = 'file:///r'\nhttp = 'x'", "127.0.0.1:8432"),
        ("http = 1", "in quotes"),
        ("cluster = 1", "[cluster.NAME]"),
        (
            "[cluster.B]\nrepository = 'file:///r'",
            "cannot name a cluster",
        ),
        ("", "no repository"),
    ] {
        let error = refused(text);
        assert!(error.contains(part), "{text:?} gave {error:?}");
    }
}

#[test]
fn a_password_is_not_printed() {
    let text = "repository = 's3://bucket'\nconninfo = 'password=hunter2'\n\
                s3_access_key = 'a'\ns3_secret_key = 'hunter3'\ns3_session_token = 'hunter4'";
    let settings = resolve(text, &CommonArgs::default()).expect("it resolves");
    let cluster = settings.cluster().expect("one cluster");
    let shown = format!("{settings:?}\n{:?}", cluster.repository);
    assert!(!shown.contains("hunter"), "{shown}");
    let lines = cluster.repository.s3.lines().join("\n");
    assert!(
        lines.contains("s3_secret_key = \"****\"") && !lines.contains("hunter"),
        "{lines}"
    );
}

#[test]
fn keys_of_s3_stand_at_the_top_and_in_tables() {
    let text = "repository = 's3://bucket/a/b/'\ns3_endpoint = 'http://127.0.0.1:9000'\n\
                s3_access_key = 'top'\ns3_secret_key = 'x'\n\
                [cluster.one]\ns3_checksums = false\n\
                [cluster.two]\ns3_profile = 'other'\ns3_path_style = false\n";
    let both = resolve(text, &CommonArgs::default()).expect("it resolves");
    let [one, two] = both.clusters.as_slice() else {
        panic!("two clusters");
    };
    assert_eq!(one.repository.to_string(), "s3://bucket/a/b");
    let s3 = &one.repository.s3;
    assert_eq!((s3.checksums, s3.path_style), (false, true));
    assert!(
        matches!(&s3.credentials, S3Credentials::Keys { access_key, .. } if access_key == "top")
    );
    let s3 = &two.repository.s3;
    assert_eq!((s3.checksums, s3.path_style), (true, false));
    assert_eq!(s3.profile.as_deref(), Some("other"));
    assert_eq!(
        s3.credentials,
        S3Credentials::Standard,
        "one choice, not a mixture"
    );
    assert_eq!(
        refused("[cluster.main]\ns3_endpont = 'x'"),
        "unknown key \"s3_endpont\" in [cluster.main]; did you mean \"s3_endpoint\"?"
    );
}
