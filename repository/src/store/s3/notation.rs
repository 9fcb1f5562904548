//! S3's notation of checksums and ranges.

use std::ops::Range;

use aws_smithy_types::base64;

/// Returns the CRC-32C in S3's notation.
pub(super) fn checksum(bytes: &[u8]) -> String {
    base64::encode(crc32c::crc32c(bytes).to_be_bytes())
}

/// Parses `bytes 2-5/10` as the half-open range `2..6`.
pub(super) fn parse_content_range(text: &str) -> Option<Range<u64>> {
    let (range, _) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some(first.parse().ok()?..last.parse::<u64>().ok()?.checked_add(1)?)
}
