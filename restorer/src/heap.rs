//! Heap pages (`bufpage.h`, `htup_details.h`): the rows of a catalog, in a file of a data directory
//! or of a backup, or in a WAL record.

/// `BLCKSZ`.
pub(crate) const PAGE_BYTES: usize = 8192;
/// `SizeOfPageHeaderData`.
const PAGE_HEADER_BYTES: usize = 24;
/// `SizeofHeapTupleHeader`.
const TUPLE_HEADER_BYTES: usize = 23;
/// `LP_NORMAL`.
const NORMAL: u32 = 1;
/// `NAMEDATALEN`.
const NAME_BYTES: usize = 64;
/// `RELMAPPER_FILEMAGIC`.
const MAP_MAGIC: u32 = 0x0059_2717;

/// The data of a row. The columns of fixed length come first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row<'a>(&'a [u8]);

impl<'a> Row<'a> {
    /// Returns the row of a record's block data: `xl_heap_header`, then the tuple without its
    /// header.
    pub(crate) fn of_record(data: &'a [u8]) -> Option<Self> {
        let (header, rest) = data.split_at_checked(5)?;
        let begins = usize::from(*header.get(4)?).checked_sub(TUPLE_HEADER_BYTES)?;
        Some(Self(rest.get(begins..)?))
    }

    pub(crate) fn u32(self, at: usize) -> Option<u32> {
        let bytes = self.0.get(at..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    }

    /// Returns a column of type `boolean` or `"char"`.
    pub(crate) fn byte(self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    /// Returns a column of type `name`.
    pub(crate) fn name(self, at: usize) -> Option<String> {
        let bytes = self.0.get(at..at + NAME_BYTES)?;
        let text = bytes.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(text).into_owned())
    }
}

/// Returns every row of a file in any order, including rows that were updated or deleted and not
/// yet vacuumed.
pub(crate) fn rows(file: &[u8]) -> impl Iterator<Item = Row<'_>> {
    file.chunks_exact(PAGE_BYTES).flat_map(|page| {
        let u16_at = |at: usize| {
            let bytes = page.get(at..).and_then(<[u8]>::first_chunk);
            bytes.map_or(0, |bytes| usize::from(u16::from_le_bytes(*bytes)))
        };
        let lower = u16_at(12).clamp(PAGE_HEADER_BYTES, PAGE_BYTES);
        let pointers = page[PAGE_HEADER_BYTES..lower].chunks_exact(4);
        pointers.filter_map(move |pointer| {
            let pointer = u32::from_le_bytes(*pointer.first_chunk()?);
            let (offset, flags, length) = (
                pointer & 0x7FFF,
                (pointer >> 15) & 3,
                (pointer >> 17) as usize,
            );
            if flags != NORMAL {
                return None;
            }
            let tuple = page.get(offset as usize..)?.get(..length)?;
            let begins = usize::from(*tuple.get(22)?);
            Some(Row(tuple.get(begins..)?))
        })
    })
}

/// Returns the file of a mapped relation (`RelMapFile` in `relmapper.c`).
pub(crate) fn mapped(map: &[u8], oid: u32) -> Option<u32> {
    let field = |at: usize| {
        let bytes = map.get(at..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    };
    if field(0)? != MAP_MAGIC {
        return None;
    }
    let entries = 0..field(4)?.min(64) as usize;
    let found = entries
        .map(|entry| 8 + 8 * entry)
        .find(|at| field(*at) == Some(oid))?;
    field(found + 4)
}
