//! X.509 version 1 certificates, which webpki does not read and libpq accepts.
//!
//! `openssl x509 -req` creates them by default, also with the commands in PostgreSQL's manual. Such
//! a certificate is accepted only if a root certificate itself signed it: version 1 cannot express
//! who may sign others.

use rustls::{
    CertificateError,
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{AlgorithmIdentifier, CertificateDer, SubjectPublicKeyInfoDer, UnixTime},
};
use x509_cert::{
    Certificate, Version,
    der::{Decode, Encode},
    spki::AlgorithmIdentifierOwned,
};

use super::certificate::{Validity, validity};

/// Parses the certificate, if it has version 1.
fn parse(der: &[u8]) -> Option<Certificate> {
    let certificate = Certificate::from_der(der).ok()?;
    (certificate.tbs_certificate().version() == Version::V1).then_some(certificate)
}

/// Returns the certificate's public key, if it has version 1.
pub(super) fn key(der: &[u8]) -> Option<SubjectPublicKeyInfoDer<'static>> {
    let certificate = parse(der)?;
    let key = certificate.tbs_certificate().subject_public_key_info();
    Some(SubjectPublicKeyInfoDer::from(key.to_der().ok()?))
}

/// Checks that a root signed the certificate and that both are valid now. Returns `None` for
/// another version.
pub(super) fn verify(
    der: &CertificateDer<'_>,
    roots: &[CertificateDer<'_>],
    algorithms: &WebPkiSupportedAlgorithms,
    now: UnixTime,
) -> Option<Result<(), CertificateError>> {
    let certificate = parse(der)?;
    let signed_by = |root: &&CertificateDer<'_>| {
        Certificate::from_der(root).is_ok_and(|root| is_signed_by(&certificate, &root, algorithms))
    };
    let Some(root) = roots.iter().find(signed_by) else {
        return Some(Err(CertificateError::UnknownIssuer));
    };
    let valid = [der, root].map(|certificate| match validity(certificate, now) {
        Some(Validity::Now) => Ok(()),
        Some(Validity::Past) => Err(CertificateError::Expired),
        Some(Validity::Future) => Err(CertificateError::NotValidYet),
        None => Err(CertificateError::BadEncoding),
    });
    Some(valid.into_iter().collect())
}

fn is_signed_by(
    certificate: &Certificate,
    root: &Certificate,
    algorithms: &WebPkiSupportedAlgorithms,
) -> bool {
    let (tbs, root) = (certificate.tbs_certificate(), root.tbs_certificate());
    let key = root.subject_public_key_info();
    let parts = (
        tbs.to_der(),
        key.subject_public_key.as_bytes(),
        certificate.signature().as_bytes(),
    );
    let (Ok(message), Some(public_key), Some(signature)) = parts else {
        return false;
    };
    // The signed part also names the algorithm. A difference is a forgery.
    tbs.issuer() == root.subject()
        && tbs.signature() == certificate.signature_algorithm()
        && algorithms.all.iter().any(|algorithm| {
            is_same(
                algorithm.signature_alg_id(),
                certificate.signature_algorithm(),
            ) && is_same(algorithm.public_key_alg_id(), &key.algorithm)
                && algorithm
                    .verify_signature(public_key, &message, signature)
                    .is_ok()
        })
}

/// Compares two algorithm identifiers. rustls stores the content of the SEQUENCE without its tag
/// and length.
fn is_same(known: AlgorithmIdentifier, found: &AlgorithmIdentifierOwned) -> bool {
    found.to_der().is_ok_and(|der| {
        der.get(2..) == Some(known.as_ref()) && usize::from(der[1]) == der.len() - 2
    })
}
