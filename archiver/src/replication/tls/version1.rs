//! Certificates of X.509 version 1, which webpki does not read and libpq takes.
//!
//! `openssl x509 -req` makes them unless it is told otherwise, also by the commands in PostgreSQL's manual. Such a
//! certificate is believed only when a root certificate itself signed it: version 1 can not say who may sign others.

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

/// The certificate, if it is of version 1.
fn parse(der: &[u8]) -> Option<Certificate> {
    let certificate = Certificate::from_der(der).ok()?;
    (certificate.tbs_certificate().version() == Version::V1).then_some(certificate)
}

/// Its public key, if it is of version 1.
pub(super) fn key(der: &[u8]) -> Option<SubjectPublicKeyInfoDer<'static>> {
    let certificate = parse(der)?;
    let key = certificate.tbs_certificate().subject_public_key_info();
    Some(SubjectPublicKeyInfoDer::from(key.to_der().ok()?))
}

/// Whether a root signed it, and both are valid now. `None` when it is of another version.
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
    // What is signed names its algorithm too; a difference is a forgery.
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

/// rustls keeps what is inside of the SEQUENCE.
fn is_same(known: AlgorithmIdentifier, found: &AlgorithmIdentifierOwned) -> bool {
    found.to_der().is_ok_and(|der| {
        der.get(2..) == Some(known.as_ref()) && usize::from(der[1]) == der.len() - 2
    })
}
