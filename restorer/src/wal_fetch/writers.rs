//! Writers for delivered WAL: [`Ending`] ends the WAL at an LSN, [`Changed`] applies the changes of
//! a plan.

use std::{
    borrow::Cow,
    io::{self, Write},
};

use wal_format::{Lsn, WalChange};

/// Writes WAL up to `end` and zeros after it. PostgreSQL reads zeros as the end of WAL.
pub(super) struct Ending<'a> {
    pub(super) out: &'a mut dyn Write,
    /// The LSN of the next byte.
    pub(super) at: Lsn,
    pub(super) end: Lsn,
}

impl Write for Ending<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let next = self.at.add(bytes.len() as u64);
        if next <= self.end {
            self.out.write_all(bytes)?;
        } else {
            let mut bytes = bytes.to_vec();
            end_at(&mut bytes, self.at, self.end);
            self.out.write_all(&bytes)?;
        }
        self.at = next;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Replaces the WAL from `end` on with zeros. `start` is the LSN of the first byte.
pub(super) fn end_at(wal: &mut [u8], start: Lsn, end: Lsn) {
    let kept = index(end.max(start).bytes_since(start));
    if let Some(rest) = wal.get_mut(kept..) {
        rest.fill(0);
    }
}

/// Writes WAL with the plan's changes applied.
pub(super) struct Changed<'a> {
    pub(super) out: &'a mut dyn Write,
    /// The LSN of the next byte.
    pub(super) at: Lsn,
    pub(super) changes: &'a [WalChange],
}

impl Write for Changed<'_> {
    /// Writes all of `bytes`. Fails if the WAL does not contain the old bytes of a change, because
    /// the plan was then made for other WAL.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let end = self.at.add(bytes.len() as u64);
        let mut bytes = Cow::Borrowed(bytes);
        for change in self.changes {
            let (old, new) = change.bytes().ok_or_else(|| refused("malformed", change))?;
            let change_end = change.lsn.add(old.len() as u64);
            let (from, to) = (change.lsn.max(self.at), change_end.min(end));
            if from >= to {
                continue;
            }
            let length = index(to.bytes_since(from));
            let (here, there) = (
                index(from.bytes_since(self.at)),
                index(from.bytes_since(change.lsn)),
            );
            let place = bytes.to_mut().get_mut(here..here.saturating_add(length));
            let old = old.get(there..there.saturating_add(length));
            let new = new.get(there..there.saturating_add(length));
            match (place, old, new) {
                (Some(place), Some(old), Some(new)) if place == old => place.copy_from_slice(new),
                _ => return Err(refused("for other WAL than is archived", change)),
            }
        }
        self.out.write_all(&bytes)?;
        self.at = end;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn refused(problem: &str, change: &WalChange) -> io::Error {
    let text = format!("the plan's change at {} is {problem}", change.lsn);
    io::Error::new(io::ErrorKind::InvalidData, text)
}
