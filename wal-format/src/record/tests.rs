//! Structures that each version of PostgreSQL writes, and lengths that contradict each other.

use super::*;
use crate::RelationFile;

const RELATION: RelationFile = RelationFile {
    tablespace: 1663,
    database: 5,
    relation: 16_384,
};

/// The fields of a block header, so that a test can set each one to a wrong value.
#[derive(Clone, Debug)]
struct Block {
    id: u8,
    flags: u8,
    data: u16,
    image: Option<(u16, u16, u8, Option<u16>)>,
}

impl Block {
    fn header(&self) -> Vec<u8> {
        let mut bytes = vec![self.id, self.flags];
        bytes.extend(self.data.to_le_bytes());
        if let Some((length, hole_offset, info, hole)) = self.image {
            bytes.extend(length.to_le_bytes());
            bytes.extend(hole_offset.to_le_bytes());
            bytes.push(info);
            bytes.extend(hole.into_iter().flat_map(u16::to_le_bytes));
        }
        if self.flags & 0x80 == 0 {
            for part in [RELATION.tablespace, RELATION.database, RELATION.relation] {
                bytes.extend(part.to_le_bytes());
            }
        }
        bytes.extend(77_u32.to_le_bytes());
        bytes
    }
}

/// Parses a record with these header items followed by this many bytes of data.
fn read(version: PgVersion, headers: &[u8], data: usize) -> Option<WalRecord<'static>> {
    let mut body = headers.to_vec();
    body.extend((0..data).map(|at| at as u8));
    let body: &'static [u8] = body.leak();
    let mut header = RecordHeader::parse(&[0; RECORD_HEADER_BYTES]);
    header.total = (RECORD_HEADER_BYTES + body.len()) as u32;
    let mut record = WalRecord::new(version, Lsn(40), Lsn(80), header, body);
    record.read_structure().ok()?;
    Some(record)
}

fn image(length: u16, hole_offset: u16, info: u8, hole: Option<u16>) -> Block {
    Block {
        id: 0,
        flags: 0x10,
        data: 0,
        image: Some((length, hole_offset, info, hole)),
    }
}

#[test]
fn every_part_of_a_record_is_found() {
    let first = Block {
        id: 0,
        flags: 0x30 | 0x40,
        data: 5,
        image: Some((100, 40, 0x07, Some(8000))),
    };
    let second = Block {
        id: 3,
        flags: 0x80 | 0x20 | 0x02,
        data: 2,
        image: None,
    };
    let mut headers = first.header();
    headers.extend(second.header());
    headers.extend([253, 9, 0, 252, 1, 2, 0, 0, 255, 4]);
    let record = read(PgVersion::V15, &headers, 100 + 5 + 2 + 4).expect("it is sound");
    assert_eq!(record.main_data(), [107, 108, 109, 110]);
    assert_eq!(
        (record.origin(), record.toplevel_xid()),
        (Some(9), Some(513))
    );
    assert!(record.is_whole());
    let blocks: Vec<_> = record.blocks().collect();
    assert_eq!(blocks.len(), 2);
    let (first, second) = (blocks[0], blocks[1]);
    assert_eq!(
        first.image,
        Some(BlockImage {
            bytes: 100,
            hole_offset: 40,
            hole_bytes: 8000,
            compression: ImageCompression::Pglz,
            apply: true,
        })
    );
    assert_eq!((first.id, first.block, first.will_init), (0, 77, true));
    assert_eq!(first.image_bytes.len(), 100);
    assert_eq!(first.data, [100, 101, 102, 103, 104]);
    assert_eq!(
        (second.id, second.relation, second.fork),
        (3, RELATION, Fork::VISIBILITY_MAP)
    );
    assert_eq!((second.data, second.will_init), (&[105, 106][..], false));
    // A switch has no body.
    let switch = read(PgVersion::V15, &[], 0).expect("it is sound");
    assert!(switch.main_data().is_empty() && switch.blocks().next().is_none());
}

#[test]
fn the_bits_of_an_image_differ_by_version() {
    use ImageCompression::{Lz4, None as Plain, Pglz, Zstd};

    let old = &[PgVersion::V13, PgVersion::V14][..];
    let new = &[
        PgVersion::V15,
        PgVersion::V16,
        PgVersion::V17,
        PgVersion::V18,
    ][..];
    for (versions, info, compression, apply) in [
        (old, 0x01, Plain, false),
        (old, 0x05, Plain, true),
        (old, 0x03, Pglz, false),
        (old, 0x07, Pglz, true),
        (new, 0x01, Plain, false),
        (new, 0x03, Plain, true),
        (new, 0x05, Pglz, false),
        (new, 0x07, Pglz, true),
        (new, 0x0B, Lz4, true),
        (new, 0x13, Zstd, true),
    ] {
        let hole = (compression != Plain).then_some(3000);
        let headers = image(100, 40, info, hole).header();
        for version in versions {
            let record = read(*version, &headers, 100).expect("it is sound");
            let image = record.blocks().next().and_then(|block| block.image);
            let image = image.expect("an image");
            assert_eq!((image.compression, image.apply), (compression, apply));
            let hole_bytes = if compression == Plain {
                8192 - 100
            } else {
                3000
            };
            assert_eq!(image.hole_bytes, hole_bytes);
        }
    }
}

#[test]
fn what_postgresql_refuses_is_refused() {
    let sound = |version, block: &Block, data| read(version, &block.header(), data).is_some();
    let v15 = PgVersion::V15;
    let plain = Block {
        id: 0,
        flags: 0x20,
        data: 3,
        image: None,
    };
    assert!(sound(v15, &plain, 3));
    assert!(!sound(v15, &plain, 2) && !sound(v15, &plain, 4));
    for wrong in [
        // HAS_DATA without data and the reverse; no relation at all; a number that is too high.
        Block {
            data: 0,
            ..plain.clone()
        },
        Block {
            flags: 0,
            ..plain.clone()
        },
        Block {
            flags: 0xA0,
            ..plain.clone()
        },
        Block { id: 33, ..plain },
    ] {
        let data = usize::from(wrong.data);
        assert!(!sound(v15, &wrong, data), "{wrong:?}");
    }
    // Images: whole page, hole, compressed.
    for (length, offset, info, hole, expected) in [
        (8192, 0, 0x02, None, true),
        (8191, 0, 0x02, None, false),
        (8192, 8, 0x02, None, false),
        (8192, 8, 0x03, None, false),
        (8000, 0, 0x03, None, false),
        (8000, 8, 0x03, None, true),
        (9000, 8, 0x03, None, false),
        (500, 0, 0x06, None, true),
        (8192, 0, 0x06, None, false),
        (500, 8, 0x07, Some(0), false),
        (500, 0, 0x07, Some(8), false),
        (500, 8, 0x07, Some(8), true),
        (500, 8, 0x0F, Some(8), false),
    ] {
        let block = image(length, offset, info, hole);
        let data = usize::from(length);
        assert_eq!(sound(v15, &block, data), expected, "{block:?}");
    }
    // Two blocks in the wrong order; an item that the version does not have; one that no version
    // has.
    let twice = [plain.header(), plain.header()].concat();
    assert!(read(v15, &twice, 6).is_none());
    let toplevel = [252, 1, 0, 0, 0, 255, 1];
    assert!(read(PgVersion::V14, &toplevel, 1).is_some());
    assert!(read(PgVersion::V13, &toplevel, 1).is_none());
    assert!(read(v15, &[200, 255, 1], 1).is_none());
    // Main data longer and shorter than announced; truncated headers.
    assert!(read(v15, &[254, 9, 0, 0, 0], 9).is_some());
    assert!(read(v15, &[254, 9, 0, 0, 0], 8).is_none());
    assert!(read(v15, &[255, 9], 10).is_none());
    assert!(read(v15, &[254, 9, 0], 0).is_none());
    assert!(read(v15, &[0, 0x20, 3], 0).is_none());
}

#[test]
fn the_largest_headers_fit_what_is_kept_of_a_body() {
    let blocks = (0..=32).flat_map(|id| {
        let block = image(8000, 8, 0x07, Some(8));
        Block { id, ..block }.header()
    });
    let mut headers: Vec<u8> = blocks.collect();
    headers.extend([253, 9, 0, 252, 1, 2, 0, 0, 254]);
    headers.extend(70_000_u32.to_le_bytes());
    assert!(headers.len() <= STRUCTURE_BYTES, "{}", headers.len());
    let data = 33 * 8000 + 70_000;
    let whole = read(PgVersion::V18, &headers, data).expect("it is sound");
    let mut window = whole;
    window.body = &whole.body[..STRUCTURE_BYTES];
    window.read_structure().expect("it is sound by its front");
    assert!(!window.is_whole() && window.main_data().is_empty());
    assert_eq!(window.blocks().count(), 33);
    assert!(window.blocks().all(|block| block.image_bytes.is_empty()));
}

#[test]
fn resource_managers_have_their_names_and_versions() {
    assert_eq!(ResourceManager::XLOG.name(), Some("XLOG"));
    assert_eq!(ResourceManager(21).name(), Some("LogicalMessage"));
    assert_eq!(ResourceManager(22).name(), None);
    for version in PgVersion::ALL {
        assert!(ResourceManager(21).exists_in(version));
        assert!(!ResourceManager(22).exists_in(version));
        assert!(!ResourceManager(127).exists_in(version));
        assert_eq!(
            ResourceManager(128).exists_in(version),
            version >= PgVersion::V15
        );
    }
}
