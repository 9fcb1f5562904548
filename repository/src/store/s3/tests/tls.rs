//! A store with a private certificate authority is trusted if and only if that authority is
//! configured.

use std::{path::Path, process::Command};

use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use super::{
    fault_server::{Answer, FaultServer},
    *,
};

fn openssl(folder: &Path, arguments: &str) {
    let output = Command::new("openssl")
        .args(arguments.split(' '))
        .current_dir(folder)
        .output()
        .expect("openssl is installed");
    assert!(output.status.success(), "openssl {arguments}: {output:?}");
}

#[test]
fn an_authority_is_believed_when_it_is_named() {
    let folder = tempfile::tempdir().expect("a directory");
    let folder = folder.path();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    for authority in ["ca", "other"] {
        openssl(
            folder,
            &format!(
                "req -x509 {key} -keyout {authority}.key -out {authority}.pem -days 2 -subj /CN={authority}"
            ),
        );
    }
    openssl(
        folder,
        &format!("req {key} -keyout server.key -out server.csr -subj /CN=store"),
    );
    std::fs::write(folder.join("names"), "subjectAltName=IP:127.0.0.1\n").expect("a file");
    openssl(
        folder,
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.pem",
    );
    let certificate =
        CertificateDer::from_pem_file(folder.join("server.pem")).expect("a certificate");
    let key = PrivateKeyDer::from_pem_file(folder.join("server.key")).expect("a key");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .expect("a configuration");
    let server = FaultServer::start_with(Some(Arc::new(tls)), |_| Answer::ok(b"body"));
    let open = |ca_file: Option<&str>| {
        let settings = S3Settings {
            ca_file: ca_file.map(|name| folder.join(name)),
            ..settings(&server.endpoint())
        };
        S3Store::without_retries("bucket", "p", &settings)
    };
    let store = open(Some("ca.pem")).expect("a store");
    assert_eq!(store.get("a/key").expect("a get"), b"body"[..]);
    for ca_file in [None, Some("other.pem")] {
        let error = open(ca_file).expect("a store").get("a/key");
        let error = error.expect_err("a stranger");
        assert!(!error.is_not_found(), "{error}");
        assert!(error.to_string().contains("s3_ca_file"), "{error}");
        assert!(
            error.to_string().contains("does not know signed"),
            "{error}"
        );
    }
    let by_name = S3Settings {
        ca_file: Some(folder.join("ca.pem")),
        ..settings(&server.endpoint().replace("127.0.0.1", "localhost"))
    };
    let store = S3Store::without_retries("bucket", "p", &by_name).expect("a store");
    let error = store
        .get("a/key")
        .expect_err("the certificate has no such name");
    let said = error.to_string();
    assert!(
        said.contains("certificate is for another host name"),
        "{said}"
    );
    assert_eq!(
        said.matches("invalid peer certificate").count(),
        1,
        "{said}"
    );
    // The error about a wrong scheme or a wrong port names the remedy.
    let plain = FaultServer::start(|_| Answer::ok(b"body"));
    let nowhere = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.local_addr().expect("an address")
    };
    for (endpoint, remedy) in [
        (plain.endpoint().replace("http:", "https:"), "write http://"),
        (
            server.endpoint().replace("https:", "http:"),
            "write https://",
        ),
        (
            format!("http://{nowhere}"),
            "nothing listens at s3_endpoint",
        ),
    ] {
        let store = S3Store::without_retries("bucket", "p", &settings(&endpoint));
        let error = store.expect("a store").get("a/key").expect_err(&endpoint);
        assert!(error.to_string().contains(remedy), "{endpoint}: {error}");
    }
    // A file without a certificate is reported immediately.
    let error = open(Some("ca.key")).expect_err("a key is no certificate");
    assert!(
        error.to_string().contains("it holds no certificate"),
        "{error}"
    );
}
