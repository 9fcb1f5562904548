//! The headers of the tar archives that `BASE_BACKUP` sends (`tar.h`, `tarCreateHeader`): plain
//! ustar, names up to 99 bytes, sizes above 8 GiB in base 256. Names are checked before they are
//! used as paths.

use crate::relative_path::stays_below;

/// Headers and padding come in blocks of this many bytes.
pub const BLOCK_BYTES: usize = 512;

/// One entry of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarHeader {
    /// Its path below the archive's root: relative, without `.` and `..`.
    pub path: String,
    /// Its kind.
    pub kind: TarKind,
    /// The length of its content in bytes, without padding. 0 for everything except files.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
}

/// The kind of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TarKind {
    /// A directory.
    Directory,
    /// A file.
    File,
    /// A symbolic link to this target.
    Symlink(String),
}

/// The reason why a header is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    /// The checksum does not match.
    #[error("a tar header's checksum does not match")]
    Checksum,
    /// A kind that PostgreSQL never sends.
    #[error("a tar entry of an unknown type")]
    Kind,
    /// A number is malformed.
    #[error("a tar header holds a malformed number")]
    Number,
    /// A path is empty, absolute or leaves its directory.
    #[error("a tar entry's path leaves its directory")]
    Path,
}

impl TarHeader {
    /// Parses a block. Returns `None` for a block of zeros, which ends an archive.
    ///
    /// # Errors
    /// [`TarError`].
    pub fn parse(block: &[u8; BLOCK_BYTES]) -> Result<Option<Self>, TarError> {
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let field =
            |at: usize, length: usize| block.get(at..at.saturating_add(length)).unwrap_or_default();
        // The checksum counts its own field as spaces.
        let whole: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        let own: u32 = field(148, 8).iter().map(|byte| u32::from(*byte)).sum();
        let expected = number(field(148, 8))?;
        if u64::from(whole.saturating_sub(own).saturating_add(8 * 32)) != expected {
            return Err(TarError::Checksum);
        }
        let path = checked_path(&text(field(0, 100)))?;
        let size = number(field(124, 12))?;
        let mode = u32::try_from(number(field(100, 8))? & 0o7777).unwrap_or(0o600);
        let kind = match block.get(156) {
            Some(b'0' | 0) => TarKind::File,
            Some(b'5') => TarKind::Directory,
            Some(b'2') => TarKind::Symlink(text(field(157, 100))),
            _ => return Err(TarError::Kind),
        };
        let size = if kind == TarKind::File { size } else { 0 };
        Ok(Some(Self {
            path,
            kind,
            size,
            mode,
        }))
    }

    /// The length of content and padding after the header.
    #[must_use]
    pub fn padded_size(&self) -> u64 {
        self.size
            .div_ceil(BLOCK_BYTES as u64)
            .saturating_mul(BLOCK_BYTES as u64)
    }
}

fn text(field: &[u8]) -> String {
    let end = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    String::from_utf8_lossy(field.get(..end).unwrap_or_default()).into_owned()
}

/// Parses octal digits or, if the first bit is set, a big-endian number in base 256.
fn number(field: &[u8]) -> Result<u64, TarError> {
    if field.first().is_some_and(|first| *first & 0x80 != 0) {
        let mut value = 0u64;
        for (index, byte) in field.iter().enumerate() {
            let byte = if index == 0 { byte & 0x7F } else { *byte };
            value = value
                .checked_mul(256)
                .ok_or(TarError::Number)?
                .saturating_add(u64::from(byte));
        }
        return Ok(value);
    }
    let digits = text(field);
    let digits = digits.trim_matches(' ');
    u64::from_str_radix(digits, 8).map_err(|_| TarError::Number)
}

fn checked_path(path: &str) -> Result<String, TarError> {
    let trimmed = path.trim_end_matches('/').trim_start_matches("./");
    if trimmed == "." {
        return Ok(String::new());
    }
    if stays_below(trimmed) {
        Ok(trimmed.to_owned())
    } else {
        Err(TarError::Path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, kind: u8, size: &[u8]) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..107].copy_from_slice(b"0000600");
        block[124..124 + size.len()].copy_from_slice(size);
        block[156] = kind;
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    #[test]
    fn files_of_any_size_parse() {
        let header = TarHeader::parse(&block("base/1/1259", b'0', b"00000020000\0"));
        let header = header.expect("it parses").expect("it is an entry");
        assert_eq!(
            (header.size, header.padded_size(), header.mode),
            (8192, 8192, 0o600)
        );
        let mut size = [0; 12];
        size[0] = 0x80;
        size[7] = 4;
        let header = TarHeader::parse(&block("big", b'0', &size)).expect("it parses");
        assert_eq!(header.expect("an entry").size, 4 << 32);
        assert_eq!(TarHeader::parse(&[0; BLOCK_BYTES]), Ok(None));
    }

    #[test]
    fn hostile_headers_are_refused() {
        for name in ["/etc/passwd", "../x", "a/../../x", "a//b", "a/./b"] {
            assert_eq!(
                TarHeader::parse(&block(name, b'0', b"0")),
                Err(TarError::Path),
                "{name}"
            );
        }
        assert_eq!(
            TarHeader::parse(&block("a", b'1', b"0")),
            Err(TarError::Kind)
        );
        assert_eq!(
            TarHeader::parse(&block("a", b'0', b"9")),
            Err(TarError::Number)
        );
        let mut flipped = block("a", b'0', b"0");
        flipped[0] ^= 1;
        assert_eq!(TarHeader::parse(&flipped), Err(TarError::Checksum));
    }
}
