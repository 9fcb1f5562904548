//! Who signs: every way that an AWS program finds its credentials, through our own program, against stubs of S3 and STS.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use benches::programs::{command, directory, ours};

/// What STS gives.
const ROLE_KEY: &str = "ASIAROLE";
const ROLE_TOKEN: &str = "token-of-the-role";

/// Answers S3's listings with nothing and STS with credentials; remembers everything.
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
                // A client that went away is no matter.
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
    let answer = match ["AssumeRoleWithWebIdentity", "AssumeRole"]
        .into_iter()
        .find(|action| request.contains(&format!("Action={action}&")))
    {
        Some(action) => format!(
            "<{action}Response><{action}Result><Credentials><AccessKeyId>{ROLE_KEY}</AccessKeyId>\
             <SecretAccessKey>secret</SecretAccessKey><SessionToken>{ROLE_TOKEN}</SessionToken>\
             <Expiration>2099-01-01T00:00:00Z</Expiration></Credentials><AssumedRoleUser><AssumedRoleId>r:s</AssumedRoleId>\
             <Arn>arn:aws:sts::1:assumed-role/r/s</Arn></AssumedRoleUser></{action}Result></{action}Response>"
        ),
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

/// Lists the repository with these settings and this environment; what the stub was asked.
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
    let role = "arn:aws:iam::1:role/archive";
    fs::write(
        place.join("credentials"),
        "[default]\naws_access_key_id = AKIADEFAULT\naws_secret_access_key = secret-d\n\
         [two]\naws_access_key_id = AKIATWO\naws_secret_access_key = secret-2\naws_session_token = token-two\n",
    )
    .expect("a file");
    fs::write(
        place.join("config"),
        format!(
            "[default]\nregion = eu-north-1\n[profile two]\nregion = eu-south-2\n\
             [profile role]\nrole_arn = {role}\nsource_profile = two\nregion = eu-west-1\n"
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

#[test]
fn roles_are_assumed_with_a_profile_and_with_a_web_identity() {
    let stub = Stub::start();
    let place = directory().expect("a directory");
    let place = place.path();
    let role = "arn:aws:iam::1:role/archive";
    fs::write(
        place.join("credentials"),
        "[two]\naws_access_key_id = AKIATWO\naws_secret_access_key = secret-2\n",
    )
    .expect("a file");
    let profile =
        format!("[profile role]\nrole_arn = {role}\nsource_profile = two\nregion = eu-west-1\n");
    fs::write(place.join("config"), profile).expect("a file");
    let identity = place.join("identity");
    fs::write(&identity, "a-web-identity").expect("a file");
    let web = vec![
        ("AWS_ROLE_ARN", role.to_owned()),
        (
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            identity.display().to_string(),
        ),
        ("AWS_REGION", "eu-west-1".to_owned()),
    ];
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
