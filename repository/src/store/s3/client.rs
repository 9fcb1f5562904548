//! Creates the S3 client: credentials, trusted certificates, timeouts.
//!
//! Settings that are not configured come from AWS's standard places: environment, profile files
//! with assumed roles, web identity, container and instance roles.

use std::{
    path::Path,
    sync::{MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aws_config::{
    BehaviorVersion, ConfigLoader, Region,
    environment::EnvironmentVariableRegionProvider,
    meta::region::RegionProviderChain,
    profile::{ProfileFileCredentialsProvider, ProfileFileRegionProvider},
};
use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};
use aws_sdk_s3::{
    Client,
    config::{
        Credentials, RequestChecksumCalculation, ResponseChecksumValidation, SharedHttpClient,
        retry::RetryConfig, timeout::TimeoutConfig,
    },
};
use aws_smithy_http_client::{
    Builder, Connector,
    proxy::ProxyConfig,
    tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode},
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tokio::runtime::Runtime;

use super::{S3Store, errors::Failure};
use crate::{
    Error, Result,
    config::{S3Credentials, S3Settings, denied, require_private},
};

const CONNECT_MAX: Duration = Duration::from_secs(5);
/// The time from the last byte sent to the first byte of the answer. Completing a large upload
/// takes a store some time.
const READ_MAX: Duration = Duration::from_secs(60);
/// The minimum interval between two reads of credentials that the store rejects.
const RENEWAL_MIN: Duration = Duration::from_secs(2);
/// The region to sign requests for where regions have no meaning.
const REGION_OF_ENDPOINTS: &str = "us-east-1";

/// A client, and the time at which its credentials were read.
#[derive(Debug)]
pub(super) struct Signer {
    client: Client,
    made: Instant,
}

impl Signer {
    pub(super) fn new(runtime: &Runtime, settings: &S3Settings) -> Result<Self> {
        let client = connect(runtime, settings)?;
        let made = Instant::now();
        Ok(Self { client, made })
    }
}

impl S3Store {
    pub(super) fn client(&self) -> Client {
        self.signer().client.clone()
    }

    fn signer(&self) -> MutexGuard<'_, Signer> {
        self.signer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the credentials again, because they may have been replaced since they were read. If
    /// they were not read very recently, the request is worth a retry. The SDK itself renews
    /// credentials with a known expiry in time.
    pub(super) fn with_new_credentials(&self, failure: Failure) -> Failure {
        let can_change = !matches!(self.settings.credentials, S3Credentials::Keys { .. });
        if !can_change || !failure.is_about_credentials() {
            return failure;
        }
        let mut signer = self.signer();
        let Some(runtime) = &self.runtime else {
            return failure;
        };
        if signer.made.elapsed() < RENEWAL_MIN {
            return failure;
        }
        match Signer::new(runtime, &self.settings) {
            Ok(renewed) => {
                tracing::info!(?failure, "the credentials of S3 are read again");
                *signer = renewed;
                failure.passing()
            }
            Err(error) => {
                tracing::warn!(%error, "the credentials of S3 cannot be read again");
                failure
            }
        }
    }
}

fn connect(runtime: &Runtime, settings: &S3Settings) -> Result<Client> {
    if let S3Credentials::File(path) = &settings.credentials {
        let opened = std::fs::File::open(path).map_err(|error| denied(path, &error));
        let usable = opened.and_then(|_| require_private(path));
        usable.map_err(|problem| {
            Error::config(format!(
                "s3_credentials_file = \"{}\": {problem}",
                path.display()
            ))
        })?;
    }
    let http = http_client(settings)?;
    let shared = runtime.block_on_anywhere(load(settings, http))?;
    let region = shared.region().cloned();
    if region.is_none() && settings.endpoint.is_none() && shared.endpoint_url().is_none() {
        return Err(Error::config(
            "no region for S3: set s3_region or AWS_REGION, or s3_endpoint for a store that is not AWS's",
        ));
    }
    let config = aws_sdk_s3::config::Builder::from(&shared)
        .region(region.unwrap_or(Region::from_static(REGION_OF_ENDPOINTS)))
        .force_path_style(settings.path_style || shared.endpoint_url().is_some())
        // We send and compare our own checksums. Stores without checksums get none.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .build();
    Ok(Client::from_conf(config))
}

async fn load(settings: &S3Settings, http: SharedHttpClient) -> aws_config::SdkConfig {
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(CONNECT_MAX)
        .read_timeout(READ_MAX)
        .build();
    let mut loader: ConfigLoader = aws_config::defaults(BehaviorVersion::v2026_01_12())
        .http_client(http)
        .timeout_config(timeouts)
        .retry_config(RetryConfig::disabled());
    if let Some(endpoint) = &settings.endpoint {
        loader = loader.endpoint_url(endpoint.trim_end_matches('/'));
    }
    if let Some(region) = &settings.region {
        loader = loader.region(Region::new(region.clone()));
    } else if settings.endpoint.is_some() {
        // Not the whole provider chain: its last step asks the cloud's metadata address, which does
        // not answer for other stores.
        let mut profile = ProfileFileRegionProvider::builder();
        if let Some(name) = &settings.profile {
            profile = profile.profile_name(name);
        }
        loader = loader.region(
            RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
                .or_else(profile.build())
                .or_else(Region::from_static(REGION_OF_ENDPOINTS)),
        );
    }
    if let Some(profile) = &settings.profile {
        loader = loader.profile_name(profile);
    }
    match &settings.credentials {
        S3Credentials::Standard => {}
        S3Credentials::Keys {
            access_key,
            secret_key,
            session_token,
        } => {
            let mut credentials = Credentials::builder()
                .access_key_id(access_key)
                .secret_access_key(secret_key.reveal())
                .provider_name("tidemark.toml");
            credentials.set_session_token(
                session_token
                    .as_ref()
                    .map(|token| token.reveal().to_owned()),
            );
            loader = loader.credentials_provider(credentials.build());
        }
        S3Credentials::File(path) => {
            let files = EnvConfigFiles::builder()
                .with_file(EnvConfigFileKind::Credentials, path)
                .include_default_config_file(true)
                .build();
            let mut provider = ProfileFileCredentialsProvider::builder().profile_files(files);
            if let Some(profile) = &settings.profile {
                provider = provider.profile_name(profile);
            }
            loader = loader.credentials_provider(provider.build());
        }
    }
    Box::pin(loader.load()).await
}

fn http_client(settings: &S3Settings) -> Result<SharedHttpClient> {
    let mut trust = TrustStore::default();
    let named = settings.ca_file.clone();
    let file = named.or_else(|| std::env::var_os("AWS_CA_BUNDLE").map(Into::into));
    if let Some(file) = file {
        trust = trust.with_pem_certificate(certificates(&file)?);
    }
    let tls = TlsContext::builder()
        .with_trust_store(trust)
        .build()
        .map_err(|error| Error::config(format!("set up TLS for S3: {error}")))?;
    Ok(
        Builder::new().build_with_connector_fn(move |settings, components| {
            let mut connector = Connector::builder()
                .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
                .tls_context(tls.clone())
                .proxy_config(ProxyConfig::from_env());
            connector.set_connector_settings(settings.cloned());
            connector.set_sleep_impl(components.and_then(|components| components.sleep_impl()));
            connector.build()
        }),
    )
}

/// Reads the certificate file and checks that every certificate in it is valid, since the client
/// accepts only valid ones.
fn certificates(file: &Path) -> Result<Vec<u8>> {
    let wrong = |problem: String| {
        Error::config(format!(
            "s3_ca_file {}: {problem}; name a file with certificates in PEM, or remove s3_ca_file",
            file.display()
        ))
    };
    let content = std::fs::read(file).map_err(|error| wrong(error.to_string()))?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&content) {
        let certificate = certificate.map_err(|error| wrong(format!("{error:?}")))?;
        roots
            .add(certificate)
            .map_err(|error| wrong(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(wrong("it holds no certificate; write it in PEM".to_owned()));
    }
    Ok(content)
}

/// `block_on` for callers that may be inside another runtime.
trait BlockOnAnywhere {
    fn block_on_anywhere<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send,
    ) -> Result<T>;
}

impl BlockOnAnywhere for Runtime {
    fn block_on_anywhere<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send,
    ) -> Result<T> {
        std::thread::scope(|scope| scope.spawn(|| self.block_on(work)).join())
            .map_err(|_| Error::config("the SDK panicked while it read its settings"))
    }
}
