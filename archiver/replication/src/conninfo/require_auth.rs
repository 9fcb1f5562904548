//! [`RequireAuth`]: the authentication methods that the user allows a server to request.

use super::{super::Result, parse::problem};

/// An authentication method, with libpq's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AuthMethod {
    /// The password in clear text.
    Password,
    /// The password's MD5 hash.
    Md5,
    /// Kerberos.
    Gss,
    /// Windows.
    Sspi,
    /// SCRAM, with or without channel binding.
    ScramSha256,
    /// A bearer token.
    Oauth,
    /// No authentication request: trust, peer, a certificate.
    None,
}

const METHODS: [(AuthMethod, &str); 7] = [
    (AuthMethod::Password, "password"),
    (AuthMethod::Md5, "md5"),
    (AuthMethod::Gss, "gss"),
    (AuthMethod::Sspi, "sspi"),
    (AuthMethod::ScramSha256, "scram-sha-256"),
    (AuthMethod::Oauth, "oauth"),
    (AuthMethod::None, "none"),
];

impl AuthMethod {
    pub(crate) fn name(self) -> &'static str {
        METHODS
            .iter()
            .find_map(|(method, name)| (*method == self).then_some(*name))
            .unwrap_or_default()
    }
}

/// `require_auth`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RequireAuth {
    listed: Vec<AuthMethod>,
    negated: bool,
}

impl RequireAuth {
    /// Parses a list of names, of which all or none begin with "!".
    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut required = Self::default();
        for (index, item) in text.split(',').enumerate() {
            let (negated, name) = match item.strip_prefix('!') {
                Some(name) => (true, name),
                None => (false, item),
            };
            if index > 0 && negated != required.negated {
                return Err(problem(
                    "require_auth mixes names with and without \"!\"".to_owned(),
                ));
            }
            required.negated = negated;
            let method = METHODS
                .iter()
                .find_map(|(method, known)| (*known == name).then_some(*method))
                .ok_or_else(|| {
                    let known = METHODS.map(|(_, name)| name).join(", ");
                    problem(format!(
                        "require_auth: item {} is none of {known}",
                        index + 1
                    ))
                })?;
            if required.listed.contains(&method) {
                return Err(problem(format!(
                    "require_auth names {} twice",
                    method.name()
                )));
            }
            required.listed.push(method);
        }
        Ok(required)
    }

    /// Returns true if the server may request this method. Without `require_auth` it may request
    /// any.
    pub(crate) fn allows(&self, method: AuthMethod) -> bool {
        self.listed.is_empty() || self.listed.contains(&method) != self.negated
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_allow_or_forbid() {
        let check = |text: &str, scram: bool, md5: bool, none: bool| {
            let required = RequireAuth::parse(text).expect(text);
            let allowed = [AuthMethod::ScramSha256, AuthMethod::Md5, AuthMethod::None]
                .map(|method| required.allows(method));
            assert_eq!(allowed, [scram, md5, none], "{text}");
        };
        check("scram-sha-256", true, false, false);
        check("scram-sha-256,none", true, false, true);
        check("!md5", true, false, true);
        check("!none", true, true, false);
        for bad in ["md5,!none", "md5,md5", "scram", "", "md5,"] {
            assert!(RequireAuth::parse(bad).is_err(), "{bad:?}");
        }
        assert!(RequireAuth::default().allows(AuthMethod::Password));
    }
}
