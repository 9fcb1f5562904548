//! The server side of SCRAM-SHA-256 (RFC 5802, RFC 7677): the client proves that it knows the
//! password, and the server proves it too.
//!
//! Invariant: an unknown user takes the same steps to the same refusal as a wrong password. Hashes
//! are compared, never the secrets themselves.

use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

pub(super) const MECHANISM: &str = "SCRAM-SHA-256";
/// The number of random bytes in the server's part of the nonce (`SCRAM_RAW_NONCE_LEN` in
/// PostgreSQL).
const NONCE_BYTES: usize = 18;

/// The verifier that is stored instead of the password.
#[derive(Clone)]
pub(super) struct Verifier {
    iterations: String,
    salt: String,
    stored_key: Vec<u8>,
    server_key: Vec<u8>,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verifier")
    }
}

/// An exchange after the client's first message.
#[derive(Debug)]
pub(super) struct Exchange {
    client_first_bare: String,
    server_first: String,
    nonce: String,
    header: String,
}

impl Verifier {
    /// Derives a verifier with a new random salt.
    pub(super) fn of(password: &str) -> Result<Self> {
        // `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`, as in `pg_authid`.
        let text = postgres_protocol::password::scram_sha_256(password.as_bytes());
        Self::parse(&text).ok_or_else(|| Error::Usage {
            message: "the password of walsender_password_file cannot be used".to_owned(),
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('$').skip(1);
        let (iterations, salt) = parts.next()?.split_once(':')?;
        let (stored, server) = parts.next()?.split_once(':')?;
        Some(Self {
            iterations: iterations.to_owned(),
            salt: salt.to_owned(),
            stored_key: STANDARD.decode(stored).ok()?,
            server_key: STANDARD.decode(server).ok()?,
        })
    }

    /// Answers the client's first message. Returns `None` if the message is invalid or requests
    /// channel binding, which was not offered.
    pub(super) fn begin(&self, client_first: &str) -> Option<(Exchange, String)> {
        let chance = chance()?;
        self.begin_with(client_first, &STANDARD.encode(chance))
    }

    fn begin_with(&self, client_first: &str, ours: &str) -> Option<(Exchange, String)> {
        // `n` or `y`: no channel binding, which was not offered. An authorization identity follows,
        // which PostgreSQL ignores.
        let (flag, rest) = client_first.split_once(',')?;
        if !matches!(flag, "n" | "y") {
            return None;
        }
        let (identity, bare) = rest.split_once(',')?;
        let theirs = bare.split(',').find_map(|part| part.strip_prefix("r="))?;
        if theirs.is_empty() {
            return None;
        }
        let nonce = format!("{theirs}{ours}");
        let server_first = format!("r={nonce},s={},i={}", self.salt, self.iterations);
        let exchange = Exchange {
            client_first_bare: bare.to_owned(),
            server_first: server_first.clone(),
            nonce,
            header: STANDARD.encode(format!("{flag},{identity},")),
        };
        Some((exchange, server_first))
    }

    /// Verifies the client's proof. Returns the server's own proof if it is valid.
    pub(super) fn finish(&self, exchange: &Exchange, client_final: &str) -> Option<String> {
        let (without_proof, proof) = client_final.rsplit_once(",p=")?;
        let mut parts = without_proof.split(',');
        let binding = parts.next()?.strip_prefix("c=")?;
        let nonce = parts.next()?.strip_prefix("r=")?;
        if binding != exchange.header || nonce != exchange.nonce {
            return None;
        }
        let message = format!(
            "{},{},{without_proof}",
            exchange.client_first_bare, exchange.server_first
        );
        let signature = sign(&self.stored_key, message.as_bytes())?;
        let proof = STANDARD.decode(proof).ok()?;
        if proof.len() != signature.len() {
            return None;
        }
        let client_key: Vec<u8> = proof.iter().zip(&signature).map(|(a, b)| a ^ b).collect();
        // Compares hashes of the hashes, so that the duration of the comparison reveals nothing
        // about either value.
        let found = Sha256::digest(Sha256::digest(&client_key));
        if found != Sha256::digest(&self.stored_key) {
            return None;
        }
        let ours = sign(&self.server_key, message.as_bytes())?;
        Some(format!("v={}", STANDARD.encode(ours)))
    }
}

fn sign(key: &[u8], message: &[u8]) -> Option<Vec<u8>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).ok()?;
    mac.update(message);
    Some(mac.finalize().into_bytes().to_vec())
}

fn chance() -> Option<[u8; NONCE_BYTES]> {
    let mut bytes = [0; NONCE_BYTES];
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.secure_random.fill(&mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};

    use super::*;

    fn exchange(known: &str, given: &str) -> bool {
        let verifier = Verifier::of(known).expect("a verifier");
        let mut client = ScramSha256::new(given.as_bytes(), ChannelBinding::unsupported());
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        let (exchange, answer) = verifier
            .begin(&text(client.message()))
            .expect("it is a first message");
        client.update(answer.as_bytes()).expect("it is an answer");
        let proof = verifier.finish(&exchange, &text(client.message()));
        match proof {
            Some(proof) => {
                client.finish(proof.as_bytes()).expect("we know it too");
                true
            }
            None => false,
        }
    }

    #[test]
    fn the_password_and_only_it_opens() {
        assert!(exchange("correct horse", "correct horse"));
        assert!(!exchange("correct horse", "correct horsf"));
        assert!(!exchange("correct horse", ""));
    }

    /// The example of RFC 7677.
    #[test]
    fn the_example_of_the_standard_is_accepted() {
        // The function Hi() of the RFC, written out: the crate that creates verifiers chooses its
        // own salt.
        let mut block = STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").expect("it is");
        block.extend([0, 0, 0, 1]);
        let mut last = sign(b"pencil", &block).expect("any key");
        let mut salted = last.clone();
        for _ in 1..4096 {
            last = sign(b"pencil", &last).expect("any key");
            salted.iter_mut().zip(&last).for_each(|(a, b)| *a ^= b);
        }
        let client_key = sign(&salted, b"Client Key").expect("any key");
        let verifier = Verifier {
            iterations: "4096".to_owned(),
            salt: "W22ZaJ0SNY7soEsUEjb6gQ==".to_owned(),
            stored_key: Sha256::digest(client_key).to_vec(),
            server_key: sign(&salted, b"Server Key").expect("any key"),
        };
        let (exchange, first) = verifier
            .begin_with(
                "n,,n=user,r=rOprNGfwEbeRWgbNEkqO",
                "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0",
            )
            .expect("a first message");
        assert_eq!(
            first,
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
        );
        let last = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
        assert_eq!(
            verifier.finish(&exchange, last).as_deref(),
            Some("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")
        );
        assert_eq!(
            verifier.finish(&exchange, &last.replace("c=biws", "c=eSws")),
            None,
            "another header"
        );
        for nonsense in ["", "n", "n,,", "n,,n=user", "p=tls-unique,,n=,r=x", "n,,r="] {
            assert!(verifier.begin(nonsense).is_none(), "{nonsense}");
        }
    }
}
