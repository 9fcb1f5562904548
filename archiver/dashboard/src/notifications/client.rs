//! Posts a JSON document over HTTP or HTTPS. Also opens the connections for SMTP.

use std::{io, sync::Arc};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Uri, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use repository::config::NotifyTarget;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::error::NotifyError;

/// A plain or encrypted connection.
pub(super) trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

pub(super) fn io(what: &'static str) -> impl Fn(io::Error) -> NotifyError {
    move |source| NotifyError::Io { what, source }
}

/// Posts `document`. Any 2xx answer is success.
pub(super) async fn post(
    target: &NotifyTarget,
    document: &serde_json::Value,
) -> Result<(), NotifyError> {
    let settings = |text: &str| NotifyError::Settings(format!("[notify.{}]: {text}", target.name));
    let url: Uri = target
        .url
        .reveal()
        .parse()
        .map_err(|_| settings("url is no URL"))?;
    let host = url.host().ok_or_else(|| settings("url has no host"))?;
    let tls = match url.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(settings("url begins with neither https:// nor http://")),
    };
    let port = url.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let plain = host.trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((plain, port))
        .await
        .map_err(io("connect"))?;
    let stream: Box<dyn Connection> = if tls {
        Box::new(encrypt(target, plain, stream).await?)
    } else {
        Box::new(stream)
    };
    let refused = |error: hyper::Error| NotifyError::Io {
        what: "send the request",
        source: io::Error::other(error),
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(refused)?;
    let connection = tokio::spawn(connection);
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::post(path)
        .header(header::HOST, format!("{host}:{port}"))
        .header(header::CONTENT_TYPE, "application/json")
        .header(
            header::USER_AGENT,
            concat!("tidemark/", env!("CARGO_PKG_VERSION")),
        )
        .body(Full::new(Bytes::from(document.to_string())))
        .map_err(|_| settings("url cannot be asked for"))?;
    let answer = sender.send_request(request).await.map_err(refused);
    connection.abort();
    let status = answer?.status();
    if status.is_success() {
        return Ok(());
    }
    Err(NotifyError::Refused {
        what: "the request",
        answer: status.to_string(),
    })
}

/// Starts TLS and verifies the receiver's certificate with the configured authority or the
/// system's.
pub(super) async fn encrypt<S: Connection>(
    target: &NotifyTarget,
    host: &str,
    stream: S,
) -> Result<tokio_rustls::client::TlsStream<S>, NotifyError> {
    let mut roots = RootCertStore::empty();
    if let Some(path) = &target.certificate_authority {
        let bad = |error: &dyn std::fmt::Display| {
            NotifyError::Settings(format!("read {}: {error}", path.display()))
        };
        for certificate in CertificateDer::pem_file_iter(path).map_err(|error| bad(&error))? {
            let certificate = certificate.map_err(|error| bad(&error))?;
            roots.add(certificate).map_err(|error| bad(&error))?;
        }
    } else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| NotifyError::Settings(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| NotifyError::Settings(format!("\"{host}\" is no host name")))?;
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .map_err(io("begin TLS"))
}
