//! `wal-archiver import DIR`: imports WAL that another tool archived, or compares it with our
//! archive.
//!
//! Reads the files of `archive_command = 'cp …'`, `pg_receivewal` and an unencrypted pgBackRest
//! repository: segments, partial segments and history files, uncompressed or as gzip, LZ4 frames or
//! zstd, with or without pgBackRest's checksum in the name. Invariant: a file is imported only if
//! `push` would accept it. The other archive is only read.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read, Seek},
    path::{Path, PathBuf},
};

use intake::{NO_RECORD, Pusher, Running, WalFile};
use repository::{Repository, config::ClusterSettings};
use tempfile::TempDir;
use wal_format::{SegmentName, WalFileName, page::PageHeader};

use crate::error::{Error, Result};

/// The number of hexadecimal digits of the SHA-1 in pgBackRest's file names.
const SHA1_DIGITS: usize = 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Codec {
    None,
    Gzip,
    Lz4,
    Zstd,
}

/// One file of the other archive.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    name: WalFileName,
    path: PathBuf,
    codec: Codec,
}

/// The result for one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was not in our archive, and is now.
    Imported,
    /// Our archive has the same bytes, or the file contains no WAL.
    Same,
    /// Our archive does not have it. Only reported by a comparison.
    Missing,
    /// Our archive has other bytes. The text describes the difference.
    Differs(String),
    /// It is not what its name says, or its branch is unknown.
    Refused(String),
}

/// The number of files by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Count {
    /// The files that were new in our archive.
    pub imported: u64,
    /// The files that were there with the same bytes.
    pub same: u64,
    /// The files that are not in our archive.
    pub missing: u64,
    /// The files that are there with other bytes.
    pub differing: u64,
    /// The files that cannot be used.
    pub refused: u64,
}

/// Imports everything below `directory`, or only compares it if `compare` is true. `say` is called
/// with the result for each file.
///
/// # Errors
/// When the directory cannot be read or the repository is unavailable. A problem of one file is its
/// [`Fate`].
pub fn import(
    settings: &ClusterSettings,
    directory: &Path,
    compare: bool,
    say: &dyn Fn(&Path, &Fate),
) -> Result<Count> {
    let repository = Repository::open_known(settings)?;
    if compare && repository.identity()?.is_none() {
        return Err(Error::Usage {
            message: format!(
                "{} holds nothing of cluster {} to compare with",
                repository.url(),
                repository.cluster()
            ),
        });
    }
    let mut found = Vec::new();
    collect(directory, &mut found)?;
    found.sort_by_key(|file| order(&file.name));
    if found.is_empty() {
        return Err(Error::Usage {
            message: format!("no WAL file lies below {}", directory.display()),
        });
    }
    let scratch = tempfile::tempdir().map_err(Error::io(
        "create a directory in",
        "the temporary directory",
    ))?;
    let pusher = Pusher {
        settings,
        repository: &repository,
        spool_counts: false,
    };
    let mut running = None;
    let mut count = Count::default();
    for file in found {
        let outcome = one(pusher, &file, scratch.path(), compare, &mut running);
        let fate = match outcome {
            Ok(fate) => fate,
            // Without the repository, no file can have a result.
            Err(Error::Repository(error)) => return Err(error.into()),
            Err(Error::Wal(intake::Error::Differs { problem, .. })) => Fate::Differs(problem),
            // The other tool had just created its last file, which contains no record yet.
            Err(Error::Wal(intake::Error::Refused { problem, .. })) if problem == NO_RECORD => {
                Fate::Same
            }
            Err(Error::Wal(intake::Error::Refused { problem, .. })) => Fate::Refused(problem),
            Err(error) => Fate::Refused(error.to_string()),
        };
        let counter = match fate {
            Fate::Imported => &mut count.imported,
            Fate::Same => &mut count.same,
            Fate::Missing => &mut count.missing,
            Fate::Differs(_) => &mut count.differing,
            Fate::Refused(_) => &mut count.refused,
        };
        *counter += 1;
        say(&file.path, &fate);
    }
    Ok(count)
}

fn one(
    pusher: Pusher<'_>,
    found: &Found,
    scratch: &Path,
    compare: bool,
    running: &mut Option<Running>,
) -> Result<Fate> {
    if compare && !matches!(found.name, WalFileName::Segment(_)) {
        // A history file determines the branch of its segments, so it is compared together with
        // them.
        return Ok(Fate::Same);
    }
    let file = open(found, scratch)?;
    match pusher.check(&file, running)? {
        None => Ok(match found.name {
            WalFileName::Segment(_) => Fate::Same,
            _ => Fate::Imported,
        }),
        Some(_) if compare => Ok(Fate::Missing),
        Some(checked) => {
            pusher.store(&file, &checked)?;
            Ok(Fate::Imported)
        }
    }
}

/// Opens the file under its WAL name: the file itself, or a copy that is decompressed into
/// `scratch`.
fn open(found: &Found, scratch: &Path) -> Result<WalFile> {
    let name = found.name.to_string();
    let plain = found.path.file_name().is_some_and(|file| *file == *name);
    if found.codec == Codec::None && plain {
        return Ok(WalFile::open(&found.path)?);
    }
    let input = File::open(&found.path).map_err(Error::io("read", &found.path))?;
    let input = BufReader::new(input);
    let mut reader: Box<dyn Read> = match found.codec {
        Codec::None => Box::new(input),
        Codec::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Codec::Lz4 => Box::new(lz4_flex::frame::FrameDecoder::new(input)),
        Codec::Zstd => Box::new(
            zstd::stream::read::Decoder::with_buffer(input)
                .map_err(Error::io("decompress", &found.path))?,
        ),
    };
    // The descriptor stays valid after the directory is removed, and `push` reads by the
    // descriptor.
    let place = TempDir::new_in(scratch).map_err(Error::io("create a directory in", scratch))?;
    let path = place.path().join(name);
    let mut output = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(Error::io("create", &path))?;
    // No segment is longer, so a file that decompresses to more is not WAL.
    const SEGMENT_BYTES_MAX: u64 = 1 << 30;
    io::copy(
        &mut reader.by_ref().take(SEGMENT_BYTES_MAX + 1),
        &mut output,
    )
    .map_err(Error::io("decompress", &found.path))?;
    if matches!(found.name, WalFileName::Partial(_)) {
        pad(&mut output).map_err(Error::io("pad", &path))?;
    }
    output.rewind().map_err(Error::io("read", &path))?;
    Ok(WalFile::of(path, output)?)
}

/// Appends zeros up to the segment size. A compressed partial segment of `pg_receivewal` ends where
/// the stream ended, while an uncompressed one contains zeros up to its end.
fn pad(file: &mut File) -> io::Result<()> {
    const PAGE_BYTES: u64 = 8192;
    let mut header = Vec::new();
    file.rewind()?;
    file.by_ref().take(PAGE_BYTES).read_to_end(&mut header)?;
    header.resize(usize::try_from(PAGE_BYTES).unwrap_or(0), 0);
    if let Some(identity) = PageHeader::parse(&header).and_then(|header| header.identity()) {
        let length = file.metadata()?.len().max(identity.segment_size.bytes());
        file.set_len(length)?;
    }
    Ok(())
}

/// Collects every WAL file below a directory. Files without the name of a WAL file are skipped.
fn collect(directory: &Path, found: &mut Vec<Found>) -> Result<()> {
    let entries = fs::read_dir(directory).map_err(Error::io("list", directory))?;
    for entry in entries {
        let entry = entry.map_err(Error::io("list", directory))?;
        let path = entry.path();
        // Links are not followed: a link to `pg_wal` would import segments that are being written.
        let kind = entry.file_type().map_err(Error::io("read", &path))?;
        if kind.is_dir() {
            collect(&path, found)?;
        } else if kind.is_file()
            && let Some(name) = entry.file_name().to_str()
            && let Some((name, codec)) = parse(name)
        {
            found.push(Found { name, path, codec });
        }
    }
    Ok(())
}

fn parse(file: &str) -> Option<(WalFileName, Codec)> {
    let suffixes = [
        (".gz", Codec::Gzip),
        (".lz4", Codec::Lz4),
        (".zst", Codec::Zstd),
    ];
    // pg_receivewal writes `NAME.gz.partial` for a segment that is not complete.
    let (file, partial) = match file.strip_suffix(".partial") {
        Some(rest) => (rest, ".partial"),
        None => (file, ""),
    };
    let (stem, codec) = suffixes
        .iter()
        .find_map(|(suffix, codec)| Some((file.strip_suffix(suffix)?, *codec)))
        .unwrap_or((file, Codec::None));
    let stem = match stem.rsplit_once('-') {
        Some((name, sum))
            if sum.len() == SHA1_DIGITS && sum.chars().all(|digit| digit.is_ascii_hexdigit()) =>
        {
            name
        }
        _ => stem,
    };
    Some((format!("{stem}{partial}").parse().ok()?, codec))
}

/// The order of import. Histories are first, because they determine the branches of segments. Then
/// come the segments in order, so that the decoder continues from one to the next.
fn order(name: &WalFileName) -> (u8, Option<SegmentName>, String) {
    match name {
        WalFileName::History(_) => (0, None, name.to_string()),
        WalFileName::Segment(segment) => (1, Some(*segment), String::new()),
        WalFileName::Partial(segment) => (2, Some(*segment), String::new()),
        WalFileName::Backup(..) => (3, None, name.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_tools_are_known() {
        let segment = "000000010000000000000003";
        let sum = "da39a3ee5e6b4b0d3255bfef95601890afd80709";
        for (file, name, codec) in [
            (segment.to_owned(), segment.to_owned(), Codec::None),
            (format!("{segment}.gz"), segment.to_owned(), Codec::Gzip),
            (format!("{segment}.lz4"), segment.to_owned(), Codec::Lz4),
            (
                format!("{segment}-{sum}.zst"),
                segment.to_owned(),
                Codec::Zstd,
            ),
            (format!("{segment}-{sum}"), segment.to_owned(), Codec::None),
            (
                format!("{segment}.gz.partial"),
                format!("{segment}.partial"),
                Codec::Gzip,
            ),
            (
                format!("{segment}.partial-{sum}.lz4"),
                format!("{segment}.partial"),
                Codec::Lz4,
            ),
            (
                "00000002.history".to_owned(),
                "00000002.history".to_owned(),
                Codec::None,
            ),
        ] {
            let (parsed, found) = parse(&file).expect(&file);
            assert_eq!((parsed.to_string(), found), (name, codec), "{file}");
        }
        for file in [
            "archive.info",
            "backup.info.copy",
            "LOCK",
            &format!("{segment}-{}", &sum[1..]),
        ] {
            assert_eq!(parse(file), None, "{file}");
        }
    }
}
