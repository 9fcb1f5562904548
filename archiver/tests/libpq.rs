//! Compares our parsing of connection strings, certificates and files with libpq's: psql gets the
//! same string.
//!
//! Deliberate differences are not compared: the default database is "postgres" and not the role's
//! name, and GSSAPI is not supported.

use replication::{ConnInfo, ConnectionMode, ReplicationClient};
use tokio::runtime::Runtime;

use crate::{
    connect::Secured,
    support::{Server, postgres_bin},
};

const IS_ENCRYPTED: &str = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";

struct Both<'a> {
    server: &'a Server,
    runtime: Runtime,
    compared: usize,
    taken: usize,
    differ: Vec<String>,
}

impl<'a> Both<'a> {
    fn new(server: &'a Server) -> Self {
        Self {
            server,
            runtime: Runtime::new().expect("a runtime"),
            compared: 0,
            taken: 0,
            differ: Vec::new(),
        }
    }

    /// Connects with both, and notes a difference in acceptance or encryption.
    fn compare(&mut self, conninfo: &str) {
        let ours = self.runtime.block_on(async {
            let info = ConnInfo::parse(conninfo)?;
            let mut client = ReplicationClient::connect(&info, ConnectionMode::Sql).await?;
            let rows = client.query(IS_ENCRYPTED).await?;
            client.close().await;
            Ok::<_, replication::Error>(rows[0][0].clone().expect("a value"))
        });
        let output = self.server.psql(conninfo, IS_ENCRYPTED);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        let theirs = if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&output.stderr))
        };
        self.compared += 1;
        self.taken += usize::from(theirs.is_ok());
        if ours.as_ref().ok() != theirs.as_ref().ok() {
            let ours = ours.map_err(|error| error.to_string());
            self.differ.push(format!(
                "{conninfo}\n  ours:  {ours:?}\n  libpq: {theirs:?}"
            ));
        }
    }

    fn end(self, taken_min: usize) {
        eprintln!(
            "{} texts compared, libpq took {}",
            self.compared, self.taken
        );
        assert!(self.differ.is_empty(), "{}", self.differ.join("\n"));
        // If both refused everything, nothing would be proved.
        assert!(self.taken >= taken_min, "only {} were taken", self.taken);
    }
}

#[test]
fn connection_texts_mean_the_same() {
    let Some(bin) = postgres_bin() else { return };
    let secured = Secured::start(&bin);
    let mut both = Both::new(&secured.server);
    let port = secured.server.port;
    let socket = secured.server.directory().display().to_string();
    let escaped = socket.replace('/', "%2F");
    let pairs = |settings: &str| {
        format!("hostaddr=127.0.0.1 port={port} user=u_trust dbname=postgres {settings}")
    };
    for settings in [
        "",
        "sslmode = disable",
        "sslmode='disable'",
        r"sslmode=dis\able",
        "sslmode='dis",
        "sslmode=REQUIRE",
        "sslmode=",
        "sslmode=''",
        "sslmode=require sslmode=disable",
        "sslmode",
        "sslmode require",
        "nonsense=1",
        "SSLMODE=require",
        "host=a,b",
        "host=a",
        "host=''",
        "port=' '",
        "port='5433 '",
        "port=0",
        "port=65536",
        "port=x",
        "port=1,2",
        "connect_timeout=5",
        "connect_timeout=0",
        "connect_timeout=-1",
        "connect_timeout=x",
        "connect_timeout=' 5 '",
        "keepalives=0",
        "keepalives=x",
        "keepalives_idle=30 keepalives_interval=5 keepalives_count=3 tcp_user_timeout=10000",
        "keepalives_idle=x",
        "tcp_user_timeout=x",
        "options='-c geqo=off'",
        "options='-c nonsense=1'",
        "application_name=a fallback_application_name=b",
        "client_encoding=UTF8",
        "gssencmode=disable",
        "gssencmode=prefer",
        "gssencmode=require",
        "gssencmode=x",
        "channel_binding=disable",
        "channel_binding=require",
        "channel_binding=x",
        "require_auth=none",
        "require_auth=!none",
        "require_auth=scram-sha-256,none",
        "require_auth=scram-sha-256,!none",
        "require_auth=none,none",
        "require_auth=nonsense",
        "target_session_attrs=any",
        "target_session_attrs=read-write",
        "target_session_attrs=read-only",
        "target_session_attrs=primary",
        "target_session_attrs=standby",
        "target_session_attrs=prefer-standby",
        "target_session_attrs=master",
        "options='-c default_transaction_read_only=on' target_session_attrs=read-write",
        "options='-c default_transaction_read_only=on' target_session_attrs=read-only",
        "options='-c default_transaction_read_only=on' target_session_attrs=primary",
        "load_balance_hosts=random",
        "load_balance_hosts=x",
        "ssl_min_protocol_version=TLSv1.3",
        "ssl_min_protocol_version=TLSv1.4",
        "ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2",
        "sslnegotiation=direct",
        "sslnegotiation=direct sslmode=require",
        "sslnegotiation=x",
        "sslsni=0",
        "sslcompression=1",
        "sslcertmode=disable",
        "sslcertmode=allow",
        "sslcertmode=x",
        "sslrootcert=system",
        "sslrootcert=system sslmode=require",
        "requirepeer=nobody",
        "service=none",
        "user=u_scram password=S3CRET",
        "user=u_scram password=wrong",
        "user=u_scram password=S3CRET channel_binding=require",
        "user=u_scram password=S3CRET require_auth=md5",
        "user=u_scram password=S3CRET require_auth=!md5",
        "user=u_md5 password=S3CRET require_auth=md5",
        "user=u_md5 password=S3CRET channel_binding=require",
        "user=u_password password=S3CRET require_auth=!password",
        "user=u_scram",
        "user=u_plain",
        "user=u_plain sslmode=allow",
        "user=u_plain sslmode=require",
        "user=u_tls",
        "user=u_tls sslmode=allow",
        "user=u_tls sslmode=disable",
        "dbname=none",
        "gssencmode=''",
        "channel_binding=''",
        "require_auth=''",
        "target_session_attrs=''",
        "ssl_min_protocol_version=''",
        "sslcertmode=''",
        "connect_timeout=''",
    ] {
        both.compare(&pairs(settings));
    }
    for text in [
        format!("postgresql://u_trust@127.0.0.1:{port}/postgres"),
        format!("postgres://u_trust@127.0.0.1:{port}/postgres?sslmode=disable"),
        format!("postgresql://u_trust@127.0.0.1:{port}/postgres?ssl=true"),
        format!("postgresql://u_trust@127.0.0.1:{port}/postgres?ssl=false"),
        format!("postgresql://u_scram:S3CRET@127.0.0.1:{port}/postgres"),
        format!("postgresql://u_scram:%533CRET@127.0.0.1:{port}/postgres"),
        format!("postgresql://u_scram:S3CRE%@127.0.0.1:{port}/postgres"),
        format!("postgresql://u_scram:S3CRE%00@127.0.0.1:{port}/postgres"),
        format!("postgresql://u_trust:a:b@127.0.0.1:{port}/postgres"),
        format!("postgresql://u_trust:a?b@127.0.0.1:{port}/postgres"),
        format!("postgresql://u_trust:a@b@127.0.0.1:{port}/postgres"),
        format!("postgresql://u_trust@127.0.0.1:1,127.0.0.1:{port}/postgres"),
        format!("postgresql://u_trust@127.0.0.1:{port}?dbname=postgres"),
        format!("postgresql://127.0.0.1:{port}/postgres?user=u_trust"),
        format!("postgresql://u_trust@127.0.0.1:{port}/postgres?"),
        format!("postgresql://u_trust@127.0.0.1:{port}/postgres?&sslmode=disable"),
        format!("postgresql://u_trust@127.0.0.1:{port}/postgres?sslmode=disable&"),
        format!("postgresql://u_trust@127.0.0.1:{port}/postgres?sslmode=disable&&"),
        format!("postgresql://u_trust@127.0.0.1:{port}/postgres?&"),
        format!("postgresql://u_trust@127.0.0.1:{port}/postgres?sslmode"),
        format!("postgresql://u_trust@127.0.0.1:{port}/postgres?sslmode=a=b"),
        format!("postgresql://u_trust@127.0.0.1:{port}/postgres?nonsense=1"),
        format!("postgresql://u_trust@127.0.0.1:{port}/postgres?sslmode="),
        format!("postgresql://u_trust@/postgres?host={socket}&port={port}"),
        format!("postgresql://u_trust@{escaped}:{port}/postgres"),
        format!("postgresql://u_trust@[127.0.0.1]:{port}/postgres"),
        format!("postgresql://u_trust@[::1:{port}/postgres"),
        format!("postgresql://u_trust@[::1]x:{port}/postgres"),
        format!("postgresql://u_trust@[]:{port}/postgres"),
        format!("host={socket} port={port} user=u_trust dbname=postgres sslmode=require"),
        format!("host={socket} port={port} user=u_trust dbname=postgres sslmode=verify-full"),
        format!("host={socket} port={port} user=u_trust dbname=postgres requirepeer=nobody"),
        format!("host=/nonexistent,{socket} port=1,{port} user=u_trust dbname=postgres"),
        format!("host=/nonexistent,{socket} port={port} user=u_trust dbname=postgres"),
        format!("host=127.0.0.1,{socket} port={port} user=u_scram password=wrong dbname=postgres"),
        format!("hostaddr=localhost port={port} user=u_trust dbname=postgres"),
    ] {
        both.compare(&text);
    }
    both.end(50);
}

#[test]
fn certificates_are_judged_the_same() {
    let Some(bin) = postgres_bin() else { return };
    let secured = Secured::start(&bin);
    let mut both = Both::new(&secured.server);
    let shown = |name: &str| secured.certificates.shown(name);
    let roots = [
        shown("ca.crt"),
        shown("other.crt"),
        shown("self.crt"),
        "/nonexistent".to_owned(),
    ];
    let common = secured.tcp("user=u_tls dbname=postgres");
    for name in [
        "server",
        "common",
        "elsewhere",
        "wild",
        "expired",
        "expired1",
        "stranger1",
        "self",
    ] {
        secured.present(name);
        for root in &roots {
            for mode in ["require", "verify-ca"] {
                both.compare(&format!("{common} sslmode={mode} sslrootcert={root}"));
            }
        }
        for host in [
            "localhost",
            "DB.example",
            "a.db.example",
            "127.0.0.1",
            "whatever",
        ] {
            for root in &roots[..1] {
                both.compare(&format!(
                    "{common} host={host} sslmode=verify-full sslrootcert={root}"
                ));
            }
        }
        both.compare(&format!(
            "{common} sslmode=verify-full sslrootcert={}",
            roots[0]
        ));
        both.compare(&format!(
            "{common} host=localhost sslmode=verify-full sslrootcert={}",
            shown("self.crt")
        ));
        let plain = common.replace("u_tls", "u_trust");
        both.compare(&format!("{plain} sslrootcert={}", shown("other.crt")));
    }
    secured.present("server");
    for list in ["none.crl", "revoked.crl"] {
        let root = &roots[0];
        both.compare(&format!(
            "{common} sslmode=verify-ca sslrootcert={root} sslcrl={}",
            shown(list)
        ));
    }
    let client = common.replace("u_tls", "u_cert");
    for (certificate, key) in [
        ("client.crt", "client.key"),
        ("client.crt", "stranger.key"),
        ("stranger.crt", "stranger.key"),
        ("client.crt", "client.der"),
        ("client.crt", "none.key"),
        ("client.crt", "client.crt"),
        ("none.crt", "client.key"),
    ] {
        both.compare(&format!(
            "{client} sslmode=require sslcert={} sslkey={}",
            shown(certificate),
            shown(key)
        ));
    }
    both.end(20);
}
