//! Explains errors of rustls in terms of the settings that an operator can change.

use std::io;

use rustls::{AlertDescription, CertificateError};

/// Explains a rustls error, with a remedy. Returns `None` if the error does not concern TLS.
pub(super) fn explain(error: &io::Error) -> Option<String> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match error {
        rustls::Error::InvalidCertificate(problem) => certificate_problem(problem),
        rustls::Error::AlertReceived(alert) => alert_problem(*alert),
        rustls::Error::InvalidMessage(_) => {
            "what came after the agreement on TLS is no TLS; is this PostgreSQL's port, and nobody in between?"
                .to_owned()
        }
        rustls::Error::PeerIncompatible(problem) => format!(
            "the server and this client have no TLS in common ({problem:?}); TLSv1.2 and TLSv1.3 are spoken, see \
             ssl_min_protocol_version and ssl_ciphers on the server"
        ),
        other => other.to_string(),
    })
}

fn certificate_problem(problem: &CertificateError) -> String {
    use CertificateError as E;
    match problem {
        E::UnknownIssuer => "the server's certificate is not signed by an authority in sslrootcert; name the file of the \
                             authority that signed it"
            .to_owned(),
        E::Expired | E::ExpiredContext { .. } => {
            format!("the server's certificate has expired ({problem}); renew it on the server")
        }
        E::NotValidYet | E::NotValidYetContext { .. } => format!(
            "the server's certificate is not valid yet ({problem}); compare the clocks of both machines"
        ),
        E::NotValidForNameContext {
            expected,
            presented,
        } => format!(
            "the server's certificate is for {}, not for {}; connect by a name that it has, or use sslmode=verify-ca",
            match presented.as_slice() {
                [] => "no name at all".to_owned(),
                names => names.join(", "),
            },
            expected.to_str()
        ),
        E::Revoked => "the server's certificate was revoked (sslcrl); renew it on the server".to_owned(),
        E::UnknownRevocationStatus => "sslcrl has no list of an authority that signed the server's certificate; add it, \
                                       or leave sslcrl out"
            .to_owned(),
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            "the server's certificate is not for servers (extended key usage); make one with serverAuth".to_owned()
        }
        other if other.to_string().contains("UnsupportedCertVersion") => {
            "the server's certificate, or one above it, is of X.509 version 1; create it again as version 3 (openssl x509 -req \
             with -extfile)"
                .to_owned()
        }
        other => format!("the server's certificate cannot be used: {other}"),
    }
}

fn alert_problem(alert: AlertDescription) -> String {
    use AlertDescription as A;
    match alert {
        A::CertificateRequired => {
            "the server requires a certificate of the client; give sslcert and sslkey".to_owned()
        }
        A::UnknownCA => "the server does not know the authority that signed our certificate (sslcert); have it signed by \
                         one in the server's ssl_ca_file"
            .to_owned(),
        A::BadCertificate | A::CertificateUnknown | A::UnsupportedCertificate | A::DecryptError => {
            format!("the server does not take our certificate (sslcert): {alert:?}; look into its log")
        }
        A::CertificateExpired => "our certificate (sslcert) has expired; renew it".to_owned(),
        A::CertificateRevoked => "our certificate (sslcert) was revoked; renew it".to_owned(),
        A::ProtocolVersion => "the server speaks no version of TLS that is allowed here; see ssl_min_protocol_version and \
                               ssl_max_protocol_version on both sides"
            .to_owned(),
        A::NoApplicationProtocol => {
            "the server does not know sslnegotiation=direct for PostgreSQL; it needs PostgreSQL 17".to_owned()
        }
        other => format!("the server refused TLS: {other:?}; look into its log"),
    }
}
