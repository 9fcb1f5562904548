//! Authentication: password, MD5, SCRAM-SHA-256 with and without channel binding.
//!
//! Invariant: a method that `require_auth` or `channel_binding` forbids is refused before a secret
//! is sent.

use std::io;

use bytes::{Buf, Bytes};
use postgres_protocol::{
    authentication::{
        md5_hash,
        sasl::{ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256},
    },
    message::frontend,
};

use super::{
    ConnInfo, ConnectionMode, Error, Result,
    connection::{Reader, Writer},
    conninfo::{AuthMethod, ChannelBindingMode, Host},
};

pub(super) struct Authenticate<'a> {
    pub(super) info: &'a ConnInfo,
    pub(super) host: &'a Host,
    pub(super) mode: ConnectionMode,
    pub(super) encrypted: bool,
    /// The hash of the server's certificate to which SCRAM binds the channel.
    pub(super) end_point: Option<Vec<u8>>,
}

struct Exchange {
    scram: ScramSha256,
    bound: bool,
    /// True if the server has proved that it knows the password too.
    finished: bool,
}

/// Answers the server's requests until it accepts the authentication.
pub(super) async fn authenticate(
    reader: &mut Reader,
    writer: &mut Writer,
    with: &Authenticate<'_>,
) -> Result<()> {
    let mut exchange: Option<Exchange> = None;
    let mut asked = AuthMethod::None;
    loop {
        let message = reader.answer().await?;
        if message.tag != b'R' {
            let tag = message.tag.escape_ascii();
            return Err(reader.unexpected(format!("'{tag}' while authenticating")));
        }
        let mut body = message.body;
        let kind = body
            .try_get_u32()
            .map_err(|_| reader.unexpected("a short authentication request".to_owned()))?;
        let out_of_order = || reader.unexpected("SASL out of order".to_owned());
        match kind {
            0 => return with.check_end(asked, exchange.as_ref(), reader),
            3 => {
                asked = AuthMethod::Password;
                with.check_method(asked)?;
                let password = with.password()?;
                writer.encode(|buffer| frontend::password_message(password.as_bytes(), buffer))?;
            }
            5 => {
                asked = AuthMethod::Md5;
                with.check_method(asked)?;
                let salt = *body
                    .first_chunk::<4>()
                    .ok_or_else(|| reader.unexpected("a short salt".to_owned()))?;
                let hash = md5_hash(
                    with.info.user().as_bytes(),
                    with.password()?.as_bytes(),
                    salt,
                );
                writer.encode(|buffer| frontend::password_message(hash.as_bytes(), buffer))?;
            }
            10 => {
                asked = AuthMethod::ScramSha256;
                with.check_method(asked)?;
                let (mechanism, begun) = with.begin(&body, reader)?;
                writer.encode(|buffer| {
                    frontend::sasl_initial_response(mechanism, begun.scram.message(), buffer)
                })?;
                exchange = Some(begun);
            }
            11 => {
                let exchange = exchange.as_mut().ok_or_else(out_of_order)?;
                exchange
                    .scram
                    .update(&body)
                    .map_err(|error| with.scram_failed(&error))?;
                writer
                    .encode(|buffer| frontend::sasl_response(exchange.scram.message(), buffer))?;
            }
            12 => {
                let exchange = exchange.as_mut().ok_or_else(out_of_order)?;
                exchange
                    .scram
                    .finish(&body)
                    .map_err(|error| with.scram_failed(&error))?;
                exchange.finished = true;
                continue;
            }
            other => return Err(with.refused(unsupported(other))),
        }
        writer.flush().await?;
    }
}

impl Authenticate<'_> {
    fn refused(&self, problem: String) -> Error {
        Error::Auth {
            place: self.host.to_string(),
            problem,
        }
    }

    fn scram_failed(&self, error: &io::Error) -> Error {
        self.refused(format!(
            "the server does not prove that it knows the password ({error}); check the password, and that nobody is in between"
        ))
    }

    fn password(&self) -> Result<String> {
        self.info.password(self.host, self.mode).ok_or_else(|| Error::Auth {
            place: self.host.to_string(),
            problem: format!(
                "the server asks for a password for \"{}\"; set PGPASSWORD or write it in the password file",
                self.info.user()
            ),
        })
    }

    /// Returns an error if the server may not request this method.
    fn check_method(&self, method: AuthMethod) -> Result<()> {
        if !self.info.require_auth.allows(method) {
            return Err(self.refused(format!(
                "the server asks for authentication method {}, which require_auth forbids",
                method.name()
            )));
        }
        if self.info.channel_binding == ChannelBindingMode::Require
            && method != AuthMethod::ScramSha256
        {
            return Err(self.no_binding());
        }
        Ok(())
    }

    fn no_binding(&self) -> Error {
        let remedy = if self.encrypted {
            "the server did not offer it: it needs scram-sha-256 in pg_hba.conf and a password stored as SCRAM"
        } else {
            "this connection is not encrypted: channel binding needs TLS (sslmode=require, and no Unix socket)"
        };
        self.refused(format!("channel_binding=require, but {remedy}"))
    }

    /// Chooses the mechanism and creates the client's first message.
    fn begin(&self, offered: &Bytes, reader: &Reader) -> Result<(&'static str, Exchange)> {
        let offers = |mechanism: &str| {
            offered
                .split(|byte| *byte == 0)
                .any(|name| name == mechanism.as_bytes())
        };
        if offers(SCRAM_SHA_256_PLUS) && !self.encrypted {
            return Err(reader.unexpected("channel binding on a connection without TLS".to_owned()));
        }
        let wanted = self.info.channel_binding != ChannelBindingMode::Disable;
        let bound = match &self.end_point {
            Some(hash) if wanted && offers(SCRAM_SHA_256_PLUS) => Some(hash.clone()),
            _ => None,
        };
        if bound.is_none() && self.info.channel_binding == ChannelBindingMode::Require {
            return Err(self.no_binding());
        }
        let is_bound = bound.is_some();
        let (mechanism, binding) = match bound {
            Some(hash) => (
                SCRAM_SHA_256_PLUS,
                ChannelBinding::tls_server_end_point(hash),
            ),
            None if !offers(SCRAM_SHA_256) => {
                return Err(self.refused(
                    "the server offers no SASL mechanism that is known (SCRAM-SHA-256)".to_owned(),
                ));
            }
            // `y` in the GS2 header: the client supports channel binding but the server did not
            // offer it. A server that did offer it then knows that an attacker removed its offer.
            None if wanted && self.end_point.is_some() => {
                (SCRAM_SHA_256, ChannelBinding::unrequested())
            }
            None => (SCRAM_SHA_256, ChannelBinding::unsupported()),
        };
        let exchange = Exchange {
            scram: ScramSha256::new(self.password()?.as_bytes(), binding),
            bound: is_bound,
            finished: false,
        };
        Ok((mechanism, exchange))
    }

    /// Checks that the server's acceptance fulfils our own requirements.
    fn check_end(
        &self,
        asked: AuthMethod,
        exchange: Option<&Exchange>,
        reader: &Reader,
    ) -> Result<()> {
        if exchange.is_some_and(|exchange| !exchange.finished) {
            return Err(reader.unexpected("before SCRAM had proved anything".to_owned()));
        }
        if asked == AuthMethod::None && !self.info.require_auth.allows(AuthMethod::None) {
            return Err(self.refused(
                "the server lets everybody in (trust, peer, or a certificate), which require_auth forbids"
                    .to_owned(),
            ));
        }
        if self.info.channel_binding == ChannelBindingMode::Require
            && !exchange.is_some_and(|exchange| exchange.bound)
        {
            return Err(self.no_binding());
        }
        Ok(())
    }
}

fn unsupported(kind: u32) -> String {
    let name = match kind {
        2 => "Kerberos V5",
        6 => "SCM credentials",
        7 | 8 => "GSSAPI",
        9 => "SSPI",
        _ => "one that is unknown",
    };
    format!(
        "the server asks for authentication by {name} ({kind}), which is not supported; let pg_hba.conf ask for \
         scram-sha-256, md5, password or cert"
    )
}
