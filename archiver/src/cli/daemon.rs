//! Queries the daemon of this configuration over HTTP or HTTPS, with the token and the certificate
//! from the configuration.
//!
//! The configuration names the certificate that the daemon uses. Exactly this certificate is
//! accepted, so that a loopback address needs neither a certificate authority nor a host name.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use repository::config::{ClusterSettings, Settings};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};
use serde_json::Value;

use super::output;
use crate::error::{Error, Result};

/// The timeout of a request. A daemon on this host answers from memory, so a longer wait means that
/// there is none.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The maximum size of an answer. A report on a hundred clusters is far smaller.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// Returns the reports of the daemon that archives these clusters to their repositories, if it
/// answers. A daemon that refuses the request, or runs with another configuration, is reported on
/// standard error.
pub(super) fn reports(settings: &Settings) -> Vec<Value> {
    match ask(settings) {
        Ok(reports) => of_these_clusters(settings, reports),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Vec::new(),
        Err(error) => {
            output::error_line(&format!("ask the daemon at {}: {error}", settings.http));
            Vec::new()
        }
    }
}

/// Fails if no daemon at `settings.http` archives the cluster to its repository.
pub(super) fn require(settings: &Settings, cluster: &ClusterSettings) -> Result<()> {
    let is_archived = |report: &Value| report["cluster"] == cluster.name.as_str();
    if reports(settings).iter().any(is_archived) {
        return Ok(());
    }
    Err(Error::NoDaemon {
        cluster: cluster.name.clone(),
        address: settings.http,
    })
}

/// Keeps only the reports on the clusters in `settings`. A daemon with another configuration may
/// have a cluster of the same name, and its report does not apply.
fn of_these_clusters(settings: &Settings, mut reports: Vec<Value>) -> Vec<Value> {
    reports.retain(|report| {
        let mut clusters = settings.clusters.iter();
        let Some(cluster) = clusters.find(|known| report["cluster"] == known.name.as_str()) else {
            return false;
        };
        let repository = cluster.repository.to_string();
        let is_same = report["repository"] == repository;
        if !is_same {
            output::error_line(&format!(
                "the daemon at {} archives cluster {} to {}, not to {repository}: it runs with another configuration, \
                 and its status is not shown. Set `http` to the address of the daemon of this configuration",
                settings.http,
                cluster.name,
                report["repository"].as_str().unwrap_or("an unknown repository"),
            ));
        }
        is_same
    });
    reports
}

fn ask(settings: &Settings) -> io::Result<Vec<Value>> {
    let address: SocketAddr = settings.http;
    let access = &settings.http_access;
    let stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let token = access.read.as_ref().or(access.operate.as_ref());
    let authorization = token.map_or_else(String::new, |token| {
        format!("Authorization: Bearer {}\r\n", token.reveal())
    });
    let request = format!(
        "GET /api/v1/clusters HTTP/1.1\r\nHost: {address}\r\n{authorization}Connection: close\r\n\r\n"
    );
    let answer = match &access.tls {
        None => converse(stream, &request)?,
        Some((certificate, _)) => {
            let config = trusting(certificate)?;
            let name = ServerName::IpAddress(address.ip().into());
            let connection =
                ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
            converse(StreamOwned::new(connection, stream), &request)?
        }
    };
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| io::Error::other("it answers with something that is not HTTP"))?;
    if !head.starts_with("HTTP/1.1 200") {
        let status = head.lines().next().unwrap_or_default();
        return Err(io::Error::other(format!(
            "it answers \"{status}\"; is this its configuration, with http_token_file?"
        )));
    }
    Ok(serde_json::from_str(body)?)
}

fn converse(mut stream: impl Read + Write, request: &str) -> io::Result<String> {
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    match stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer) {
        // A server may close without TLS's close_notify. A truncated body is not valid JSON.
        Err(error) if error.kind() != ErrorKind::UnexpectedEof => return Err(error),
        _ => {}
    }
    String::from_utf8(answer).map_err(io::Error::other)
}

/// Returns a TLS configuration that accepts only the certificate in this file.
fn trusting(certificate: &Path) -> io::Result<ClientConfig> {
    let expected = CertificateDer::from_pem_file(certificate)
        .map_err(|error| io::Error::other(format!("{}: {error}", certificate.display())))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Arc::new(Pinned {
        expected,
        provider: Arc::clone(&provider),
    });
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth())
}

#[derive(Debug)]
struct Pinned {
    expected: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if *end_entity == self.expected {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::General(
                "it serves another certificate than http_tls_certificate".to_owned(),
            ))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let known = &self.provider.signature_verification_algorithms;
        known.supported_schemes()
    }
}
