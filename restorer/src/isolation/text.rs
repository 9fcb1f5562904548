//! Decodes the text of configuration files, which may contain any bytes: PostgreSQL writes a value
//! in the encoding of the database in which `ALTER SYSTEM` ran.
//!
//! Invariant: `encode(&decode(bytes)) == bytes`. A byte that is not part of valid UTF-8 becomes one
//! of the last 128 characters of Unicode's last private plane. If a file contains such a character
//! itself, each byte of the character becomes one of them.

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// The code point for byte 0. Only the code points for bytes from 128 to 255 are used.
const ESCAPES: u32 = 0x10_FF00;

/// Decodes bytes as text without loss.
pub(super) fn decode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if escaped(c).is_some() {
                let mut buffer = [0; 4];
                let bytes = c.encode_utf8(&mut buffer).bytes();
                text.extend(bytes.map(character));
            } else {
                text.push(c);
            }
        }
        text.extend(chunk.invalid().iter().copied().map(character));
    }
    text
}

/// Returns the bytes from which [`decode`] made this text.
pub(super) fn encode(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut buffer = [0; 4];
    for c in text.chars() {
        match escaped(c) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(c.encode_utf8(&mut buffer).as_bytes()),
        }
    }
    bytes
}

/// Returns the character that represents a byte.
pub(super) fn character(byte: u8) -> char {
    let escape = char::from_u32(ESCAPES + u32::from(byte));
    match escape {
        Some(escape) if !byte.is_ascii() => escape,
        _ => char::from(byte),
    }
}

/// Returns the byte that a character represents; `None` for an ordinary character.
fn escaped(c: char) -> Option<u8> {
    let byte = u32::from(c).checked_sub(ESCAPES)?;
    u8::try_from(byte).ok().filter(|byte| !byte.is_ascii())
}

/// Returns decoded text for display. Bytes that are not UTF-8 are replaced.
pub(super) fn shown(text: &str) -> String {
    String::from_utf8_lossy(&encode(text)).into_owned()
}

/// Returns decoded text as a path.
pub(super) fn path(text: &str) -> PathBuf {
    OsString::from_vec(encode(text)).into()
}

/// Returns a path as decoded text.
pub(super) fn of_path(path: &Path) -> String {
    decode(path.as_os_str().as_encoded_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_byte_is_lost(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(encode(&decode(&bytes)), bytes);
        }

        #[test]
        fn text_without_escapes_is_the_same(text in "[a-zäß€\u{10000}]*") {
            prop_assert_eq!(decode(text.as_bytes()), text);
        }
    }

    #[test]
    fn an_escape_that_is_in_the_file_is_not_taken_for_a_byte() {
        let bytes = "a\u{10FFE9}b".as_bytes();
        assert_eq!(decode(bytes).chars().count(), 6);
        assert_eq!(encode(&decode(bytes)), bytes);
        assert_eq!(shown(&decode(b"caf\xe9")), "caf\u{FFFD}");
    }
}
