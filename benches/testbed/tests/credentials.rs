//! Credentials: each way in which an AWS program finds them, tested with our own program and stubs
//! of S3 and STS.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use testbed::{
    bucket_proxy::{Asked, BucketProxy, Fault, Verdict},
    cluster::Cluster,
    object_store::ObjectStoreServer,
    place::Place,
    programs::{command, directory, ours, server_user},
    restored::Restored,
    tools::servers_or_skip,
};

/// The credentials that STS returns.
const ROLE_KEY: &str = "ASIAROLE";
const ROLE_TOKEN: &str = "token-of-the-role";

/// A stub that answers S3's listings with nothing and STS requests with credentials. It records all
/// requests.
struct Stub {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Stub {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&seen);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // A client that disconnects does not matter.
                let _gone = serve(&stream, &told);
            }
        });
        Self { address, seen }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.seen.lock().expect("no panic"))
    }
}

fn serve(stream: &TcpStream, seen: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        if line.trim().is_empty() {
            break;
        }
        request.push_str(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    request.push_str(&String::from_utf8_lossy(&body));
    let answer = match role(&request, ROLE_KEY, "2099-01-01T00:00:00Z") {
        Some(answer) => answer,
        None => "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>".to_owned(),
    };
    seen.lock().expect("no panic").push(request);
    let mut stream = stream;
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{answer}",
        answer.len()
    )
}

/// Returns the answer of STS to a request for a role; `None` for other requests.
fn role(request: &str, key: &str, expiration: &str) -> Option<String> {
    let action = ["AssumeRoleWithWebIdentity", "AssumeRole"]
        .into_iter()
        .find(|action| request.contains(&format!("Action={action}&")))?;
    Some(format!(
        "<{action}Response><{action}Result><Credentials><AccessKeyId>{key}</AccessKeyId>\
         <SecretAccessKey>secret</SecretAccessKey><SessionToken>{ROLE_TOKEN}</SessionToken>\
         <Expiration>{expiration}</Expiration></Credentials><AssumedRoleUser><AssumedRoleId>r:s</AssumedRoleId>\
         <Arn>arn:aws:sts::1:assumed-role/r/s</Arn></AssumedRoleUser></{action}Result></{action}Response>"
    ))
}

/// Lists the repository with these settings and this environment. Returns the requests to the stub.
fn asked(stub: &Stub, place: &Path, settings: &str, environment: &[(&str, String)]) -> Vec<String> {
    let config = place.join("tidemark.toml");
    let endpoint = format!("http://{}", stub.address);
    let text =
        format!("repository = \"s3://bucket/p\"\ns3_endpoint = \"{endpoint}\"\n{settings}\n");
    fs::write(&config, text).expect("a configuration");
    let program = ours("pitr-restore").expect("it is built");
    let mut list = command(&program).expect("a user");
    for name in [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_PROFILE",
        "AWS_REGION",
    ] {
        list.env_remove(name);
    }
    list.env("AWS_CONFIG_FILE", place.join("config"));
    list.env("AWS_SHARED_CREDENTIALS_FILE", place.join("credentials"));
    list.env("AWS_ENDPOINT_URL_STS", &endpoint);
    list.envs(environment.iter().map(|(name, value)| (name, value)));
    list.arg("--config").arg(&config).arg("list");
    let output = list.output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("holds nothing"), "it was answered: {said}");
    let seen = stub.take();
    let all = seen.join("\n");
    assert!(
        !said.contains("secret") && !said.contains(ROLE_TOKEN),
        "{said}"
    );
    assert!(!all.contains("secret-"), "a secret goes nowhere");
    seen
}

fn listing(seen: &[String]) -> String {
    let listing = seen
        .iter()
        .find(|request| request.starts_with("GET /bucket"));
    listing.expect("a listing").to_lowercase()
}

#[test]
fn every_way_to_sign_is_found() {
    let stub = Stub::start();
    let place = directory().expect("a directory");
    let place = place.path();
    private_file(
        &place.join("credentials"),
        "[default]\naws_access_key_id = AKIADEFAULT\naws_secret_access_key = secret-d\n\
         [two]\naws_access_key_id = AKIATWO\naws_secret_access_key = secret-2\naws_session_token = token-two\n",
    );
    fs::write(
        place.join("config"),
        format!(
            "[default]\nregion = eu-north-1\n[profile two]\nregion = eu-south-2\n\
             [profile role]\nrole_arn = {ROLE}\nsource_profile = two\nregion = eu-west-1\n"
        ),
    )
    .expect("a file");
    let keys = "s3_access_key = \"AKIACONFIG\"\ns3_secret_key = \"secret-c\"";
    let variables = |token: &str| {
        vec![
            ("AWS_ACCESS_KEY_ID", "AKIAENV".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "secret-e".to_owned()),
            ("AWS_SESSION_TOKEN", token.to_owned()),
            ("AWS_REGION", "ap-south-1".to_owned()),
        ]
    };
    let with_token = format!("{keys}\ns3_session_token = \"token-c\"\ns3_region = \"sa-east-1\"");
    let file = format!(
        "s3_credentials_file = \"{}/credentials\"\ns3_profile = \"two\"",
        place.display()
    );
    for (settings, environment, key, region, token) in [
        (keys, vec![], "akiaconfig", "eu-north-1", None),
        (
            &with_token,
            vec![],
            "akiaconfig",
            "sa-east-1",
            Some("token-c"),
        ),
        (
            "",
            variables("token-e"),
            "akiaenv",
            "ap-south-1",
            Some("token-e"),
        ),
        ("", vec![], "akiadefault", "eu-north-1", None),
        (
            "s3_profile = \"two\"",
            vec![],
            "akiatwo",
            "eu-south-2",
            Some("token-two"),
        ),
        (&file, vec![], "akiatwo", "eu-south-2", Some("token-two")),
    ] {
        let request = listing(&asked(&stub, place, settings, &environment));
        assert!(
            request.contains(&format!("credential={key}/")),
            "{settings}: {request}"
        );
        assert!(
            request.contains(&format!("/{region}/s3/aws4_request")),
            "{settings}: {request}"
        );
        match token {
            Some(token) => {
                let header = format!("x-amz-security-token: {token}");
                assert!(request.contains(&header), "{settings}: {request}");
            }
            None => assert!(!request.contains("x-amz-security-token"), "{request}"),
        }
    }
}

const ROLE: &str = "arn:aws:iam::1:role/archive";

fn private_file(path: &Path, content: &str) {
    fs::write(path, content).expect("a file");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("chmod");
    if let Some((user, group)) = server_user().expect("a user") {
        chown(path, Some(user), Some(group)).expect("chown");
    }
}

/// Writes the files of a profile that assumes a role, and of a web identity, into `place`. Returns
/// the environment variables of the web identity, which assumes the same role.
fn roles(place: &Path) -> Vec<(&'static str, String)> {
    let keys = "[two]\naws_access_key_id = AKIATWO\naws_secret_access_key = secret-2\n";
    private_file(&place.join("credentials"), keys);
    let profile =
        format!("[profile role]\nrole_arn = {ROLE}\nsource_profile = two\nregion = eu-west-1\n");
    fs::write(place.join("config"), profile).expect("a file");
    let identity = place.join("identity");
    fs::write(&identity, "a-web-identity").expect("a file");
    vec![
        ("AWS_ROLE_ARN", ROLE.to_owned()),
        (
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            identity.display().to_string(),
        ),
        ("AWS_REGION", "eu-west-1".to_owned()),
    ]
}

#[test]
fn roles_are_assumed_with_a_profile_and_with_a_web_identity() {
    let stub = Stub::start();
    let place = directory().expect("a directory");
    let place = place.path();
    let web = roles(place);
    for (settings, environment, action, proof) in [
        (
            "s3_profile = \"role\"",
            vec![],
            "Action=AssumeRole&",
            "Credential=AKIATWO/",
        ),
        (
            "",
            web,
            "Action=AssumeRoleWithWebIdentity&",
            "WebIdentityToken=a-web-identity",
        ),
    ] {
        let seen = asked(&stub, place, settings, &environment);
        let sts = seen.iter().find(|request| request.contains(action));
        let sts = sts.unwrap_or_else(|| panic!("{action} in {seen:?}"));
        assert!(
            sts.contains(proof) && sts.contains("role%2Farchive"),
            "{sts}"
        );
        let request = listing(&seen);
        let key = format!("credential={}/", ROLE_KEY.to_lowercase());
        assert!(request.contains(&key), "{request}");
        assert!(
            request.contains(&format!("x-amz-security-token: {ROLE_TOKEN}")),
            "{request}"
        );
    }
}

/// The lifetime of credentials. The SDK renews them ten seconds before their end, so they are used
/// for a short time.
const LIFETIME: Duration = Duration::from_secs(12);

/// The credentials that a provider issued: the end of each key, and the number of requests that it
/// signed.
struct Given {
    /// The lifetime of the next key.
    lifetime: Duration,
    keys: BTreeMap<String, (Instant, usize)>,
    refused: usize,
}

/// Acts as STS and S3. Refuses an expired key as S3 does, and forwards all other requests to a
/// store without access control.
fn judge(given: &Mutex<Given>, asked: &Asked) -> Verdict {
    let mut given = given.lock().expect("no panic");
    let body = String::from_utf8_lossy(&asked.body);
    let key = format!("ASIA{}", given.keys.len());
    let lifetime = given.lifetime;
    let until = jiff::Timestamp::now() + lifetime;
    if let Some(answer) = role(&body, &key, &format!("{until:.0}")) {
        given.keys.insert(key, (Instant::now() + lifetime, 0));
        return Verdict::Say(answer);
    }
    let signed = asked.header("authorization").unwrap_or_default();
    let name = signed.split("Credential=").nth(1).unwrap_or_default();
    let name = name.split('/').next().unwrap_or_default();
    match given.keys.get_mut(name) {
        Some((until, signed)) if *until > Instant::now() => {
            *signed += 1;
            Verdict::PassUnsigned
        }
        known => {
            let code = if known.is_some() {
                "ExpiredToken"
            } else {
                "InvalidAccessKeyId"
            };
            given.refused += 1;
            Verdict::Fail(Fault::Refuse(400, code))
        }
    }
}

/// Credentials end repeatedly while the archiver streams, first at the announced time, then earlier
/// because they are withdrawn. Commits that wait for the bucket continue.
#[test]
fn a_running_archiver_outlives_its_credentials() {
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    let long = testbed::is_long();
    for by_profile in [false, true] {
        if by_profile && !long {
            continue;
        }
        let Some(store) = ObjectStoreServer::open_to_all_or_skip() else {
            return;
        };
        let proxy = BucketProxy::start(store.address()).expect("a proxy");
        let given = Arc::new(Mutex::new(Given {
            lifetime: LIFETIME,
            keys: BTreeMap::new(),
            refused: 0,
        }));
        let of_proxy = Arc::clone(&given);
        proxy.decide(move |asked| judge(&of_proxy, asked));
        let files = directory().expect("a directory");
        let web = roles(files.path());
        let mut environment = vec![
            ("AWS_ENDPOINT_URL_STS", proxy.endpoint()),
            (
                "AWS_CONFIG_FILE",
                files.path().join("config").display().to_string(),
            ),
            (
                "AWS_SHARED_CREDENTIALS_FILE",
                files.path().join("credentials").display().to_string(),
            ),
        ];
        let profile = if by_profile {
            "s3_profile = \"role\"\n"
        } else {
            ""
        };
        if !by_profile {
            environment.extend(web);
        }
        let settings = format!(
            "s3_endpoint = \"{}\"\n{profile}acknowledge = \"remote\"\n",
            proxy.endpoint()
        );
        let place = Place::in_bucket_behind(store, &settings).expect("a place");
        let place = place.with_environment(&environment);
        let cluster = Cluster::start(&bin, 1, "").expect("a server");
        let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("a daemon");
        let backup = place.back_up(&cluster.conninfo(), &[]);
        backup.expect("a backup");
        let mut client = cluster.connect().expect("a connection");
        let table = "CREATE TABLE t (n int)";
        client.batch_execute(table).expect("a table");
        cluster.wait_for_standbys("tidemark").expect("a setting");
        let mut commit = |count: i64| {
            for _ in 0..count {
                client
                    .batch_execute("INSERT INTO t VALUES (1)")
                    .expect("a commit");
                thread::sleep(Duration::from_millis(200));
            }
        };
        let began = Instant::now();
        let mut rows = 0;
        while began.elapsed() < if long { LIFETIME * 4 } else { LIFETIME / 2 } {
            commit(1);
            rows += 1;
        }
        let seen = |given: &Mutex<Given>| {
            let given = given.lock().expect("no panic");
            let used = given.keys.values().filter(|(_, signed)| *signed > 0);
            (used.count(), given.refused)
        };
        let (used, refused) = seen(&given);
        assert!(used >= 3, "{used} keys were used");
        assert_eq!(refused, 0, "each was renewed before its end");
        // The next credentials are valid for an hour and are withdrawn earlier. Only the bucket's
        // refusals show this.
        given.lock().expect("no panic").lifetime = LIFETIME * 300;
        commit(15);
        rows += 15;
        for (until, _) in given.lock().expect("no panic").keys.values_mut() {
            *until = Instant::now();
        }
        commit(5);
        rows += 5;
        let (after, refused) = seen(&given);
        eprintln!("{used} keys, {after} after the withdrawal, {refused} refusals, {rows} commits");
        assert!(refused > 0 && after > used, "{refused}, {after}");
        drop(client);
        cluster.stop().expect("it stops");
        daemon.stop().expect("everything is in the bucket");
        let restored = Restored::start::<&str>(&place, &bin, &[]).expect("a restore");
        let mut client = restored.connect().expect("a connection");
        let row = client.query_one("SELECT count(*) FROM t", &[]);
        assert_eq!(row.expect("a count").get::<_, i64>(0), rows);
    }
}
