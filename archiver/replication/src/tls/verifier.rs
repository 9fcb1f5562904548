//! [`Verifier`]: verifies a server's certificate.
//!
//! webpki verifies the chain, and this module verifies the name: libpq's `verify-ca` does not check
//! it, and libpq's rules differ from webpki's.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        CryptoProvider, verify_tls12_signature, verify_tls13_signature,
        verify_tls13_signature_with_raw_key,
    },
    pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime},
};

use super::{
    certificate::{Names, Validity, validity},
    version1,
};

/// Verifies according to `sslmode` and the root certificates.
#[derive(Debug)]
pub(super) struct Verifier {
    provider: Arc<CryptoProvider>,
    chain: Option<Chain>,
    /// The name that the certificate must have, for `verify-full`.
    name: Option<String>,
}

#[derive(Debug)]
struct Chain {
    webpki: Arc<WebPkiServerVerifier>,
    /// PostgreSQL's instructions create a self-signed server certificate that is its own root.
    /// webpki does not accept a certificate authority as a server, so such a certificate is
    /// compared.
    roots: Vec<CertificateDer<'static>>,
    /// Revocation lists were given, which only webpki reads.
    has_revocations: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    /// Without root certificates every certificate is accepted, as libpq does up to `require`.
    pub(super) fn new(
        provider: Arc<CryptoProvider>,
        roots: Option<Vec<CertificateDer<'static>>>,
        revocations: Vec<CertificateRevocationListDer<'static>>,
        name: Option<String>,
    ) -> Result<Self, String> {
        let chain = match roots {
            None => None,
            Some(roots) => {
                let has_revocations = !revocations.is_empty();
                let mut store = RootCertStore::empty();
                let (added, _) = store.add_parsable_certificates(roots.iter().cloned());
                if added == 0 {
                    return Err("sslrootcert holds no certificate that can be read".to_owned());
                }
                let webpki = WebPkiServerVerifier::builder_with_provider(
                    Arc::new(store),
                    Arc::clone(&provider),
                )
                .with_crls(revocations)
                .build()
                .map_err(|error| format!("sslrootcert or sslcrl cannot be used: {error} (revocation lists are read in version 2: openssl ca needs a crlnumber)"))?;
                Some(Chain {
                    webpki,
                    roots,
                    has_revocations,
                    provider: Arc::clone(&provider),
                })
            }
        };
        Ok(Self {
            provider,
            chain,
            name,
        })
    }
}

impl Chain {
    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        if self.roots.iter().any(|root| root == end_entity) {
            return match validity(end_entity, now) {
                Some(Validity::Now) => Ok(()),
                Some(Validity::Past) => Err(CertificateError::Expired.into()),
                Some(Validity::Future) => Err(CertificateError::NotValidYet.into()),
                None => Err(CertificateError::BadEncoding.into()),
            };
        }
        let algorithms = &self.provider.signature_verification_algorithms;
        if let Some(verdict) = version1::verify(end_entity, &self.roots, algorithms, now) {
            if self.has_revocations {
                return Err(CertificateError::UnknownRevocationStatus.into());
            }
            return Ok(verdict?);
        }
        let verified =
            self.webpki
                .verify_server_cert(end_entity, intermediates, server_name, &[], now);
        match verified {
            // webpki checks the name last, after it has accepted the chain.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            ))
            | Ok(_) => Ok(()),
            // A self-signed certificate that is not one of the roots.
            Err(Error::InvalidCertificate(CertificateError::Other(error)))
                if error.to_string().contains("CaUsedAsEndEntity") =>
            {
                Err(CertificateError::UnknownIssuer.into())
            }
            Err(error) => Err(error),
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(chain) = &self.chain {
            chain.verify(end_entity, intermediates, server_name, now)?;
        }
        if let Some(host) = &self.name {
            let names = Names::of(end_entity).ok_or(CertificateError::BadEncoding)?;
            if !names.fit(host) {
                return Err(CertificateError::NotValidForNameContext {
                    expected: server_name.to_owned(),
                    presented: names.shown(),
                }
                .into());
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        match version1::key(certificate) {
            Some(key) => verify_tls13_signature_with_raw_key(message, &key, signature, algorithms),
            None => verify_tls13_signature(message, certificate, signature, algorithms),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
