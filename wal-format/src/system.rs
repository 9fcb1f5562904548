//! Identifies a cluster and its version: [`SystemIdentifier`], [`PgVersion`] and its WAL page
//! magic.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The unique number that `initdb` gives a cluster (`system_identifier` in `pg_control`). It is
/// text in every interface, because JavaScript's numbers cannot represent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemIdentifier(pub u64);

impl fmt::Display for SystemIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for SystemIdentifier {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl Serialize for SystemIdentifier {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SystemIdentifier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A major version of PostgreSQL whose WAL this build reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "u16", try_from = "u16")]
pub enum PgVersion {
    /// PostgreSQL 13.
    V13,
    /// PostgreSQL 14.
    V14,
    /// PostgreSQL 15.
    V15,
    /// PostgreSQL 16.
    V16,
    /// PostgreSQL 17.
    V17,
    /// PostgreSQL 18.
    V18,
}

/// A PostgreSQL version that this build cannot read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PostgreSQL {major} is not supported; Tidemark reads the WAL of 13 to 18")]
pub struct UnsupportedVersion {
    /// The major version found.
    pub major: u16,
}

impl PgVersion {
    /// Every supported version, oldest first.
    pub const ALL: [Self; 6] = [
        Self::V13,
        Self::V14,
        Self::V15,
        Self::V16,
        Self::V17,
        Self::V18,
    ];

    /// The major version's number.
    #[must_use]
    pub fn major(self) -> u16 {
        match self {
            Self::V13 => 13,
            Self::V14 => 14,
            Self::V15 => 15,
            Self::V16 => 16,
            Self::V17 => 17,
            Self::V18 => 18,
        }
    }

    /// `xlp_magic` of this version's WAL pages (`XLOG_PAGE_MAGIC` in `xlog_internal.h`).
    #[must_use]
    pub fn page_magic(self) -> u16 {
        match self {
            Self::V13 => 0xD106,
            Self::V14 => 0xD10D,
            Self::V15 => 0xD110,
            Self::V16 => 0xD113,
            Self::V17 => 0xD116,
            Self::V18 => 0xD118,
        }
    }

    /// The version whose WAL pages have `magic`. `None` if it is not a supported version.
    #[must_use]
    pub fn from_page_magic(magic: u16) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|version| version.page_magic() == magic)
    }
}

impl TryFrom<u16> for PgVersion {
    type Error = UnsupportedVersion;

    fn try_from(major: u16) -> Result<Self, Self::Error> {
        Self::ALL
            .into_iter()
            .find(|version| version.major() == major)
            .ok_or(UnsupportedVersion { major })
    }
}

impl From<PgVersion> for u16 {
    fn from(version: PgVersion) -> Self {
        version.major()
    }
}

impl fmt::Display for PgVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.major())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_magic_names_one_version() {
        for version in PgVersion::ALL {
            assert_eq!(
                PgVersion::from_page_magic(version.page_magic()),
                Some(version)
            );
            assert_eq!(PgVersion::try_from(version.major()), Ok(version));
        }
        assert_eq!(
            PgVersion::try_from(12),
            Err(UnsupportedVersion { major: 12 })
        );
        assert_eq!(PgVersion::from_page_magic(0xD101), None);
    }
}
