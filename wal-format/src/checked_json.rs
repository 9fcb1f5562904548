//! JSON objects with a checksum: the last field, `crc32`, is the CRC-32 of every byte before its
//! comma.
//!
//! Without a checksum, a flipped bit in a text or a number would still give valid JSON.
//! Invariant: an object with a checksum is returned only if the checksum matches. Objects of
//! earlier builds have none and are read without the check.

use serde::{Serialize, de::DeserializeOwned};

/// The text before the checksum, and after it.
const BEGIN: &str = ",\n  \"crc32\": \"";
const END: &str = "\"\n}";
/// The total length of `BEGIN`, the eight digits and `END`.
const SUM_BYTES: usize = BEGIN.len() + 8 + END.len();

/// Serializes a value with its checksum.
///
/// # Errors
/// When the value cannot be represented as JSON.
pub fn to_vec(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(value)?;
    if json.ends_with(b"\n}") {
        json.truncate(json.len().saturating_sub(2));
        let sum = crc32fast::hash(&json);
        json.extend_from_slice(format!("{BEGIN}{sum:08x}{END}").as_bytes());
    }
    Ok(json)
}

/// Parses a stored object.
///
/// # Errors
/// When it is not such a value, or its checksum does not match.
pub fn from_slice<T: DeserializeOwned>(json: &[u8]) -> serde_json::Result<T> {
    check(json)?;
    serde_json::from_slice(json)
}

/// Parses a stored object of a kind that every build writes with a checksum.
///
/// # Errors
/// As [`from_slice`], and when the object has no checksum.
pub fn from_summed_slice<T: DeserializeOwned>(json: &[u8]) -> serde_json::Result<T> {
    if !check(json)? {
        return Err(serde::de::Error::custom("it does not end in its sum"));
    }
    serde_json::from_slice(json)
}

/// Returns whether the object has a checksum. Fails if it has one that does not match.
fn check(json: &[u8]) -> serde_json::Result<bool> {
    let json = json.strip_suffix(b"\n").unwrap_or(json);
    let summed = json
        .len()
        .checked_sub(SUM_BYTES)
        .and_then(|length| json.split_at_checked(length));
    let Some((body, tail)) = summed else {
        return Ok(false);
    };
    let sum = format!("{BEGIN}{:08x}{END}", crc32fast::hash(body));
    // A checksum is always at the end. If a flipped bit hides the name of its field, the checksum
    // is not found, but then no other byte is damaged.
    let named = tail.starts_with(BEGIN.as_bytes()) || tail.ends_with(END.as_bytes());
    let has_sum = named && tail.windows(6).any(|six| six == b"crc32\"");
    if has_sum && tail != sum.as_bytes() {
        return Err(serde::de::Error::custom(
            "its bytes do not have the sum that it names",
        ));
    }
    Ok(has_sum)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
    struct Thing {
        name: String,
        number: u64,
    }

    fn thing() -> Thing {
        Thing {
            name: "a \"thing\"".to_owned(),
            number: 40_713,
        }
    }

    #[test]
    fn no_flipped_bit_is_read_as_something_else() {
        let json = to_vec(&thing()).expect("JSON");
        assert_eq!(from_slice::<Thing>(&json).expect("it is sound"), thing());
        let value: serde_json::Value = serde_json::from_slice(&json).expect("it is JSON");
        assert!(value["crc32"].is_string());
        let mut undetected = 0;
        for at in 0..json.len() {
            for bit in 0..8 {
                let mut flipped = json.clone();
                flipped[at] ^= 1 << bit;
                match from_slice::<Thing>(&flipped) {
                    Ok(read) => {
                        assert_eq!(read, thing(), "byte {at}, bit {bit}");
                        undetected += 1;
                    }
                    Err(_) => continue,
                }
            }
        }
        // Bits in the name of the checksum's field or around it, which no reader uses.
        assert!(undetected <= 64, "{undetected}");
    }

    #[test]
    fn objects_without_a_sum_are_read() {
        let json = serde_json::to_vec_pretty(&thing()).expect("JSON");
        assert_eq!(from_slice::<Thing>(&json).expect("it is read"), thing());
        let short: Vec<u8> = from_slice(b"[]").expect("it is read");
        assert!(short.is_empty());
    }
}
