//! Compares the parsed settings with libpq's rules, and checks that no error repeats a value.

use std::fs;

use proptest::prelude::*;

use super::*;

fn environment(variables: &[(&str, &str)]) -> Environment {
    let mut environment = Environment {
        user: Some("os-user".to_owned()),
        ..Environment::default()
    };
    environment
        .variables
        .insert("HOME".to_owned(), "/nonexistent".to_owned());
    for (name, value) in variables {
        environment
            .variables
            .insert((*name).to_owned(), (*value).to_owned());
    }
    environment
}

fn resolve(text: &str) -> ConnInfo {
    ConnInfo::resolve(text, &environment(&[])).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn refusal(text: &str) -> String {
    match ConnInfo::resolve(text, &environment(&[])) {
        Ok(_) => panic!("{text} must not be taken"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn both_forms_of_libpq_parse() {
    let check = |text: &str, keyword: &str, value: &str| {
        assert_eq!(resolve(text).value(keyword), Some(value), "{text}");
    };
    check("host=a port=1", "port", "1");
    check(r"user='it\'s' host = b", "user", "it's");
    check(r"user='it\'s' host = b", "host", "b");
    check(r"user=a\ b", "user", "a b");
    check("host=a host=b", "host", "b");
    check("host='' port=1", "port", "1");
    check(
        "postgresql://u:p%40@h:5/db?sslmode=disable",
        "password",
        "p@",
    );
    check("postgresql://u:p?x:y@h/db", "password", "p?x:y");
    check("postgresql://u@h/a/b", "dbname", "a/b");
    check("postgres://h/db", "dbname", "db");
    check("postgresql://[::1]:9/", "host", "::1");
    check("postgresql://%2Frun%2Fpg/db", "host", "/run/pg");
    check("postgresql:///db?host=/run/pg&port=7", "port", "7");
    check("postgresql://h1:1,[::2]:2,h3/db", "host", "h1,::2,h3");
    check("postgresql://h1:1,[::2]:2,h3/db", "port", "1,2,");
    check("postgresql://h/?ssl=true", "sslmode", "require");
    check("postgresql://h?user=me", "user", "me");
}

#[test]
fn an_error_never_repeats_what_may_be_a_secret() {
    for text in [
        "password=my S3CRET",
        "password=my S3CRET host=h",
        "password=my S3CRET=x",
        "password='S3CRET",
        "S3CRET",
        "host=h S3CRET=1",
        "postgresql://u:S3CRET%ZZ@h/",
        "postgresql://u:S3CRET%4@h/",
        "postgresql://u:S3CRET%00@h/",
        "postgresql://u:p?S3CRET/x",
        "postgresql://h/?S3CRET",
        "postgresql://h/?S3CRET=1",
        "postgresql://h/?password=a=S3CRET",
        "postgresql://h/?password=S3CRET%",
        "postgresql://h:S3CRET/",
        "postgresql://[S3CRET",
        "postgresql://[::1]S3CRET",
        "sslmode=S3CRET",
        "port=S3CRET",
        "connect_timeout=S3CRET",
        "require_auth=S3CRET",
        "sslpassword=a gssencmode=S3CRET",
        "oauth_client_secret=S3CRET",
        "service=none password=S3CRET",
    ] {
        let error = refusal(text);
        assert!(!error.contains("S3CRET"), "{text}: {error}");
        assert!(
            error.starts_with("conninfo: ") && error.len() < 400,
            "{error}"
        );
    }
    for text in [
        "host=h password=S3CRET",
        "postgresql://u:S3CRET@h/?sslpassword=S3CRET",
    ] {
        let shown = format!("{:?}", resolve(text));
        assert!(
            !shown.contains("S3CRET") && shown.contains("host=h"),
            "{shown}"
        );
    }
}

#[test]
fn an_unknown_keyword_names_the_nearest() {
    assert!(refusal("hots=h").contains("did you mean \"host\""));
    assert!(refusal("postgresql://h/?ssl_mode=require").contains("did you mean \"sslmode\""));
    assert!(refusal("host=h SSLMODE=require").contains("setting 2, after \"host\""));
}

#[test]
fn what_can_not_be_granted_is_refused() {
    for (text, expected) in [
        ("gssencmode=require", "GSSAPI"),
        ("krbsrvname=x", "GSSAPI"),
        ("sslcrldir=/x", "sslcrl"),
        ("sslcertmode=require", "clientcert"),
        ("min_protocol_version=3.2", "3.0"),
        ("oauth_issuer=x", "OAuth"),
        ("sslmode=require sslrootcert=system", "verify-full"),
        ("sslnegotiation=direct", "sslmode=require"),
        ("ssl_max_protocol_version=TLSv1.1", "TLSv1.2"),
        (
            "ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2",
            "no version",
        ),
        ("sslmode=on", "verify-full"),
        ("port=0", "65535"),
        ("port=65536", "65535"),
        ("host=a,b port=1,2,3", "3 ports for 2 hosts"),
        ("host=a,b hostaddr=127.0.0.1", "same length"),
        ("hostaddr=localhost", "belongs to host"),
    ] {
        let error = refusal(text);
        assert!(error.contains(expected), "{text}: {error}");
    }
    for harmless in [
        "gssencmode=prefer",
        "gssencmode=disable",
        "sslcertmode=allow",
        "client_encoding=LATIN1",
    ] {
        resolve(harmless);
    }
}

#[test]
fn hosts_are_listed_with_their_ports() {
    let check = |text: &str, expected: &[&str]| {
        let shown: Vec<String> = resolve(text).hosts().iter().map(Host::to_string).collect();
        assert_eq!(shown, expected, "{text}");
    };
    check("host=a", &["a:5432"]);
    check("host=a,b,/run port=1", &["a:1", "b:1", "/run:1"]);
    check("host=a,b port=1,", &["a:1", "b:5432"]);
    check("hostaddr=127.0.0.1,::1 port=3", &["127.0.0.1:3", "[::1]:3"]);
    check("host=db hostaddr=10.0.0.1", &["db:5432 (10.0.0.1)"]);
    check("postgresql://h1:1,[::2]:2/", &["h1:1", "[::2]:2"]);
    assert!(resolve("user=me").hosts().iter().all(Host::is_socket));
    assert!(resolve("host=@pg").hosts().iter().all(Host::is_socket));
    assert!(
        !resolve("host=/run hostaddr=::1")
            .hosts()
            .iter()
            .any(Host::is_socket)
    );
}

#[test]
fn text_beats_service_beats_environment_beats_default() {
    let directory = tempfile::tempdir().expect("a directory");
    let services = directory.path().join("services");
    fs::write(&services, "[s]\nhost=from-service\nport=2\nuser=su\n").expect("a file");
    let environment = environment(&[
        ("PGSERVICEFILE", services.to_str().expect("UTF-8")),
        ("PGSERVICE", "s"),
        ("PGHOST", "from-environment"),
        ("PGPORT", "3"),
        ("PGDATABASE", "ed"),
        ("PGAPPNAME", "ea"),
        ("PGSSLMODE", "disable"),
        ("PGCONNECT_TIMEOUT", "7"),
        ("PGTARGETSESSIONATTRS", "primary"),
        ("PGCHANNELBINDING", "require"),
        ("PGREQUIREAUTH", "scram-sha-256"),
        ("PGOPTIONS", "-c geqo=off"),
        ("PGSSLMINPROTOCOLVERSION", "TLSv1.3"),
    ]);
    let info = ConnInfo::resolve("port=1", &environment).expect("it resolves");
    assert_eq!(info.hosts()[0].to_string(), "from-service:1");
    assert_eq!(
        (info.user(), info.dbname(), info.application_name()),
        ("su", "ed", "ea")
    );
    assert_eq!(info.tls.mode, SslMode::Disable);
    assert_eq!(info.tls.min_version, TlsVersion::V1_3);
    assert_eq!(info.connect_timeout, Some(Duration::from_secs(7)));
    assert_eq!(info.target, TargetSession::Primary);
    assert_eq!(info.channel_binding, ChannelBindingMode::Require);
    assert!(!info.require_auth.allows(AuthMethod::Md5));
    assert_eq!(info.value("options"), Some("-c geqo=off"));
    let info = resolve("");
    assert_eq!(
        (info.user(), info.dbname(), info.application_name()),
        ("os-user", "postgres", "tidemark")
    );
    assert_eq!(info.tls.mode, SslMode::Prefer);
}

#[test]
fn a_variable_that_can_not_be_granted_is_refused_by_its_name() {
    for (name, value) in [
        ("PGGSSENCMODE", "require"),
        ("PGSSLCRLDIR", "/x"),
        ("PGSERVICE", "none"),
    ] {
        let error = ConnInfo::resolve("host=h", &environment(&[(name, value)]));
        let error = error.expect_err(name).to_string();
        assert!(error.contains(name) || error.contains("service"), "{error}");
    }
    assert_eq!(
        ConnInfo::resolve("host=h", &environment(&[("PGREQUIRESSL", "1")]))
            .expect("it resolves")
            .tls
            .mode,
        SslMode::Require
    );
}

#[test]
fn tls_settings_have_the_defaults_of_libpq() {
    let tls = resolve("host=h").tls;
    assert_eq!((tls.direct, tls.sni), (false, true));
    assert_eq!(
        (tls.min_version, tls.max_version),
        (TlsVersion::V1_2, TlsVersion::V1_3)
    );
    let RootCertificates::File { path, named } = tls.roots else {
        panic!("a default file");
    };
    assert_eq!(
        (path.to_str(), named),
        (Some("/nonexistent/.postgresql/root.crt"), false)
    );
    let system = resolve("host=h sslrootcert=system").tls;
    assert_eq!(
        (system.roots, system.mode),
        (RootCertificates::System, SslMode::VerifyFull)
    );
    assert_eq!(
        resolve("sslcertmode=disable sslcert=/x").tls.certificate,
        None
    );
    assert!(!resolve("sslsni=0").tls.sni);
}

#[test]
fn the_password_comes_from_the_text_or_the_file_by_database() {
    use std::os::unix::fs::PermissionsExt;

    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("pgpass");
    fs::write(
        &path,
        "h:*:replication:me:stream\nh:*:app:me:sql\nlocalhost:*:*:me:socket\n",
    )
    .expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
    let password = |text: &str, mode| {
        let info = resolve(&format!(
            "{text} user=me dbname=app passfile={}",
            path.display()
        ));
        info.password(&info.hosts()[0], mode)
    };
    let physical = ConnectionMode::Physical;
    assert_eq!(password("host=h", physical).as_deref(), Some("stream"));
    assert_eq!(
        password("host=h", ConnectionMode::Sql).as_deref(),
        Some("sql")
    );
    assert_eq!(
        password("host=h password=given", physical).as_deref(),
        Some("given")
    );
    assert_eq!(
        password("host=h hostaddr=10.0.0.1", physical).as_deref(),
        Some("stream")
    );
    assert_eq!(password("host=/run", physical).as_deref(), Some("socket"));
    assert_eq!(password("host=other", physical), None);
}

proptest! {
    #[test]
    fn a_value_survives_quoting_and_percent_signs(value in "\\PC{0,30}") {
        let quoted = value.replace('\\', r"\\").replace('\'', r"\'");
        let info = resolve(&format!("host=h password='{quoted}' user=me"));
        let expected = (!value.is_empty()).then_some(value.as_str());
        prop_assert_eq!(info.value("password"), expected);
        let coded: String = value.bytes().map(|byte| format!("%{byte:02x}")).collect();
        for uri in [format!("postgresql://me:{coded}@h/"), format!("postgresql://h/?password={coded}")] {
            let info = resolve(&uri);
            prop_assert_eq!(info.value("password"), expected);
            prop_assert_eq!(info.hosts()[0].to_string(), "h:5432");
        }
    }

    #[test]
    fn no_text_makes_us_panic(
        text in "((host|port|password|sslmode|hostaddr|require_auth)?[ =',\\\\]{0,2}\\PC{0,6}){0,4}",
        uri in "postgres(ql)?://[a-z%:@/?&=,\\[\\]0-9]{0,30}",
    ) {
        let environment = environment(&[]);
        for text in [text, uri] {
            if let Ok(info) = ConnInfo::resolve(&text, &environment) {
                prop_assert!(!info.hosts().is_empty());
                let shown = format!("{info:?}");
                prop_assert!(!shown.contains(char::is_control), "{}", shown);
            }
        }
    }
}
