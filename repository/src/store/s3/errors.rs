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
        let mut problem = match (self.status, self.code.as_str()) {
            (Some(status), "") if self.message.is_empty() => format!("HTTP {status}"),
            (Some(status), "") => format!("HTTP {status}: {}", self.message),
            (None, _) => self.message.clone(),
            (Some(status), code) if self.message.is_empty() => format!("HTTP {status} {code}"),
            (Some(status), code) => format!("HTTP {status} {code}: {}", self.message),
        };
        if let Some(remedy) = self.remedy(action) {
            problem.push_str("; ");
            problem.push_str(&remedy);
        }
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

    fn remedy(&self, action: Action) -> Option<String> {
        let remedy = match (self.code.as_str(), self.status) {
            ("NoCredentials", _) => {
                "set s3_access_key and s3_secret_key, s3_credentials_file or s3_profile, or the AWS environment"
            }
            ("NoSuchBucket", _) => {
                "create the bucket, or correct the URL, s3_endpoint or s3_region"
            }
            ("InvalidAccessKeyId" | "SignatureDoesNotMatch", _) => {
                "check the access key, its secret and s3_region"
            }
            ("ExpiredToken" | "InvalidToken" | "TokenRefreshRequired", _) => {
                "renew the temporary credentials"
            }
            ("RequestTimeTooSkewed", _) => "set this host's clock",
            ("PermanentRedirect" | "AuthorizationHeaderMalformed", _) => "correct s3_region",
            ("InvalidRequest" | "BadDigest" | "InvalidDigest", Some(400)) => {
                "a store that does not know checksums takes s3_checksums = false"
            }
            (_, Some(403)) => {
                return Some(format!(
                    "the credentials need the permission {}; this does not mean that the object is absent",
                    action.permission()
                ));
            }
            _ if self.says(&["InvalidContentType", "corrupt message", "handshake eof"]) => {
                "the endpoint does not speak TLS: write http:// in s3_endpoint, or correct its port"
            }
            _ if self.says(&[
                "connection closed before message",
                "invalid HTTP",
                "onnection reset",
                "roken pipe",
            ]) || (self.status == Some(400) && self.code.is_empty()) =>
            {
                "if the endpoint speaks TLS, write https:// in s3_endpoint; otherwise check its host and port"
            }
            _ if self.says(&["Connection refused"]) => {
                "nothing listens at s3_endpoint: start the store, or correct host and port"
            }
            _ if self.says(&["dns error", "failed to lookup address"]) => {
                "the host name of s3_endpoint cannot be resolved: correct it, or mend the name service"
            }
            _ if self.says(&["no answer in time", "timed out", "unreachable"]) => {
                "check that s3_endpoint can be reached from this host (network, firewall, proxy)"
            }
            _ if self.message.contains("certificate") => {
                "name the certificate authority in s3_ca_file"
            }
            _ => return None,
        };
        Some(remedy.to_owned())
    }
}

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
