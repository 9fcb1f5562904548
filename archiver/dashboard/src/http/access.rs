//! Authenticates clients: bearer tokens for programs, a session cookie for browsers.
//!
//! Tokens and cookies are compared by their SHA-256 checksums, so that the time of a comparison
//! reveals nothing about them. Neither ever appears in an answer or a log line.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use hyper::{
    HeaderMap,
    header::{AUTHORIZATION, COOKIE, HOST, ORIGIN},
};
use repository::config::HttpAccess;
use sha2::{Digest, Sha256};

/// The lifetime of a login.
const SESSION: Duration = Duration::from_secs(12 * 3600);
/// The maximum number of logins. Beyond it, the oldest login ends.
const SESSIONS_MAX: usize = 1000;

type Sum = [u8; 32];

/// The permissions of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// May read.
    Read,
    /// May also request a base backup or a test notification.
    Operate,
}

/// The tokens and the sessions.
#[derive(Debug)]
pub(super) struct Access {
    tokens: Vec<(Sum, Role)>,
    sessions: Mutex<VecDeque<(Sum, Role, Instant)>>,
    secure: bool,
    /// True if reading needs no token.
    reads_freely: bool,
    allowed_hosts: Vec<String>,
}

impl Access {
    /// Creates the guard of a server that is bound to `address`.
    ///
    /// On a loopback address, reading needs a token only if a read token is configured. An operate
    /// token alone does not close reading there: it gives a right that nobody has without it, and
    /// removes none. On any other address, either token closes reading.
    pub(super) fn new(settings: &HttpAccess, address: SocketAddr) -> Self {
        let is_open = settings.operate.is_none() || address.ip().is_loopback();
        let operate = settings.operate.iter().map(|token| (token, Role::Operate));
        let read = settings.read.iter().map(|token| (token, Role::Read));
        Self {
            tokens: operate
                .chain(read)
                .map(|(token, role)| (sum(token.reveal()), role))
                .collect(),
            sessions: Mutex::default(),
            secure: settings.tls.is_some(),
            reads_freely: settings.read.is_none() && is_open,
            allowed_hosts: settings.allowed_hosts.clone(),
        }
    }

    /// Returns true if reading needs a token.
    pub(super) fn is_guarded(&self) -> bool {
        !self.reads_freely
    }

    /// Returns true if any token is configured.
    pub(super) fn has_tokens(&self) -> bool {
        !self.tokens.is_empty()
    }

    /// Returns true if the sender of a request with these headers may read.
    pub(super) fn may_read(&self, headers: &HeaderMap) -> bool {
        self.reads_freely || self.token_role(headers).is_some()
    }

    /// Returns true if the request names a host under which this page may be opened.
    ///
    /// With DNS rebinding, a site makes its own name resolve to a loopback address, and its script
    /// in a visitor's browser reads the answers of the server there. The `Host` header of such a
    /// request contains the site's name, and the request has neither a token nor our cookie. So the
    /// name is checked where reading needs no token. A browser always sends `Host`. An IP address
    /// in `Host` is allowed, because it cannot be rebound.
    pub(super) fn is_known_host(&self, headers: &HeaderMap) -> bool {
        if self.is_guarded() {
            return true;
        }
        let Some(value) = headers.get(HOST) else {
            return true;
        };
        value.to_str().is_ok_and(|host| self.is_allowed(host))
    }

    fn is_allowed(&self, host: &str) -> bool {
        let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
        if let Some((address, port)) = host.strip_prefix('[').and_then(|host| host.split_once(']'))
        {
            let port = port.strip_prefix(':').unwrap_or(port);
            return is_port(port)
                && address
                    .parse()
                    .is_ok_and(|address: IpAddr| address.is_ipv6());
        }
        let (name, port) = host.split_once(':').unwrap_or((host, ""));
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        is_port(port)
            && (name == "localhost"
                || name.ends_with(".localhost")
                || name.parse::<IpAddr>().is_ok()
                || self.allowed_hosts.contains(&name))
    }

    /// Returns the role that the token or the session in these headers gives. `None` if neither is
    /// valid.
    pub(super) fn token_role(&self, headers: &HeaderMap) -> Option<Role> {
        let bearer = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        if let Some((_, token)) = bearer {
            return self.token(token.trim());
        }
        let session = sum(session_cookie(headers)?);
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|(.., began)| began.elapsed() < SESSION);
        sessions
            .iter()
            .find(|(known, ..)| *known == session)
            .map(|(_, role, _)| *role)
    }

    /// Returns true if a request that changes something comes from a program or from one of our
    /// pages, and not from another site's page in a browser that is logged in here.
    ///
    /// A browser sends `Sec-Fetch-Site` to HTTPS and loopback addresses, and no page can set it. If
    /// it is absent, `Origin` must name the requested host. A request with neither was not sent by
    /// a browser's page.
    pub(super) fn is_own_request(headers: &HeaderMap) -> bool {
        if headers.contains_key(AUTHORIZATION) {
            return true;
        }
        if let Some(site) = headers.get("sec-fetch-site") {
            return matches!(site.as_bytes(), b"same-origin" | b"none");
        }
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        match text(ORIGIN) {
            // `Origin: null` names no host.
            Some(origin) => origin
                .split_once("://")
                .is_some_and(|(_, host)| Some(host) == text(HOST)),
            None => !headers.contains_key(ORIGIN),
        }
    }

    /// Returns the role of a token.
    pub(super) fn token(&self, token: &str) -> Option<Role> {
        let sum = sum(token);
        self.tokens
            .iter()
            .find(|(known, _)| *known == sum)
            .map(|(_, role)| *role)
    }

    /// Begins a session. Returns its `Set-Cookie` header, or `None` without random numbers.
    pub(super) fn log_in(&self, role: Role) -> Option<String> {
        let mut chance = [0; 32];
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.secure_random.fill(&mut chance).ok()?;
        let cookie = hex::encode(chance);
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if sessions.len() >= SESSIONS_MAX {
            sessions.pop_front();
        }
        sessions.push_back((sum(&cookie), role, Instant::now()));
        Some(self.cookie(&cookie, SESSION.as_secs()))
    }

    /// Ends the session of these headers. Returns the `Set-Cookie` header that removes the cookie.
    pub(super) fn log_out(&self, headers: &HeaderMap) -> String {
        if let Some(cookie) = session_cookie(headers) {
            let session = sum(cookie);
            let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
            sessions.retain(|(known, ..)| *known != session);
        }
        self.cookie("", 0)
    }

    fn cookie(&self, value: &str, seconds: u64) -> String {
        // `Lax`, so that a link in an alert opens the page in a browser that is logged in.
        // `is_own_request` protects requests that change something.
        let secure = if self.secure { "; Secure" } else { "" };
        format!("{COOKIE_NAME}={value}; Path=/; HttpOnly; SameSite=Lax; Max-Age={seconds}{secure}")
    }
}

const COOKIE_NAME: &str = "tidemark_session";

fn session_cookie(headers: &HeaderMap) -> Option<&str> {
    headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| *name == COOKIE_NAME)
        .map(|(_, value)| value)
}

fn sum(text: &str) -> Sum {
    Sha256::digest(text.as_bytes()).into()
}
