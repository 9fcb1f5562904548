//! Connections to real servers: every authentication method over every transport, valid and invalid
//! certificates, lists of hosts.

use std::{
    fs,
    path::Path,
    rc::Rc,
    sync::atomic::{AtomicU32, Ordering},
};

use replication::{ConnInfo, ConnectionMode, Error, ReplicationClient, ReplicationStart};
use tokio::runtime::Runtime;
use wal_format::TimelineId;

use crate::{
    certificates::Certificates,
    support::{Server, postgres_bin},
};

const METHODS: [(&str, &str); 4] = [
    ("u_trust", "trust"),
    ("u_password", "password"),
    ("u_md5", "md5"),
    ("u_scram", "scram-sha-256"),
];

/// A server with TLS on 127.0.0.1, and a role for each method.
pub(crate) struct Secured {
    pub(crate) server: Server,
    pub(crate) certificates: Rc<Certificates>,
    runtime: Runtime,
}

impl Secured {
    pub(crate) fn start(bin: &Path) -> Self {
        Self::start_with(bin, &Rc::new(Certificates::make()))
    }

    pub(crate) fn start_with(bin: &Path, certificates: &Rc<Certificates>) -> Self {
        let settings = format!(
            "listen_addresses='127.0.0.1'\nssl=on\nssl_cert_file='{}'\nssl_key_file='{}'\nssl_ca_file='{}'",
            certificates.shown("server.crt"),
            certificates.shown("server.key"),
            certificates.shown("ca.crt"),
        );
        let server = Server::start(bin, &settings);
        let mut hba = "local all postgres trust\nlocal replication postgres trust\n".to_owned();
        for (role, method) in METHODS {
            let encryption = if method == "md5" {
                "md5"
            } else {
                "scram-sha-256"
            };
            server.sql(&format!(
                "SET password_encryption = '{encryption}'; CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'S3CRET'"
            ));
            for database in ["all", "replication"] {
                hba += &format!("local {database} {role} {method}\n");
                hba += &format!("host {database} {role} 127.0.0.1/32 {method}\n");
            }
        }
        for role in ["u_cert", "u_tls", "u_plain", "u_stream", "u_nobody"] {
            server.sql(&format!(
                "CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'S3CRET'"
            ));
        }
        server.sql("ALTER ROLE u_nobody NOREPLICATION");
        hba += "hostssl all u_tls 127.0.0.1/32 trust\n\
                hostnossl all u_plain 127.0.0.1/32 trust\n\
                hostssl all u_cert 127.0.0.1/32 cert\n\
                hostssl replication u_cert 127.0.0.1/32 cert\n\
                hostssl replication u_tls 127.0.0.1/32 trust\n\
                hostnossl replication u_plain 127.0.0.1/32 trust\n\
                host replication u_stream 127.0.0.1/32 trust\n\
                host replication u_nobody 127.0.0.1/32 trust\n";
        fs::write(server.data().join("pg_hba.conf"), hba).expect("pg_hba.conf");
        let secured = Self {
            server,
            certificates: Rc::clone(certificates),
            runtime: Runtime::new().expect("a runtime"),
        };
        secured.restart("");
        secured
    }

    /// Restarts the server with additional settings.
    pub(crate) fn restart(&self, settings: &str) {
        self.server.down("fast");
        self.server.configure_more(settings);
        self.server.up();
    }

    /// Gives the server another certificate.
    pub(crate) fn present(&self, name: &str) {
        self.restart(&format!(
            "ssl_cert_file='{}'\nssl_key_file='{}'",
            self.certificates.shown(&format!("{name}.crt")),
            self.certificates.shown(&format!("{name}.key"))
        ));
    }

    pub(crate) fn tcp(&self, settings: &str) -> String {
        format!("hostaddr=127.0.0.1 port={} {settings}", self.server.port)
    }

    fn root(&self) -> String {
        format!("sslrootcert={}", self.certificates.shown("ca.crt"))
    }

    pub(crate) fn connect(&self, conninfo: &str) -> Result<ReplicationClient, Error> {
        let info = ConnInfo::parse(conninfo)?;
        self.runtime
            .block_on(ReplicationClient::connect(&info, ConnectionMode::Physical))
    }

    /// Queries the server as superuser, without psql, whose start would take most of the time.
    fn query(&self, sql: &str) -> String {
        let info = ConnInfo::parse(&self.server.conninfo()).expect("it parses");
        let rows = self.runtime.block_on(async {
            let mut client = ReplicationClient::connect(&info, ConnectionMode::Sql).await?;
            let rows = client.query(sql).await;
            client.close().await;
            rows
        });
        let rows = rows.unwrap_or_else(|error| panic!("{sql}: {error}"));
        rows[0][0].clone().unwrap_or_default()
    }

    /// Returns true if the server sees the connection as encrypted.
    fn is_encrypted(&self, conninfo: &str) -> bool {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let client = self
            .connect(&format!("{conninfo} application_name={name}"))
            .unwrap_or_else(|error| panic!("{conninfo}: {error}"));
        let seen = self.query(&format!(
            "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_replication USING (pid) WHERE application_name = '{name}'"
        ));
        assert_eq!(client.encryption().is_some(), seen == "t", "{conninfo}");
        self.runtime.block_on(client.close());
        seen == "t"
    }

    fn refusal(&self, conninfo: &str, expected: &str) -> Error {
        match self.connect(conninfo) {
            Ok(_) => panic!("{conninfo}: taken, but \"{expected}\" was due"),
            Err(error) => {
                let text = error.to_string();
                assert!(
                    text.contains(expected),
                    "{conninfo}: {text}, but \"{expected}\" was due"
                );
                assert!(!text.contains("S3CRET") && !text.contains('\n'), "{text}");
                error
            }
        }
    }
}

#[test]
fn every_authentication_works_over_every_transport() {
    let certificates = Rc::new(Certificates::make());
    for (major, bin) in testbed::tools::servers_or_skip() {
        let secured = Secured::start_with(&bin, &certificates);
        let socket = secured.server.conninfo().replace(" user=postgres", "");
        let tcp = secured.tcp("");
        let root = secured.root();
        let transports = [
            (socket.clone(), false),
            (format!("{socket} sslmode=verify-full"), false),
            (format!("{tcp} sslmode=disable"), false),
            (format!("{tcp} sslmode=allow"), false),
            (tcp.clone(), true),
            (format!("{tcp} sslmode=require"), true),
            (
                format!("{tcp} host=wrong.name sslmode=verify-ca {root}"),
                true,
            ),
            (
                format!("{tcp} host=localhost sslmode=verify-full {root}"),
                true,
            ),
        ];
        for (role, method) in METHODS {
            for (transport, encrypted) in &transports {
                let conninfo = format!("{transport} user={role} password=S3CRET");
                assert_eq!(
                    secured.is_encrypted(&conninfo),
                    *encrypted,
                    "{major}: {conninfo}"
                );
            }
            if method == "trust" {
                continue;
            }
            let (first, last) = (&transports[0].0, &transports[transports.len() - 1].0);
            for transport in [first, last] {
                let wrong = format!("{transport} user={role} password=wrong");
                let error = secured.refusal(&wrong, "check the password");
                assert!(error.is_usage(), "{error}");
                let without = format!("{transport} user={role} passfile=/none");
                secured.refusal(&without, "PGPASSWORD");
            }
        }
    }
}

#[test]
fn certificates_are_believed_as_libpq_believes_them() {
    let Some(bin) = postgres_bin() else { return };
    let secured = Secured::start(&bin);
    let root = secured.root();
    let all = secured.tcp("user=u_tls sslmode=");
    let check = |settings: &str, expected: Result<(), &str>| {
        let conninfo = format!("{all}{settings}");
        match expected {
            Ok(()) => assert!(secured.is_encrypted(&conninfo), "{conninfo}"),
            Err(expected) => {
                let error = secured.refusal(&conninfo, expected);
                assert!(error.is_usage(), "{error}");
            }
        }
    };
    let shown = |name: &str| secured.certificates.shown(name);
    let other = format!("sslrootcert={}", shown("other.crt"));
    let full = |host: &str| format!("verify-full host={host} {root}");
    check(&full("localhost"), Ok(()));
    check(&full("DB.Example"), Ok(()));
    check(
        &full("whatever"),
        Err("is for localhost, db.example, not for whatever"),
    );
    check(&full("127.0.0.1"), Err("not for 127.0.0.1"));
    check(
        &format!("verify-full {root}"),
        Err("give host together with hostaddr"),
    );
    check(
        &format!("verify-ca {other}"),
        Err("not signed by an authority in sslrootcert"),
    );
    check(
        &format!("require {other}"),
        Err("not signed by an authority in sslrootcert"),
    );
    check("require sslrootcert=/nonexistent", Ok(()));
    check(
        "verify-ca sslrootcert=/nonexistent",
        Err("sslrootcert=system"),
    );
    check(
        &format!("verify-ca sslrootcert={}", shown("ca.key")),
        Err("holds no PEM certificate"),
    );
    check(
        "verify-full host=localhost sslrootcert=system",
        Err("not signed by"),
    );
    check(
        &format!("{} sslcrl={}", full("localhost"), shown("none.crl")),
        Ok(()),
    );
    check(
        &format!("{} sslcrl={}", full("localhost"), shown("revoked.crl")),
        Err("was revoked"),
    );
    check(
        &format!("{} sslcrl=/nonexistent", full("localhost")),
        Err("revocation lists"),
    );
    for version in ["TLSv1.2", "TLSv1.3"] {
        let only = format!("ssl_min_protocol_version={version} ssl_max_protocol_version={version}");
        check(&format!("{} {only}", full("localhost")), Ok(()));
    }
    secured.refusal(
        &secured.tcp("user=u_tls sslmode=disable"),
        "pg_hba.conf needs a line",
    );
    assert!(secured.is_encrypted(&secured.tcp("user=u_tls sslmode=allow")));
    assert!(!secured.is_encrypted(&secured.tcp("user=u_plain")));
    secured.refusal(
        &secured.tcp("user=u_plain sslmode=require"),
        "pg_hba.conf needs a line",
    );
    // With `prefer` an untrusted authority leads to an unencrypted connection, as in libpq.
    let prefer = secured.tcp(&format!("user=u_scram password=S3CRET {other}"));
    assert!(!secured.is_encrypted(&prefer));

    secured.present("common");
    check(&full("localhost"), Ok(()));
    check(&full("db.example"), Err("not for db.example"));
    check(&format!("verify-ca {other}"), Err("not signed by"));
    check("require sslrootcert=/nonexistent", Ok(()));
    for (name, host, expected) in [
        ("elsewhere", "localhost", Err("is for elsewhere.example")),
        ("wild", "db.example", Ok(())),
        ("wild", "127.0.0.1", Ok(())),
        ("wild", "a.db.example", Err("not for a.db.example")),
        ("expired", "localhost", Err("has expired")),
        ("expired1", "localhost", Err("has expired")),
        ("stranger1", "localhost", Err("not signed by")),
        ("self", "localhost", Err("not signed by")),
    ] {
        secured.present(name);
        check(&full(host), expected);
        check("require sslrootcert=/nonexistent", Ok(()));
    }
    check(
        &format!(
            "verify-full host=localhost sslrootcert={}",
            shown("self.crt")
        ),
        Ok(()),
    );
    check(
        &format!("verify-full host=other sslrootcert={}", shown("self.crt")),
        Err("not for other"),
    );

    secured.restart("ssl=off");
    secured.refusal(
        &secured.tcp("user=u_tls sslmode=require"),
        "does not support TLS",
    );
    assert!(!secured.is_encrypted(&secured.tcp("user=u_plain sslmode=prefer")));
}

#[test]
fn scram_is_bound_to_the_servers_certificate() {
    let Some(bin) = postgres_bin() else { return };
    let secured = Secured::start(&bin);
    let scram = |settings: &str| secured.tcp(&format!("user=u_scram password=S3CRET {settings}"));
    let bound = scram("sslmode=require channel_binding=require require_auth=scram-sha-256");
    // ECDSA with SHA-256, SHA-384 and SHA-512, and RSA-PSS, which names its hash elsewhere.
    for name in ["server", "common", "wild", "pss"] {
        secured.present(name);
        assert!(secured.is_encrypted(&bound), "{name}");
    }
    assert!(secured.is_encrypted(&scram("channel_binding=disable")));
    secured.refusal(
        &scram("sslmode=disable channel_binding=require"),
        "is not encrypted",
    );
    let socket = secured
        .server
        .conninfo()
        .replace("=postgres", "=u_scram password=S3CRET");
    secured.refusal(
        &format!("{socket} channel_binding=require"),
        "is not encrypted",
    );
    for role in ["u_md5", "u_password", "u_trust"] {
        let conninfo = bound
            .replace("u_scram", role)
            .replace("require_auth=scram-sha-256", "");
        secured.refusal(&conninfo, "did not offer it");
    }
    secured.refusal(&scram("require_auth=md5"), "require_auth forbids");
    let trusted = secured.tcp("user=u_trust require_auth=!none");
    secured.refusal(&trusted, "lets everybody in");
    // Ed25519 has no hash for channel binding.
    secured.present("ed25519");
    assert!(secured.is_encrypted(&scram("sslmode=require")));
    secured.refusal(&bound, "channel_binding=require");
}

#[test]
fn a_client_shows_its_certificate() {
    let Some(bin) = postgres_bin() else { return };
    let secured = Secured::start(&bin);
    let files = |certificate: &str, key: &str| {
        format!(
            "user=u_cert sslmode=require sslcert={} sslkey={}",
            secured.certificates.shown(certificate),
            secured.certificates.shown(key)
        )
    };
    let ours = secured.tcp(&files("client.crt", "client.key"));
    assert!(secured.is_encrypted(&ours));
    for version in ["TLSv1.2", "TLSv1.3"] {
        let only = format!("ssl_min_protocol_version={version} ssl_max_protocol_version={version}");
        assert!(secured.is_encrypted(&format!("{ours} {only}")), "{version}");
    }
    let none = secured.tcp("user=u_cert sslmode=require");
    secured.refusal(&none, "client certificate");
    secured.refusal(&format!("{ours} sslcertmode=disable"), "client certificate");
    secured.refusal(&ours.replace("u_cert", "u_cert_other"), "PostgreSQL at");
    let stranger = secured.tcp(&files("stranger.crt", "stranger.key"));
    let refused = secured.refusal(&stranger, "PostgreSQL at 127.0.0.1");
    assert!(
        matches!(
            refused,
            Error::Tls { .. } | Error::Io { .. } | Error::Closed { .. }
        ),
        "{refused}"
    );
    secured.refusal(
        &secured.tcp(&files("client.crt", "stranger.key")),
        "does not belong",
    );
    secured.refusal(&secured.tcp(&files("none.crt", "client.key")), "none.crt");
    secured.refusal(
        &secured.tcp(&files("client.crt", "none.key")),
        "name the key",
    );
    let open = secured.certificates.path("open.key");
    fs::copy(secured.certificates.path("client.key"), &open).expect("a copy");
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&open, fs::Permissions::from_mode(0o644)).expect("chmod");
    secured.refusal(&secured.tcp(&files("client.crt", "open.key")), "chmod 0600");
}

#[test]
fn direct_negotiation_works_where_the_server_knows_it() {
    let certificates = Rc::new(Certificates::make());
    for (major, bin) in testbed::tools::servers_or_skip() {
        if ![16, 17, 18].contains(&major) {
            continue;
        }
        let secured = Secured::start_with(&bin, &certificates);
        let direct = secured.tcp("user=u_tls sslmode=require sslnegotiation=direct");
        if major >= 17 {
            assert!(secured.is_encrypted(&direct));
        } else {
            assert!(secured.connect(&direct).is_err());
        }
    }
}

#[test]
fn of_several_hosts_the_first_that_fits_is_taken() {
    let Some(bin) = postgres_bin() else { return };
    let primary = Server::start(&bin, "");
    let standby = Server::standby_of(&primary);
    let runtime = Runtime::new().expect("a runtime");
    let list = |target: &str| {
        let directory = |server: &Server| server.directory().display().to_string();
        format!(
            "host=/nonexistent,{},{} port=1,{},{} user=postgres target_session_attrs={target}",
            directory(&standby),
            directory(&primary),
            standby.port,
            primary.port
        )
    };
    let connect = |conninfo: &str| {
        let info = ConnInfo::parse(conninfo).expect("it parses");
        runtime.block_on(ReplicationClient::connect(&info, ConnectionMode::Physical))
    };
    let port = |target: &str| {
        let client = connect(&list(target)).unwrap_or_else(|error| panic!("{target}: {error}"));
        client.conninfo().hosts()[0]
            .to_string()
            .rsplit(':')
            .next()
            .map(str::to_owned)
    };
    let (first, second) = (
        Some(standby.port.to_string()),
        Some(primary.port.to_string()),
    );
    for (target, expected) in [
        ("any", &first),
        ("standby", &first),
        ("prefer-standby", &first),
        ("read-only", &first),
        ("primary", &second),
        ("read-write", &second),
    ] {
        assert_eq!(&port(target), expected, "{target}");
    }
    let only_primary = format!("{} target_session_attrs=standby", primary.conninfo());
    let refused = connect(&only_primary).expect_err("it is none").to_string();
    assert!(
        refused.contains("is a primary, but target_session_attrs=standby"),
        "{refused}"
    );
    let preferred = format!("{} target_session_attrs=prefer-standby", primary.conninfo());
    connect(&preferred).expect("a primary, when there is no standby");
    let nowhere = connect("host=/nonexistent,/nowhere user=x").expect_err("nobody is there");
    let text = nowhere.to_string();
    assert!(
        text.contains("none of 2 hosts")
            && text.contains("/nonexistent")
            && text.contains("/nowhere"),
        "{text}"
    );
    assert!(!nowhere.is_usage());

    // The server has nothing to stream at the LSN where its history leaves a timeline.
    standby.promote();
    let mut client = connect(&standby.conninfo()).expect("it is there");
    let second = TimelineId::new(2).expect("a timeline");
    let history = runtime
        .block_on(client.timeline_history(second))
        .expect("a history");
    let history = wal_format::TimelineHistory::parse(second, &history).expect("it parses");
    let switch_lsn = history.ancestors[0].switch_lsn;
    let started = client.start_replication(None, switch_lsn, TimelineId::FIRST);
    let Ok(ReplicationStart::EndOfTimeline(mut client, Some(next))) = runtime.block_on(started)
    else {
        panic!("it is the end of the timeline");
    };
    assert_eq!((next.timeline, next.start_lsn), (second, switch_lsn));
    runtime
        .block_on(client.identify_system())
        .expect("the connection goes on");
}
