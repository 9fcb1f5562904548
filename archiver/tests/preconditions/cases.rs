//! Connections and buckets that cannot be used, and a repository of another server.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    path::Path,
    thread,
};

use repository::{
    ClusterIdentity, Repository,
    config::{RepositoryPlace, RepositoryUrl},
};
use wal_format::{PgTimestamp, PgVersion, SegmentSize, SystemIdentifier};

use super::{Case, Scene, case};
use crate::support::wait_until;

/// Answers every connection to the returned address with `answer`.
fn answering(answer: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let mut request = [0; 4096];
            drop(stream.read(&mut request));
            drop(stream.write_all(answer));
        }
    });
    address
}

/// Returns the connections that fail.
pub(super) fn connections(scene: &Scene) -> Vec<Case> {
    let sql = |sql: &str| drop(scene.server.sql(sql));
    sql("CREATE ROLE no_login NOLOGIN REPLICATION");
    sql("CREATE ROLE no_replication LOGIN");
    sql("CREATE ROLE kept_out LOGIN REPLICATION");
    sql("CREATE ROLE secret LOGIN REPLICATION PASSWORD 'right'");
    sql("SELECT pg_create_logical_replication_slot('logical', 'test_decoding')");
    let hba = scene.server.data().join("pg_hba.conf");
    let rules = fs::read_to_string(&hba).expect("rules");
    let rules = format!(
        "local all,replication kept_out reject\nlocal all,replication secret scram-sha-256\n{rules}"
    );
    fs::write(&hba, rules).expect("rules");
    sql("SELECT pg_reload_conf()");
    wait_until("the rules are read", || {
        let rules = "SELECT count(*) FROM pg_hba_file_rules WHERE 'kept_out' = ANY (user_name)";
        scene.server.sql(rules) == "1"
    });
    let with = |more: &str| scene.conninfo(more);
    let cases = [
        (
            "no server",
            with("port=1"),
            5,
            [
                "FAIL  replication connection",
                "is the server running, and is this its address?",
            ],
        ),
        (
            "unknown keyword",
            with("sslmod=require"),
            2,
            ["sslmod", "did you mean"],
        ),
        (
            "unknown role",
            with("user=nobody"),
            2,
            [
                "role \"nobody\" does not exist",
                "CREATE ROLE \"nobody\" LOGIN REPLICATION",
            ],
        ),
        (
            "role without LOGIN",
            with("user=no_login"),
            2,
            [
                "is not permitted to log in",
                "ALTER ROLE \"no_login\" LOGIN REPLICATION",
            ],
        ),
        (
            "role without REPLICATION",
            with("user=no_replication"),
            2,
            ["FAIL  replication connection", "ALTER ROLE … REPLICATION"],
        ),
        (
            "role that pg_hba.conf keeps out",
            with("user=kept_out"),
            2,
            ["pg_hba.conf needs a line", "then reload the server"],
        ),
        (
            "no password",
            with("user=secret passfile=/absent"),
            2,
            ["password", "password file"],
        ),
        (
            "wrong password",
            with("user=secret password=wrong"),
            2,
            ["password authentication failed", "password"],
        ),
        (
            "encryption mode that does not exist",
            with("sslmode=yes"),
            2,
            ["sslmode", "require"],
        ),
        (
            "server without the session that is wanted",
            with("target_session_attrs=standby"),
            5,
            [
                "target_session_attrs=standby",
                "FAIL  replication connection",
            ],
        ),
    ];
    let of_connection = cases.map(|(name, conninfo, code, says)| Case {
        name,
        keys: vec![("conninfo", conninfo)],
        code,
        says: says.to_vec(),
    });
    let standbys = format!("[{}]", with("port=1"));
    let mut cases: Vec<Case> = of_connection.into();
    cases.push(case(
        "logical slot",
        &[("slot", "\"logical\"")],
        2,
        &["is a logical slot", "name another one as slot"],
    ));
    cases.push(case(
        "standby that does not answer",
        &[("standbys", &standbys)],
        5,
        &["FAIL  standby", "is the server running"],
    ));
    cases
}

/// Returns the buckets that cannot be used.
pub(super) fn buckets(scene: &Scene) -> Vec<Case> {
    let keys = |endpoint: String| {
        vec![
            ("repository", "\"s3://bucket/prefix\"".to_owned()),
            ("s3_endpoint", format!("\"{endpoint}\"")),
            ("s3_region", "\"us-east-1\"".to_owned()),
            ("s3_access_key", "\"key\"".to_owned()),
            ("s3_secret_key", "\"secret\"".to_owned()),
        ]
    };
    let page: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\
                        Connection: close\r\n\r\n<html></html>";
    let refusal: &[u8] =
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let page = answering(page);
    let mut cases = Vec::new();
    for (name, keys, code, says) in [
        (
            "no object store there",
            keys("http://127.0.0.1:1".to_owned()),
            5,
            ["FAIL  repository", "s3_endpoint"],
        ),
        (
            "HTTPS to a store that speaks HTTP",
            keys(format!("https://{page}")),
            5,
            ["FAIL  repository", "http://"],
        ),
        (
            "a web page instead of a store",
            keys(format!("http://{page}")),
            5,
            ["FAIL  repository", "s3_endpoint"],
        ),
        (
            "no permission",
            keys(format!("http://{}", answering(refusal))),
            5,
            ["FAIL  repository", "s3:PutObject"],
        ),
    ] {
        cases.push(Case {
            name,
            keys,
            code,
            says: says.to_vec(),
        });
    }
    let mut without_ca = keys("https://127.0.0.1:1".to_owned());
    without_ca.push(("s3_ca_file", scene.quoted("absent")));
    cases.push(Case {
        name: "certificate authority missing",
        keys: without_ca,
        code: 2,
        says: vec!["s3_ca_file", "absent"],
    });
    cases.push(case(
        "store of another kind",
        &[("repository", "\"gs://bucket/prefix\"")],
        2,
        &["gs://bucket/prefix", "s3://bucket/prefix"],
    ));
    cases
}

/// Claims the name `main` in a new folder for a cluster with system identifier 77.
pub(super) fn claim_for_another(folder: &Path) {
    fs::create_dir(folder).expect("a directory");
    let place = RepositoryPlace::from(RepositoryUrl::Folder(folder.to_owned()));
    let name = "main".parse().expect("a name");
    let repository = Repository::open(&place, &name).expect("it opens");
    let identity = ClusterIdentity {
        format_version: 1,
        cluster: name,
        system_identifier: SystemIdentifier(77),
        postgresql_major: PgVersion::try_from(17).expect("a version"),
        wal_segment_size: SegmentSize::new(16 << 20).expect("a size"),
        created: PgTimestamp::from_jiff(jiff::Timestamp::now()),
    };
    repository.claim(&identity).expect("the name is free");
}
