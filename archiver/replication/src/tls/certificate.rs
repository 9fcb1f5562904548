//! The parts of a certificate that are read here: its names, its validity, the hash to which SCRAM
//! binds the channel.
//!
//! The name rules are libpq's and not those of RFC 6125: certificates created by PostgreSQL's
//! instructions have only a common name.

use std::{net::IpAddr, time::Duration};

use rustls::pki_types::UnixTime;
use sha2::{Digest, Sha256, Sha384, Sha512};
use x509_cert::{
    Certificate,
    der::{Decode, Encode},
    ext::pkix::{SubjectAltName, name::GeneralName},
};

/// Signature algorithms by their hash. MD5 and SHA-1 are replaced by SHA-256 (RFC 5929).
const SHA256_SIGNATURES: [&str; 5] = [
    "1.2.840.113549.1.1.4",
    "1.2.840.113549.1.1.5",
    "1.2.840.113549.1.1.11",
    "1.2.840.10045.4.1",
    "1.2.840.10045.4.3.2",
];
const SHA384_SIGNATURES: [&str; 2] = ["1.2.840.113549.1.1.12", "1.2.840.10045.4.3.3"];
const SHA512_SIGNATURES: [&str; 2] = ["1.2.840.113549.1.1.13", "1.2.840.10045.4.3.4"];
/// RSA-PSS names its hash in the parameters.
const RSA_PSS: &str = "1.2.840.113549.1.1.10";
const PSS_HASHES: [(&str, Hash); 3] = [
    ("2.16.840.1.101.3.4.2.1", sha256),
    ("2.16.840.1.101.3.4.2.2", sha384),
    ("2.16.840.1.101.3.4.2.3", sha512),
];

type Hash = fn(&[u8]) -> Vec<u8>;

fn sha256(bytes: &[u8]) -> Vec<u8> {
    Sha256::digest(bytes).to_vec()
}

fn sha384(bytes: &[u8]) -> Vec<u8> {
    Sha384::digest(bytes).to_vec()
}

fn sha512(bytes: &[u8]) -> Vec<u8> {
    Sha512::digest(bytes).to_vec()
}

/// Returns the certificate's hash for `tls-server-end-point`, computed with the hash of its
/// signature algorithm. Ed25519 has none.
pub(super) fn end_point_hash(der: &[u8]) -> Option<Vec<u8>> {
    let certificate = Certificate::from_der(der).ok()?;
    let algorithm = certificate.signature_algorithm();
    let oid = algorithm.oid.to_string();
    let is_one_of = |oids: &[&str]| oids.contains(&oid.as_str());
    let hash: Hash = if is_one_of(&SHA256_SIGNATURES) {
        sha256
    } else if is_one_of(&SHA384_SIGNATURES) {
        sha384
    } else if is_one_of(&SHA512_SIGNATURES) {
        sha512
    } else if oid == RSA_PSS {
        let parameters = algorithm.parameters.as_ref()?.to_der().ok()?;
        pss_hash(&parameters)?
    } else {
        return None;
    };
    Some(hash(der))
}

/// Returns the first hash that the parameters name: the hash of the message precedes that of the
/// mask.
fn pss_hash(parameters: &[u8]) -> Option<Hash> {
    let find = |oid: &str| {
        let needle = x509_cert::der::asn1::ObjectIdentifier::new(oid)
            .ok()?
            .to_der()
            .ok()?;
        parameters
            .windows(needle.len())
            .position(|window| window == needle)
    };
    PSS_HASHES
        .into_iter()
        .filter_map(|(oid, hash)| Some((find(oid)?, hash)))
        .min_by_key(|(at, _)| *at)
        .map(|(_, hash)| hash)
}

/// Returns true if the certificate contains this public key.
pub(super) fn belongs_to(der: &[u8], public_key: &[u8]) -> bool {
    Certificate::from_der(der).is_ok_and(|certificate| {
        let ours = certificate
            .tbs_certificate()
            .subject_public_key_info()
            .to_der();
        ours.is_ok_and(|ours| ours == public_key)
    })
}

/// The state of a certificate's validity period.
pub(super) enum Validity {
    Now,
    Past,
    Future,
}

pub(super) fn validity(der: &[u8], now: UnixTime) -> Option<Validity> {
    let certificate = Certificate::from_der(der).ok()?;
    let validity = certificate.tbs_certificate().validity();
    let now = Duration::from_secs(now.as_secs());
    Some(if now < validity.not_before.to_unix_duration() {
        Validity::Future
    } else if now > validity.not_after.to_unix_duration() {
        Validity::Past
    } else {
        Validity::Now
    })
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    dns: Vec<String>,
    addresses: Vec<IpAddr>,
    common: Option<String>,
}

impl Names {
    pub(super) fn of(der: &[u8]) -> Option<Self> {
        let certificate = Certificate::from_der(der).ok()?;
        let certificate = certificate.tbs_certificate();
        let mut names = Self {
            common: certificate
                .subject()
                .common_name()
                .ok()
                .flatten()
                .map(|name| name.value().into_owned()),
            ..Self::default()
        };
        if let Some((_, alternatives)) = certificate.get_extension::<SubjectAltName>().ok()? {
            for alternative in alternatives.0 {
                match alternative {
                    GeneralName::DnsName(name) => names.dns.push(name.to_string()),
                    GeneralName::IpAddress(octets) => {
                        names.addresses.extend(address(octets.as_bytes()));
                    }
                    _ => {}
                }
            }
        }
        Some(names)
    }

    /// Returns true if a name matches the host (`pq_verify_peer_name_matches_certificate`).
    pub(super) fn fit(&self, host: &str) -> bool {
        if self.dns.iter().any(|name| matches(name, host)) {
            return true;
        }
        let common_counts = match host.parse::<IpAddr>() {
            Ok(address) => {
                if self.addresses.contains(&address) {
                    return true;
                }
                self.addresses.is_empty()
            }
            Err(_) => self.dns.is_empty(),
        };
        common_counts
            && self
                .common
                .as_deref()
                .is_some_and(|name| matches(name, host))
    }

    /// The names for an error message.
    pub(super) fn shown(&self) -> Vec<String> {
        let mut shown = self.dns.clone();
        shown.extend(self.addresses.iter().map(ToString::to_string));
        if shown.is_empty() {
            shown.extend(self.common.clone());
        }
        shown
    }
}

fn address(octets: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(octets) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(octets).ok().map(IpAddr::from)
}

/// Compares a name in a certificate with a host. An asterisk matches the whole first label and
/// nothing else.
fn matches(pattern: &str, host: &str) -> bool {
    if pattern.contains('\0') {
        return false;
    }
    if pattern.eq_ignore_ascii_case(host) {
        return true;
    }
    let Some(suffix) = pattern
        .strip_prefix('*')
        .filter(|suffix| suffix.starts_with('.'))
    else {
        return false;
    };
    let Some(label_ends) = host.find('.') else {
        return false;
    };
    let (label, rest) = host.split_at(label_ends);
    !label.is_empty() && rest.eq_ignore_ascii_case(suffix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dns: &[&str], addresses: &[&str], common: &str) -> Names {
        Names {
            dns: dns.iter().map(|name| (*name).to_owned()).collect(),
            addresses: addresses
                .iter()
                .map(|text| text.parse().expect("an address"))
                .collect(),
            common: (!common.is_empty()).then(|| common.to_owned()),
        }
    }

    #[test]
    fn names_fit_as_in_libpq() {
        let check = |names: &Names, host: &str, expected: bool| {
            assert_eq!(names.fit(host), expected, "{names:?} for {host}");
        };
        let common_only = names(&[], &[], "db.example");
        check(&common_only, "DB.example", true);
        check(&common_only, "other.example", false);
        let with_dns = names(&["a.example", "*.b.example"], &[], "db.example");
        check(&with_dns, "db.example", false);
        check(&with_dns, "a.example", true);
        check(&with_dns, "x.B.example", true);
        check(&with_dns, "b.example", false);
        check(&with_dns, ".b.example", false);
        check(&with_dns, "y.x.b.example", false);
        let with_address = names(&["a.example"], &["10.0.0.1", "::1"], "10.0.0.9");
        check(&with_address, "10.0.0.1", true);
        check(&with_address, "0:0::1", true);
        check(&with_address, "10.0.0.9", false);
        let address_in_common = names(&["a.example"], &[], "10.0.0.9");
        check(&address_in_common, "10.0.0.9", true);
        let textual = names(&["10.0.0.7"], &[], "");
        check(&textual, "10.0.0.7", true);
        check(&names(&["a.example\0.evil"], &[], ""), "a.example", false);
        check(&names(&["*"], &[], "*"), "a", false);
    }
}
