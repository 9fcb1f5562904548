//! Interprets a store's error in S3's terms, with the remedy where there is one.

use std::error::Error as StdError;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use crate::Error;

pub(super) type HttpResponse = aws_sdk_s3::config::http::HttpResponse;

/// The attempted operation, for messages and for the permission that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Abort,
    Delete,
    Get,
    Head,
    List,
    ListVersions,
    Lock,
    Put,
}

impl Action {
    fn verb(self) -> &'static str {
        match self {
            Self::Abort => "abort the upload of",
            Self::Delete => "delete",
            Self::Get => "get",
            Self::Head => "look at",
            Self::List => "list",
            Self::ListVersions => "list the versions of",
            Self::Lock => "lock",
            Self::Put => "put",
        }
    }

    fn permission(self) -> &'static str {
        match self {
            Self::Abort => "s3:AbortMultipartUpload",
            Self::Delete => "s3:DeleteObject",
            // Without `s3:ListBucket`, S3 answers 403 for an object that does not exist.
            Self::Get | Self::Head => "s3:GetObject and s3:ListBucket",
            Self::List => "s3:ListBucket",
            Self::ListVersions => "s3:ListBucketVersions and s3:GetObjectVersion",
            Self::Lock => "s3:PutObjectRetention and s3:GetObjectRetention",
            Self::Put => "s3:PutObject",
        }
    }
}

/// The reason why a request failed.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// The HTTP status, if there was an answer.
    status: Option<u16>,
    /// S3's name of the error.
    code: String,
    /// The message.
    message: String,
    transient: bool,
}

impl Failure {
    /// Creates a failure that may succeed when retried.
    pub(super) fn transient(message: &str) -> Self {
        Self {
            status: None,
            code: String::new(),
            message: message.to_owned(),
            transient: true,
        }
    }

    /// Creates a failure that will not succeed when retried.
    pub(super) fn refused(message: &str) -> Self {
        Self {
            transient: false,
            ..Self::transient(message)
        }
    }

    pub(super) fn of<E>(error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + StdError + 'static,
    {
        match error {
            SdkError::ServiceError(answer) => {
                let status = answer.raw().status().as_u16();
                let code = answer.err().code().unwrap_or_default();
                let message = answer.err().message().unwrap_or_default();
                Self {
                    status: Some(status),
                    code: code.to_owned(),
                    message: message.to_owned(),
                    transient: is_transient(status, code),
                }
            }
            // A truncated answer, or one that does not come from S3, proves nothing.
            SdkError::ResponseError(answer) => Self {
                status: Some(answer.raw().status().as_u16()),
                ..Self::transient(&format!("its answer cannot be read: {}", chain(error)))
            },
            SdkError::TimeoutError(_) => Self::transient("no answer in time"),
            SdkError::DispatchFailure(failure) => {
                if let Some(problem) = credentials(error) {
                    return Self {
                        code: "NoCredentials".to_owned(),
                        ..Self::refused(&problem)
                    };
                }
                Self {
                    transient: !failure.is_user(),
                    ..Self::transient(&chain(error))
                }
            }
            _ => match credentials(error) {
                Some(problem) => Self {
                    code: "NoCredentials".to_owned(),
                    ..Self::refused(&problem)
                },
                None => Self::refused(&chain(error)),
            },
        }
    }

    pub(super) fn status(&self) -> Option<u16> {
        self.status
    }

    /// Returns true if S3 explicitly says that the key does not exist. Any other 404, for example
    /// of a deleted bucket or from a proxy, proves nothing.
    pub(super) fn is_absent(&self) -> bool {
        self.status == Some(404) && self.code == "NoSuchKey"
    }

    /// Returns true if the store forbids the request, for us or for everybody: a policy, a
    /// retention lock, a legal hold.
    pub(super) fn is_denied(&self) -> bool {
        self.code == "AccessDenied" || self.code == "ObjectLocked"
    }

    /// Returns true if an object with this name exists already.
    pub(super) fn is_taken(&self) -> bool {
        self.status == Some(412) || self.code == "PreconditionFailed"
    }

    /// Returns true if the store does not support conditional requests.
    pub(super) fn is_not_implemented(&self) -> bool {
        self.status == Some(501) || self.code == "NotImplemented"
    }

    /// Returns true if the upload to be completed or aborted no longer exists.
    pub(super) fn is_no_upload(&self) -> bool {
        self.code == "NoSuchUpload"
    }

    /// Returns true if other credentials might succeed: the current ones expired or were replaced.
    /// An answer without a body does not say which refusal it is.
    pub(super) fn is_about_credentials(&self) -> bool {
        const CODES: [&str; 7] = [
            "ExpiredToken",
            "InvalidAccessKeyId",
            "InvalidToken",
            "NoCredentials",
            "RequestExpired",
            "SignatureDoesNotMatch",
            "TokenRefreshRequired",
        ];
        CODES.contains(&self.code.as_str())
            || (self.code.is_empty() && matches!(self.status, Some(400 | 401 | 403)))
    }

    /// Returns the same failure, marked as worth a retry.
    pub(super) fn passing(self) -> Self {
        Self {
            transient: true,
            ..self
        }
    }

    pub(super) fn into_error(self, action: Action, key: &str, url: String) -> Error {
        let raw = match (self.status, self.code.as_str()) {
            (Some(status), "") if self.message.is_empty() => format!("HTTP {status}"),
            (Some(status), "") => format!("HTTP {status}: {}", self.message),
            (None, _) => self.message.clone(),
            (Some(status), code) if self.message.is_empty() => format!("HTTP {status} {code}"),
            (Some(status), code) => format!("HTTP {status} {code}: {}", self.message),
        };
        let problem = match self.explanation(action) {
            Some((what, remedy)) => format!("{what}: {remedy} ({raw})"),
            None => raw,
        };
        Error::S3 {
            action: action.verb(),
            key: key.to_owned(),
            url,
            problem,
            transient: self.transient,
        }
    }

    fn says(&self, parts: &[&str]) -> bool {
        parts.iter().any(|part| self.message.contains(part))
    }

    /// Returns what is wrong and what to do about it, if the failure shows it.
    fn explanation(&self, action: Action) -> Option<(&'static str, String)> {
        let (what, remedy) = match (self.code.as_str(), self.status) {
            ("NoCredentials", _) => (
                "there are no credentials",
                "set s3_access_key and s3_secret_key, s3_credentials_file or s3_profile, or the AWS environment",
            ),
            ("NoSuchBucket", _) => (
                "the bucket does not exist",
                "create the bucket, or correct the URL, s3_endpoint or s3_region",
            ),
            ("InvalidAccessKeyId", _) => (
                "the store does not know the access key",
                "check the access key, and that s3_endpoint is the store that issued it",
            ),
            ("SignatureDoesNotMatch", _) => (
                "the secret does not belong to the access key, or the request was signed for another region",
                "check the access key, its secret and s3_region",
            ),
            ("ExpiredToken" | "InvalidToken" | "TokenRefreshRequired", _) => (
                "the temporary credentials have ended",
                "renew the temporary credentials",
            ),
            ("RequestTimeTooSkewed" | "RequestExpired", _) => (
                "this host's clock differs too much from the store's",
                "set this host's clock, for example by NTP",
            ),
            (
                "PermanentRedirect"
                | "TemporaryRedirect"
                | "AuthorizationHeaderMalformed"
                | "IllegalLocationConstraintException",
                _,
            )
            | (_, Some(301 | 307)) => {
                let remedy = match self.expected_region() {
                    Some(region) => format!("correct s3_region: \"{region}\" is expected"),
                    None => "correct s3_region, or s3_endpoint".to_owned(),
                };
                return Some(("the bucket is in another region", remedy));
            }
            ("InvalidRequest" | "BadDigest" | "InvalidDigest", Some(400)) => (
                "the store refuses the request",
                "a store that does not know checksums takes s3_checksums = false",
            ),
            (_, Some(403)) => {
                let remedy = format!(
                    "the credentials need the permission {}; this does not mean that the object is absent",
                    action.permission()
                );
                return Some(("access is denied", remedy));
            }
            ("", Some(400)) => NOT_PLAIN,
            ("", None) => self.of_connection()?,
            _ => return None,
        };
        Some((what, remedy.to_owned()))
    }

    /// Returns the explanation of a failure before the store's answer, from the texts of the
    /// system's and the TLS library's errors.
    fn of_connection(&self) -> Option<(&'static str, &'static str)> {
        const BY_TEXT: [(&[&str], (&str, &str)); 11] = [
            (
                &["UnknownIssuer", "unknown issuer", "CaUsedAsEndEntity"],
                (
                    "an authority that this host does not know signed the store's certificate",
                    "name the certificate authority in s3_ca_file",
                ),
            ),
            (
                &[
                    "NotValidForName",
                    "not valid for name",
                    "not valid for any names",
                ],
                (
                    "the store's certificate is for another host name",
                    "write the name from the certificate in s3_endpoint, or give the store a certificate for this name",
                ),
            ),
            (
                &["certificate expired", "Expired"],
                (
                    "the store's certificate has expired by this host's clock",
                    "renew it at the store, or set this host's clock",
                ),
            ),
            (
                &["certificate not valid yet", "NotValidYet"],
                (
                    "the store's certificate is not valid yet by this host's clock",
                    "set this host's clock, or wait until the certificate is valid",
                ),
            ),
            (
                &["certificate"],
                (
                    "the store's certificate cannot be trusted",
                    "name the certificate authority in s3_ca_file, or correct the store's certificate",
                ),
            ),
            (
                &["InvalidContentType", "corrupt message", "handshake eof"],
                (
                    "the endpoint does not speak TLS",
                    "write http:// in s3_endpoint, or correct its port",
                ),
            ),
            (
                &["alert"],
                (
                    "the endpoint ended the TLS handshake",
                    "check that s3_endpoint speaks TLS 1.2 or 1.3 and wants no client certificate",
                ),
            ),
            (
                &[
                    "connection closed before message",
                    "invalid HTTP",
                    "onnection reset",
                    "roken pipe",
                ],
                NOT_PLAIN,
            ),
            (
                &["Connection refused"],
                (
                    "nothing listens at s3_endpoint",
                    "start the store, or correct host and port",
                ),
            ),
            (
                &["dns error", "failed to lookup address"],
                (
                    "the host name of s3_endpoint cannot be resolved",
                    "correct it, or repair the name service of this host",
                ),
            ),
            (
                &["no answer in time", "timed out", "unreachable"],
                (
                    "s3_endpoint does not answer",
                    "check that it can be reached from this host (network, firewall, proxy)",
                ),
            ),
        ];
        let mut known = BY_TEXT.into_iter();
        known.find_map(|(parts, explanation)| self.says(parts).then_some(explanation))
    }

    /// Returns the region that S3 names: "the region 'a' is wrong; expecting 'b'".
    fn expected_region(&self) -> Option<&str> {
        let (_, rest) = self.message.split_once("expecting '")?;
        let (region, _) = rest.split_once('\'')?;
        Some(region)
    }
}

/// The explanation of an answer that is not HTTP, or that refuses a request without TLS.
const NOT_PLAIN: (&str, &str) = (
    "the endpoint does not answer like an object store without TLS",
    "if the endpoint speaks TLS, write https:// in s3_endpoint; otherwise check its host and port",
);

/// Returns true if S3 itself asks for a retry.
fn is_transient(status: u16, code: &str) -> bool {
    // The first two: the bytes were changed in transit and may arrive intact when sent again.
    const LATER: [&str; 10] = [
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "IncompleteBody",
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
    ];
    // An error inside of a 200 answer has that status, so its code decides.
    LATER.contains(&code) || matches!(status, 408 | 429 | 500 | 502..=504)
}

/// Returns the messages of the credential providers if they are the reason why no request was sent.
fn credentials(error: &(dyn StdError + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<CredentialsError>() {
            return Some(format!("no credentials: {}", chain(error)));
        }
        next = error.source();
    }
    None
}

/// Formats an error and its causes without repetitions.
pub(super) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}
