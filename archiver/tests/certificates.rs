//! Certificates for a server and its clients, created with the `openssl` command as an
//! administrator would.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::support::{owned_dir, server_user, succeed};

const EC_KEY: [&str; 4] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];

/// A directory of certificates, removed when dropped.
pub(crate) struct Certificates {
    dir: TempDir,
}

impl Certificates {
    pub(crate) fn make() -> Self {
        let made = Self { dir: owned_dir() };
        for authority in ["ca", "other"] {
            made.self_signed(authority, &format!("/CN=authority {authority}"), &EC_KEY);
        }
        let localhost = "subjectAltName=DNS:localhost,DNS:db.example";
        made.signed("server", "/CN=whatever", "ca", &[], Some(localhost));
        made.signed(
            "elsewhere",
            "/CN=localhost",
            "ca",
            &[],
            Some("subjectAltName=DNS:elsewhere.example"),
        );
        made.signed(
            "wild",
            "/CN=x",
            "ca",
            &["-sha512"],
            Some("subjectAltName=DNS:*.example,IP:127.0.0.1"),
        );
        // As in PostgreSQL's manual: only a common name, and X.509 version 1.
        made.signed("common", "/CN=localhost", "ca", &["-sha384"], None);
        made.signed(
            "expired",
            "/CN=localhost",
            "ca",
            &["-days", "-1"],
            Some(localhost),
        );
        made.signed("expired1", "/CN=localhost", "ca", &["-days", "-1"], None);
        made.signed("stranger1", "/CN=localhost", "other", &[], None);
        made.signed("client", "/CN=u_cert", "ca", &[], None);
        made.signed("stranger", "/CN=u_cert", "other", &[], None);
        made.self_signed("self", "/CN=localhost", &EC_KEY);
        made.self_signed("ed25519", "/CN=localhost", &["-newkey", "ed25519"]);
        made.self_signed(
            "pss",
            "/CN=localhost",
            &[
                "-newkey",
                "rsa:2048",
                "-sigopt",
                "rsa_padding_mode:pss",
                "-sha384",
            ],
        );
        made.openssl(&[
            "pkey",
            "-in",
            "client.key",
            "-outform",
            "DER",
            "-out",
            "client.der",
        ]);
        made.give_away("client.der");
        made.revocations();
        made
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns a path in the form that conninfo needs.
    pub(crate) fn shown(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn openssl(&self, arguments: &[&str]) {
        let output = Command::new("openssl")
            .current_dir(self.dir.path())
            .args(arguments)
            .output()
            .expect("openssl is installed");
        succeed(&format!("openssl {arguments:?}"), &output);
    }

    fn self_signed(&self, name: &str, subject: &str, key: &[&str]) {
        let (certificate, private) = (format!("{name}.crt"), format!("{name}.key"));
        let common = ["req", "-x509", "-nodes", "-days", "30", "-subj", subject];
        let files = ["-keyout", private.as_str(), "-out", certificate.as_str()];
        self.openssl(&[&common[..], key, &files].concat());
        self.give_away(&private);
    }

    fn signed(
        &self,
        name: &str,
        subject: &str,
        authority: &str,
        more: &[&str],
        extension: Option<&str>,
    ) {
        let [certificate, private, request, extensions] =
            ["crt", "key", "csr", "ext"].map(|kind| format!("{name}.{kind}"));
        let common = ["req", "-new", "-nodes", "-subj", subject];
        let files = ["-keyout", private.as_str(), "-out", request.as_str()];
        self.openssl(&[&common[..], &EC_KEY, &files].concat());
        let (ca, ca_key) = (format!("{authority}.crt"), format!("{authority}.key"));
        let mut sign = vec![
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-out",
            &certificate,
        ];
        if let Some(extension) = extension {
            fs::write(self.path(&extensions), extension).expect("a file");
            sign.extend(["-extfile", &extensions]);
        }
        if !more.contains(&"-days") {
            sign.extend(["-days", "30"]);
        }
        sign.extend(more);
        self.openssl(&sign);
        self.give_away(&private);
    }

    /// Creates an empty revocation list, and one with the server's certificate.
    fn revocations(&self) {
        fs::write(self.path("index.txt"), "").expect("a file");
        fs::write(self.path("crlnumber"), "01\n").expect("a file");
        fs::write(
            self.path("ca.cnf"),
            "[ca]\ndefault_ca=us\n[us]\ndatabase=index.txt\ncrlnumber=crlnumber\ndefault_md=sha256\ndefault_crl_days=30\n",
        )
        .expect("a file");
        let ca = [
            "ca", "-config", "ca.cnf", "-keyfile", "ca.key", "-cert", "ca.crt",
        ];
        self.openssl(&[&ca[..], &["-gencrl", "-out", "none.crl"]].concat());
        self.openssl(&[&ca[..], &["-revoke", "server.crt"]].concat());
        self.openssl(&[&ca[..], &["-gencrl", "-out", "revoked.crl"]].concat());
    }

    /// Makes a key readable by the server's user only.
    fn give_away(&self, key: &str) {
        let path = self.path(key);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
        if let Some((user, group)) = server_user() {
            chown(&path, Some(user), Some(group)).expect("chown");
        }
    }
}

/// Creates a file that others cannot read.
pub(crate) fn private_file(path: &Path, content: &str) {
    fs::write(path, content).expect("a file");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("chmod");
}
