//! Key-encryption keys, which decrypt an encrypted repository. They never leave the host and are
//! never logged.
//!
//! `encryption_key_file`, `encryption_key_env` or `encryption_key_command` says where they come
//! from. Each yields one key per line. The first key is used for new objects, and all of them can
//! decrypt. A new key is a new first line.

use std::{fmt, fs, io, path::PathBuf, process::Command, str::FromStr};

use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::{
    Error, Result,
    config::{denied, require_private},
};

/// A key's name: the first eight bytes of a digest of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyId(pub(crate) [u8; 8]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl FromStr for KeyId {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let bytes = hex::decode(text).map_err(drop)?;
        bytes.try_into().map(Self).map_err(drop)
    }
}

/// 256 random bits. Prints as its name.
pub struct Key {
    /// The name.
    pub id: KeyId,
    key: Zeroizing<[u8; 32]>,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.id)
    }
}

impl Key {
    fn new(key: Zeroizing<[u8; 32]>) -> Self {
        let digest = Sha256::new()
            .chain_update(b"tidemark key id v1\0")
            .chain_update(*key)
            .finalize();
        let mut id = KeyId([0; 8]);
        id.0.copy_from_slice(&digest[..8]);
        Self { id, key }
    }

    /// Generates a new key and its line for a file.
    ///
    /// # Errors
    /// [`Error::Config`] when the operating system gives no random bytes.
    pub fn generate() -> Result<(Self, Zeroizing<String>)> {
        let mut key = Zeroizing::new([0; 32]);
        aws_lc_rs::rand::fill(&mut key[..])
            .map_err(|_| Error::config("the system gives no random bytes"))?;
        let line = Zeroizing::new(hex::encode(*key));
        Ok((Self::new(key), line))
    }

    /// For the single place that wraps keys with it.
    pub(crate) fn reveal(&self) -> &[u8] {
        &*self.key
    }
}

/// The keys of a repository. The first one is for new objects.
#[derive(Debug)]
pub struct KeyRing {
    first: Key,
    others: Vec<Key>,
}

impl KeyRing {
    /// The key for new objects.
    #[must_use]
    pub fn first(&self) -> &Key {
        &self.first
    }

    /// All keys, beginning with the first.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// Parses one key per line, 64 hexadecimal digits each. Empty lines and lines that begin with #
    /// are ignored.
    ///
    /// # Errors
    /// A description of the problem that does not contain the key.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let mut keys = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut key = Zeroizing::new([0; 32]);
            hex::decode_to_slice(line, &mut key[..]).map_err(|_| {
                format!(
                    "line {number} is not a key; a key is 64 hexadecimal digits, `wal-archiver key new` creates one"
                )
            })?;
            keys.push(Key::new(key));
        }
        let mut keys = keys.into_iter();
        match keys.next() {
            Some(first) => Ok(Self {
                first,
                others: keys.collect(),
            }),
            None => Err("there is no key; `wal-archiver key new` creates one".to_owned()),
        }
    }
}

/// The source of the keys. Prints as the line in the configuration, which is not secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// `encryption_key_file`.
    File(PathBuf),
    /// `encryption_key_env`: the name of a variable.
    Environment(String),
    /// `encryption_key_command`: a shell command whose standard output is used.
    Command(String),
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "encryption_key_file = \"{}\"", path.display()),
            Self::Environment(name) => write!(f, "encryption_key_env = \"{name}\""),
            Self::Command(command) => write!(f, "encryption_key_command = {command:?}"),
        }
    }
}

impl KeySource {
    /// Reads the keys.
    ///
    /// # Errors
    /// [`Error::Config`], which names the source and never shows a key.
    pub fn load(&self) -> Result<KeyRing> {
        let wrong = |problem: String| Error::config(format!("{self}: {problem}"));
        let text = Zeroizing::new(match self {
            Self::File(path) => {
                let missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
                if fs::metadata(path).as_ref().is_err_and(missing) {
                    return Err(wrong(format!(
                        "there is no such file; name the file that holds the archive's key, or create a key for a new \
                         archive with `wal-archiver key new {}`",
                        path.display()
                    )));
                }
                require_private(path).map_err(wrong)?;
                fs::read_to_string(path).map_err(|error| wrong(denied(path, &error)))?
            }
            Self::Environment(name) => {
                std::env::var(name).map_err(|_| wrong("the variable is not set".to_owned()))?
            }
            Self::Command(command) => {
                let output = Command::new("/bin/sh")
                    .args(["-c", command])
                    .output()
                    .map_err(|error| wrong(error.to_string()))?;
                let printed = Zeroizing::new(output.stdout);
                if !output.status.success() {
                    let said = String::from_utf8_lossy(&output.stderr);
                    let said = said.lines().next().unwrap_or_default();
                    return Err(wrong(format!("it ended with {}: {said}", output.status)));
                }
                std::str::from_utf8(&printed)
                    .map_err(|_| wrong("it prints no text".to_owned()))?
                    .to_owned()
            }
        });
        KeyRing::parse(&text).map_err(wrong)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_are_lines_and_the_first_is_for_what_is_new() {
        let (one, two) = ("11".repeat(32), "22".repeat(32));
        let ring = KeyRing::parse(&format!("# newest first\n{two}\n\n {one} \n")).expect("keys");
        let ids: Vec<KeyId> = ring.keys().map(|key| key.id).collect();
        assert_eq!(ids.len(), 2);
        assert_eq!(ring.first().id, ids[0]);
        assert_eq!(KeyRing::parse(&two).expect("a key").first().id, ids[0]);
        assert!(
            !format!("{ring:?}").contains("1111"),
            "a key is not printed"
        );
        for wrong in ["", "# none", "1234", &format!("{one}0"), &"zz".repeat(32)] {
            let problem = KeyRing::parse(wrong).expect_err("it is refused");
            assert!(wrong.is_empty() || !problem.contains(wrong), "{problem}");
        }
    }

    #[test]
    fn keys_come_from_a_file_a_variable_or_a_command() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("key");
        fs::write(&path, "33".repeat(32)).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("permissions");
        let file = KeySource::File(path.clone());
        let refused = file.load().expect_err("the world reads it").to_string();
        assert!(refused.contains("chmod"), "{refused}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("permissions");
        let id = file.load().expect("keys").first().id;
        let command = KeySource::Command(format!("cat '{}'", path.display()));
        assert_eq!(command.load().expect("keys").first().id, id);
        let failing = KeySource::Command("echo no vault >&2; exit 3".to_owned());
        let said = failing.load().expect_err("it fails").to_string();
        assert!(said.contains("no vault") && said.contains('3'), "{said}");
        let missing = KeySource::File(directory.path().join("none"));
        let said = missing.load().expect_err("it is missing").to_string();
        assert!(said.contains("`wal-archiver key new /"), "{said}");
        let unset = KeySource::Environment("TIDEMARK_NO_SUCH_KEY".to_owned());
        assert!(unset.load().is_err());
    }
}
