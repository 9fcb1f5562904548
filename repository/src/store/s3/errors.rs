//! What a store's refusal means, in S3's words and with the remedy where there is one.

use std::error::Error as StdError;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use crate::Error;

pub(super) type HttpResponse = aws_sdk_s3::config::http::HttpResponse;

/// What was tried, for messages and for the permission it takes.
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
            // Without the second one S3 says 403 of what is not there.
            Self::Get | Self::Head => "s3:GetObject and s3:ListBucket",
            Self::List => "s3:ListBucket",
            Self::ListVersions => "s3:ListBucketVersions and s3:GetObjectVersion",
            Self::Lock => "s3:PutObjectRetention and s3:GetObjectRetention",
            Self::Put => "s3:PutObject",
        }
    }
}

/// Why a request did not succeed.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// The HTTP status, when there was an answer.
    status: Option<u16>,
    /// S3's own name of the error.
    code: String,
    /// What was said.
    message: String,
    transient: bool,
}

impl Failure {
    /// Something that may succeed when it is tried again.
    pub(super) fn transient(message: &str) -> Self {
        Self {
            status: None,
            code: String::new(),
            message: message.to_owned(),
            transient: true,
        }
    }

    /// Something that will not.
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
            // Half an answer, or one that is not S3's: no proof of anything.
            SdkError::ResponseError(answer) => Self {
                status: Some(answer.raw().status().as_u16()),
                ..Self::transient(&format!("its answer can not be read: {}", chain(error)))
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

    /// Whether S3 says in so many words that there is no such key. Of another 404, as of a bucket that is gone or of a
    /// proxy's, nothing follows.
    pub(super) fn is_absent(&self) -> bool {
        self.status == Some(404) && self.code == "NoSuchKey"
    }

    /// Whether the store forbids what was asked, of us or of everybody: a policy, a retention lock, a legal hold.
    pub(super) fn is_denied(&self) -> bool {
        self.code == "AccessDenied" || self.code == "ObjectLocked"
    }

    /// Whether the name has an object already.
    pub(super) fn is_taken(&self) -> bool {
        self.status == Some(412) || self.code == "PreconditionFailed"
    }

    /// Whether the store does not know conditions at all.
    pub(super) fn is_not_implemented(&self) -> bool {
        self.status == Some(501) || self.code == "NotImplemented"
    }

    /// Whether the upload that was to be completed or aborted is not there any more.
    pub(super) fn is_no_upload(&self) -> bool {
        self.code == "NoSuchUpload"
    }

    /// Whether other credentials than those that signed might do: they ran out, or were exchanged for new ones. An answer
    /// without a body does not say which refusal it is.
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

    /// The same failure, of a request that is worth another try.
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
            _ if self.message.contains("certificate") => {
                "name the certificate authority in s3_ca_file"
            }
            _ => return None,
        };
        Some(remedy.to_owned())
    }
}

/// Whether S3 itself says "later".
fn is_transient(status: u16, code: &str) -> bool {
    // The first two: the bytes were changed on their way, and sent again they may arrive.
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
    // An error inside of a 200 has that status: its code decides.
    LATER.contains(&code) || matches!(status, 408 | 429 | 500 | 502..=504)
}

/// What the places of credentials said, when that is why there was no request.
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

/// An error and its causes, without what a cause repeats.
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
