//! The container of an encrypted object: a plain header, then frames of AES-256-GCM (`FORMAT.md`,
//! *Encryption*).
//!
//! Invariant: every byte is authenticated together with the object's name. A frame that was
//! changed, truncated, moved or taken from another object does not decrypt. Each object has its own
//! key, so a frame's number can be its nonce.

use std::ops::Range;

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    hkdf::{HKDF_SHA256, Salt},
};

use super::keys::{DataKey, DataKeyId};

/// The first bytes of every encrypted object.
const MAGIC: [u8; 8] = *b"TMCIPHER";
const FORMAT_VERSION: u16 = 1;
/// AES-256-GCM with keys from HKDF-SHA-256.
const ALGORITHM: u8 = 1;
const FRAME_SHIFT: u8 = 16;
/// The plain bytes of every frame except the last.
const FRAME_LEN: usize = 1 << FRAME_SHIFT;
const FRAME_BYTES: u64 = FRAME_LEN as u64;
const TAG_LEN: usize = 16;
const TAG_BYTES: u64 = TAG_LEN as u64;
const STORED_FRAME_LEN: usize = FRAME_LEN + TAG_LEN;
const STORED_FRAME_BYTES: u64 = STORED_FRAME_LEN as u64;
const HEADER_LEN: usize = 72;
/// The size of the header in bytes.
pub(super) const HEADER_BYTES: u64 = HEADER_LEN as u64;
/// The purpose of the key derivation. The header and the name follow.
const PURPOSE: &[u8] = b"tidemark object v1\0";

/// The header of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    bytes: [u8; HEADER_LEN],
    pub(super) data_key: DataKeyId,
    pub(super) plain_bytes: u64,
}

/// The reason why an object cannot be decrypted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SealError {
    /// It is not an encrypted object of ours.
    #[error("it is not an encrypted object of this format")]
    NotEncrypted,
    /// A newer build wrote it, or its header is damaged.
    #[error("its header is of format version {0}, which this build does not read")]
    Version(u16),
    /// Its length differs from its header.
    #[error("it is {found} bytes long, its header says {expected}: it was cut off or appended to")]
    Length { expected: u64, found: u64 },
    /// A frame was changed.
    #[error(
        "frame {0} is not authentic: it was changed, or the object was moved from another name"
    )]
    Frame(u64),
    /// The library refused and gave no reason.
    #[error("AES-256-GCM could not be set up")]
    Setup,
}

impl Header {
    fn new(data_key: DataKeyId, salt: &[u8; 32], plain_bytes: u64) -> Self {
        let mut bytes = [0; HEADER_LEN];
        let fields: [&[u8]; 6] = [
            &MAGIC,
            &FORMAT_VERSION.to_le_bytes(),
            &[ALGORITHM, FRAME_SHIFT, 0, 0, 0, 0],
            &data_key.0,
            salt,
            &plain_bytes.to_le_bytes(),
        ];
        let whole = fields.concat();
        bytes.copy_from_slice(&whole);
        Self {
            bytes,
            data_key,
            plain_bytes,
        }
    }

    /// Parses the first bytes of an object.
    pub(super) fn parse(object: &[u8]) -> Result<Self, SealError> {
        let bytes: [u8; HEADER_LEN] = object
            .get(..HEADER_LEN)
            .and_then(|header| header.try_into().ok())
            .ok_or(SealError::NotEncrypted)?;
        if bytes[..8] != MAGIC {
            return Err(SealError::NotEncrypted);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != FORMAT_VERSION || bytes[10..16] != [ALGORITHM, FRAME_SHIFT, 0, 0, 0, 0] {
            return Err(SealError::Version(version));
        }
        let mut data_key = DataKeyId([0; 16]);
        data_key.0.copy_from_slice(&bytes[16..32]);
        let mut length = [0; 8];
        length.copy_from_slice(&bytes[64..72]);
        Ok(Self {
            bytes,
            data_key,
            plain_bytes: u64::from_le_bytes(length),
        })
    }

    fn frames(&self) -> u64 {
        self.plain_bytes.div_ceil(FRAME_BYTES).max(1)
    }

    /// Returns the length of the object in the store, or `None` if the header's length is
    /// impossible.
    pub(super) fn stored_bytes(&self) -> Option<u64> {
        self.frames()
            .checked_mul(TAG_BYTES)?
            .checked_add(self.plain_bytes)?
            .checked_add(HEADER_BYTES)
    }

    /// Returns the number of the first frame that contains a part of the range, and the bytes of
    /// these frames in the stored object.
    pub(super) fn place(&self, plain: &Range<u64>) -> (u64, Range<u64>) {
        let first = plain.start / FRAME_BYTES;
        let after = plain.end.div_ceil(FRAME_BYTES).max(first + 1);
        let start = HEADER_BYTES + first * STORED_FRAME_BYTES;
        let end = (HEADER_BYTES + after * STORED_FRAME_BYTES).min(self.stored_bytes().unwrap_or(0));
        (first, start..end)
    }

    /// Derives the object's own key.
    fn key(&self, data_key: &DataKey, name: &str) -> Result<LessSafeKey, SealError> {
        let info = [PURPOSE, &self.bytes, name.as_bytes()];
        let key = Salt::new(HKDF_SHA256, &self.bytes[32..64]).extract(data_key.reveal());
        let key = key
            .expand(&info, &AES_256_GCM)
            .map_err(|_| SealError::Setup)?;
        Ok(LessSafeKey::new(UnboundKey::from(key)))
    }

    fn nonce(&self, frame: u64) -> Result<Nonce, SealError> {
        let number = u32::try_from(frame).map_err(|_| SealError::Frame(frame))?;
        let mut nonce = [0; 12];
        nonce[7..11].copy_from_slice(&number.to_be_bytes());
        nonce[11] = u8::from(frame + 1 == self.frames());
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    /// Decrypts whole frames. `first` is the number of the first one.
    pub(super) fn open_frames(
        &self,
        data_key: &DataKey,
        name: &str,
        first: u64,
        stored: &[u8],
    ) -> Result<Vec<u8>, SealError> {
        let key = self.key(data_key, name)?;
        let mut plain = Vec::with_capacity(stored.len());
        for (frame, piece) in (first..).zip(stored.chunks(STORED_FRAME_LEN)) {
            let mut buffer = piece.to_vec();
            let opened = key
                .open_in_place(self.nonce(frame)?, Aad::empty(), &mut buffer)
                .map_err(|_| SealError::Frame(frame))?;
            plain.extend_from_slice(opened);
        }
        Ok(plain)
    }
}

/// Returns the offset of a frame in the plain object.
pub(super) fn frame_start(frame: u64) -> u64 {
    frame * FRAME_BYTES
}

/// Returns the plain length of an object of this stored length, or `None` if no object has this
/// length.
pub(super) fn plain_bytes(stored: u64) -> Option<u64> {
    let frames = stored.checked_sub(HEADER_BYTES)?;
    let count = frames.div_ceil(STORED_FRAME_BYTES).max(1);
    frames.checked_sub(count * TAG_BYTES)
}

/// Encrypts an object under its name.
pub(super) fn seal(
    data_key: &DataKey,
    salt: &[u8; 32],
    name: &str,
    plain: &[u8],
) -> Result<Vec<u8>, SealError> {
    let header = Header::new(data_key.id, salt, plain.len() as u64);
    let key = header.key(data_key, name)?;
    let stored = header.stored_bytes().ok_or(SealError::Setup)?;
    let mut object = Vec::with_capacity(usize::try_from(stored).unwrap_or(0));
    object.extend_from_slice(&header.bytes);
    // An empty object has one empty frame, whose tag proves that it was empty.
    let empty: [&[u8]; 1] = [b""];
    let pieces = plain.chunks(FRAME_LEN);
    let pieces = pieces.chain(empty.into_iter().take(usize::from(plain.is_empty())));
    for (frame, piece) in (0..).zip(pieces) {
        let begin = object.len();
        object.extend_from_slice(piece);
        let tag = key
            .seal_in_place_separate_tag(header.nonce(frame)?, Aad::empty(), &mut object[begin..])
            .map_err(|_| SealError::Setup)?;
        object.extend_from_slice(tag.as_ref());
    }
    Ok(object)
}

/// Decrypts a whole object whose header was parsed.
pub(super) fn open(
    header: &Header,
    data_key: &DataKey,
    name: &str,
    object: &[u8],
) -> Result<Vec<u8>, SealError> {
    let expected = header.stored_bytes().unwrap_or(u64::MAX);
    let found = object.len() as u64;
    if expected != found {
        return Err(SealError::Length { expected, found });
    }
    let frames = object.get(HEADER_LEN..).unwrap_or_default();
    header.open_frames(data_key, name, 0, frames)
}
