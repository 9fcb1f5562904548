//! HTTPS: `status` uses it, a certificate is replaced while the daemon serves, and its expiry is
//! reported in time.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::{
    certificates::private_file,
    support::{Place, Server, postgres_bin, succeed, wait_until},
};

/// Replaces the certificate by a self-signed one for `days`.
pub(super) fn certificate(directory: &Path, days: &str) {
    let output = Command::new("openssl")
        .current_dir(directory)
        .args([
            "req",
            "-x509",
            "-nodes",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-subj",
            "/CN=tidemark",
        ])
        .args(["-days", days, "-keyout", "new.key", "-out", "new.crt"])
        .output();
    succeed("openssl", &output.expect("openssl is installed"));
    for name in ["key", "crt"] {
        let new = directory.join(format!("new.{name}"));
        repository::durable::rename(&new, &directory.join(format!("http.{name}")))
            .expect("it is exchanged");
    }
}

/// Returns the fingerprint of the served certificate.
fn served(address: &str) -> String {
    let shown = Command::new("openssl")
        .args(["s_client", "-connect", address, "-showcerts"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .expect("openssl runs");
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    let begin = text
        .find("-----BEGIN CERTIFICATE")
        .unwrap_or_else(|| panic!("no certificate: {text}"));
    let end = text.find("-----END CERTIFICATE").expect("it ends");
    text[begin..end].to_owned()
}

#[test]
fn a_certificate_is_exchanged_while_it_serves_and_status_asks_over_https() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let directory = tempfile::tempdir().expect("a directory");
    certificate(directory.path(), "5");
    let token = directory.path().join("token");
    private_file(&token, "a-token-that-is-long-enough");
    let configuration = directory.path().join("tidemark.toml");
    let shown = |name: &str| directory.path().join(name).display().to_string();
    let with_tls = format!(
        "http_token_file = '{}'\nhttp_tls_certificate = '{}'\nhttp_tls_key = '{}'\n",
        token.display(),
        shown("http.crt"),
        shown("http.key")
    );
    fs::write(&configuration, &with_tls).expect("a configuration");
    let command = |configuration: &Path| {
        let mut command = place.command(&server.conninfo());
        command.arg("--config").arg(configuration);
        command
    };
    let archiver = place.run_with(command(&configuration));
    archiver.wait_for_log("INFO streaming");
    let address = archiver.address();
    succeed(
        "backup",
        &command(&configuration)
            .arg("backup")
            .output()
            .expect("it runs"),
    );

    let asking = directory.path().join("asking.toml");
    let ask = |text: &str, arguments: &[&str]| {
        fs::write(&asking, format!("http = '{address}'\n{text}")).expect("a configuration");
        let mut command = command(&asking);
        command
            .arg("status")
            .args(arguments)
            .output()
            .expect("it runs")
    };
    let alerts = || {
        let output = succeed("status", &ask(&with_tls, &["--json"]));
        let reports: Value = serde_json::from_str(&output).expect("JSON");
        let alerts = reports[0]["alerts"].as_array().cloned().unwrap_or_default();
        alerts
            .iter()
            .filter_map(|alert| alert["name"].as_str())
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    wait_until("its end is told", || alerts() == ["PitrCertificateExpiry"]);
    let first = served(&address);

    // Another certificate, with another key, for a longer time.
    certificate(directory.path(), "90");
    wait_until("the new one is served", || served(&address) != first);
    wait_until("nothing is wrong", || alerts().is_empty());
    let second = served(&address);

    // An invalid file leaves the served certificate in place.
    fs::write(directory.path().join("http.crt"), "no certificate").expect("it is written");
    archiver.wait_for_log("the old one stays");
    assert_eq!(served(&address), second);

    // A certificate other than the daemon's is not trusted, and a client without the token gets the
    // reason.
    certificate(directory.path(), "60");
    let other = tempfile::tempdir().expect("a directory");
    certificate(other.path(), "30");
    let foreign = with_tls.replace(
        &shown("http.crt"),
        &other.path().join("http.crt").display().to_string(),
    );
    let refused = String::from_utf8_lossy(&ask(&foreign, &[]).stderr).into_owned();
    assert!(refused.contains("another certificate"), "{refused}");
    let plain = String::from_utf8_lossy(&ask("", &[]).stderr).into_owned();
    assert!(plain.contains("ask the daemon"), "{plain}");
    let without_token = with_tls.lines().skip(1).collect::<Vec<_>>().join("\n");
    wait_until("the fourth is served", || {
        let refused = ask(&without_token, &[]);
        String::from_utf8_lossy(&refused.stderr).contains("401")
    });

    // A secret that every user of the host may read is refused, and the message names a remedy.
    for secret in [token, directory.path().join("http.key")] {
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).expect("chmod");
        for word in ["run", "check"] {
            let mut command = command(&configuration);
            let output = command.arg(word).output().expect("it runs");
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said).into_owned();
            assert_eq!(output.status.code(), Some(2), "{word}: {said}");
            let remedy = format!("`chmod 0600 {}`", secret.display());
            assert!(said.contains(&remedy), "{word}: {said}");
        }
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("chmod");
    }
    assert_eq!(archiver.terminate().code(), Some(0));
}
