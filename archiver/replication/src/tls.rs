//! TLS with rustls and libpq's rules for certificates.
//!
//! Invariant: nothing is trusted that libpq would not trust with the same `sslmode` and files. An
//! existing root certificate file is used in every mode, so `require` with such a file means
//! `verify-ca`.

mod certificate;
mod files;
mod verifier;
mod version1;

use std::sync::Arc;

use rustls::{
    ClientConfig, SupportedProtocolVersion,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{IpAddr, ServerName},
    sign::{CertifiedKey, SingleCertAndKey},
    version::{TLS12, TLS13},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    Error, Result,
    conninfo::{Host, SslMode, TlsSettings, TlsVersion},
    tls_error::explain,
};

/// The protocol's ALPN name, which `sslnegotiation=direct` requires.
const ALPN: &[u8] = b"postgresql";

pub(super) struct Secured<S> {
    pub(super) stream: TlsStream<S>,
    /// The hash of the server's certificate (`tls-server-end-point`), if its signature algorithm
    /// has one.
    pub(super) end_point: Option<Vec<u8>>,
    pub(super) version: &'static str,
}

/// Encrypts a stream to a server that has agreed to TLS.
pub(super) async fn secure<S: AsyncRead + AsyncWrite + Unpin>(
    settings: &TlsSettings,
    host: &Host,
    stream: S,
) -> Result<Secured<S>> {
    let place = host.to_string();
    let failed = |problem: String| Error::Tls {
        place: place.clone(),
        problem,
    };
    let config = config(settings, host).map_err(failed)?;
    let stream = TlsConnector::from(Arc::new(config))
        .connect(server_name(host).map_err(failed)?, stream)
        .await
        .map_err(|error| match explain(&error) {
            Some(problem) => failed(problem),
            None => Error::of_io(&place, error),
        })?;
    let (_, session) = stream.get_ref();
    if settings.direct && session.alpn_protocol() != Some(ALPN) {
        return Err(failed(
            "the server does not know sslnegotiation=direct, which needs PostgreSQL 17".to_owned(),
        ));
    }
    let end_point = session
        .peer_certificates()
        .and_then(|chain| certificate::end_point_hash(chain.first()?));
    let version = match session.protocol_version() {
        Some(rustls::ProtocolVersion::TLSv1_2) => "TLSv1.2",
        _ => "TLSv1.3",
    };
    Ok(Secured {
        stream,
        end_point,
        version,
    })
}

fn config(settings: &TlsSettings, host: &Host) -> Result<ClientConfig, String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = verifier(settings, host, &provider)?;
    let versions: Vec<&'static SupportedProtocolVersion> =
        [(TlsVersion::V1_2, &TLS12), (TlsVersion::V1_3, &TLS13)]
            .into_iter()
            .filter(|(version, _)| (settings.min_version..=settings.max_version).contains(version))
            .map(|(_, version)| version)
            .collect();
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&versions)
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let identity = settings
        .certificate
        .as_ref()
        .map_or(Ok(None), files::client_identity)?;
    let mut config = match identity {
        Some((chain, key)) => {
            let key = provider
                .key_provider
                .load_private_key(key)
                .map_err(|error| format!("the private key (sslkey) cannot be used: {error}"))?;
            let is_ours = chain.first().zip(key.public_key());
            if !is_ours.is_some_and(|(ours, key)| certificate::belongs_to(ours, &key)) {
                return Err(
                    "the private key (sslkey) does not belong to the certificate (sslcert)"
                        .to_owned(),
                );
            }
            let certified = SingleCertAndKey::from(CertifiedKey::new(chain, key));
            builder.with_client_cert_resolver(Arc::new(certified))
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = settings.sni;
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Creates the verifier for the server's certificate.
fn verifier(
    settings: &TlsSettings,
    host: &Host,
    provider: &Arc<CryptoProvider>,
) -> Result<verifier::Verifier, String> {
    let roots = files::roots(&settings.roots, settings.mode >= SslMode::VerifyCa)?;
    let name = match settings.mode {
        SslMode::VerifyFull if host.name.is_empty() => {
            return Err(
                "sslmode=verify-full needs the server's name: give host together with hostaddr"
                    .to_owned(),
            );
        }
        SslMode::VerifyFull => Some(host.name.clone()),
        _ => None,
    };
    let revocations = match &settings.revocations {
        Some(path) if roots.is_some() => files::revocations(path)?,
        _ => Vec::new(),
    };
    verifier::Verifier::new(Arc::clone(provider), roots, revocations, name)
}

/// The name for SNI. rustls always requires one, but an IP address is never sent.
fn server_name(host: &Host) -> Result<ServerName<'static>, String> {
    if let Ok(name) = ServerName::try_from(host.name.clone()) {
        return Ok(name);
    }
    let address = host
        .address
        .map(|address| ServerName::IpAddress(IpAddr::from(address)));
    address.ok_or_else(|| "the host is no name that TLS could check".to_owned())
}
