//! The TLS files: root certificates, revocation lists, the client's certificate and key.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
    pem::{self, PemObject},
};

use crate::conninfo::{ClientFiles, RootCertificates};

/// Reads the trusted certificates. Returns `None` if there are none and none are needed.
pub(super) fn roots(
    roots: &RootCertificates,
    needed: bool,
) -> Result<Option<Vec<CertificateDer<'static>>>, String> {
    let missing = |path: &str| {
        format!(
            "there is no file of root certificates {path}; name it as sslrootcert, or use sslrootcert=system, or \
             sslmode=require to go without verification"
        )
    };
    match roots {
        RootCertificates::System => {
            let found = rustls_native_certs::load_native_certs();
            if found.certs.is_empty() {
                let errors: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
                return Err(format!(
                    "the operating system has no root certificates ({}); install ca-certificates",
                    errors.join(", ")
                ));
            }
            Ok(Some(found.certs))
        }
        RootCertificates::None if needed => Err(missing("in a home directory")),
        RootCertificates::None => Ok(None),
        RootCertificates::File { path, .. } => match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !needed => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(missing(&path.display().to_string()))
            }
            Err(error) => Err(format!("root certificates {}: {error}", path.display())),
            Ok(content) => certificates(&content, path).map(Some),
        },
    }
}

/// Returns all certificates of a PEM file, at least one.
fn certificates(content: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(content).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(format!("{} holds no PEM certificate", path.display())),
        Err(error) => Err(format!("{}: {}", path.display(), pem_problem(&error))),
    }
}

/// Reads the revocation lists of `sslcrl`.
pub(super) fn revocations(
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    let content =
        fs::read(path).map_err(|error| format!("revocation lists {}: {error}", path.display()))?;
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&content).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(format!("{} holds no PEM revocation list", path.display())),
        Err(error) => Err(format!("{}: {}", path.display(), pem_problem(&error))),
    }
}

/// Reads the client's certificates and key. Returns `None` if libpq's default files do not exist.
pub(super) fn client_identity(
    files: &ClientFiles,
) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>, String> {
    let content = match fs::read(&files.certificate) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !files.named => return Ok(None),
        Err(error) => {
            return Err(format!(
                "client certificate {}: {error}",
                files.certificate.display()
            ));
        }
    };
    let chain = certificates(&content, &files.certificate)?;
    Ok(Some((chain, private_key(&files.key)?)))
}

/// Reads the private key. A key that others can read is refused, as in libpq. Only a key owned by
/// root may be readable by a group.
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let shown = path.display();
    let metadata = fs::metadata(path).map_err(|error| {
        format!("private key {shown}: {error}; name the key of sslcert as sslkey")
    })?;
    if !metadata.is_file() {
        return Err(format!("private key {shown} is no plain file"));
    }
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.mode() & forbidden != 0 {
        return Err(format!(
            "private key {shown} can be read by others; chmod 0600 it (0640 or less if root owns it)"
        ));
    }
    let content = fs::read(path).map_err(|error| format!("private key {shown}: {error}"))?;
    PrivateKeyDer::from_pem_slice(&content).or_else(|error| {
        // libpq also accepts a key without the PEM wrapping.
        if let Ok(key) = PrivateKeyDer::try_from(content.clone()) {
            return Ok(key);
        }
        let encrypted = String::from_utf8_lossy(&content).contains("ENCRYPTED");
        Err(if encrypted {
            format!(
                "private key {shown} is encrypted, which is not supported; decrypt it with `openssl pkey -in {shown}` into \
                 a file of mode 0600"
            )
        } else {
            format!("private key {shown}: {}", pem_problem(&error))
        })
    })
}

/// Describes the error without showing the content, which may be a key.
fn pem_problem(error: &pem::Error) -> &'static str {
    match error {
        pem::Error::NoItemsFound => "holds nothing of this kind in PEM",
        _ => "is no sound PEM",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_that_others_can_read_is_refused_before_it_is_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("key");
        let problem = |content: &str, mode| {
            fs::write(&path, content).expect("a file");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
            private_key(&path).expect_err("it is no key")
        };
        for open in [0o644, 0o660, 0o604] {
            assert!(
                problem("S3CRET", open).contains("can be read by others"),
                "{open:o}"
            );
        }
        let nothing = problem("S3CRET", 0o600);
        assert!(
            nothing.contains("nothing of this kind") && !nothing.contains("S3CRET"),
            "{nothing}"
        );
        let encrypted =
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
        assert!(problem(encrypted, 0o600).contains("decrypt it"));
    }

    #[test]
    fn missing_roots_matter_only_when_they_are_needed() {
        let file = |named| RootCertificates::File {
            path: "/nonexistent/root.crt".into(),
            named,
        };
        assert_eq!(roots(&file(false), false), Ok(None));
        assert_eq!(roots(&file(true), false), Ok(None));
        let problem = roots(&file(false), true).expect_err("it is missing");
        assert!(problem.contains("sslrootcert=system"), "{problem}");
    }
}
