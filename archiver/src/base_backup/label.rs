//! `backup_label` (`build_backup_content` in `xlogbackup.c`), as far as a backup has to know it.

use wal_format::Lsn;

use super::malformed;
use crate::error::Result;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Label {
    pub(super) start_lsn: Lsn,
    pub(super) checkpoint_lsn: Lsn,
    pub(super) from_standby: bool,
}

impl Label {
    pub(super) fn parse(content: &[u8]) -> Result<Self> {
        let text = String::from_utf8_lossy(content);
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.ok_or_else(|| malformed(format!("backup_label has no line \"{name}\"")))
        };
        let lsn = |name: &str| {
            let word = field(name)?.split_whitespace().next().unwrap_or_default();
            word.parse()
                .map_err(|error| malformed(format!("backup_label, \"{name}\": {error}")))
        };
        Ok(Self {
            start_lsn: lsn("START WAL LOCATION: ")?,
            checkpoint_lsn: lsn("CHECKPOINT LOCATION: ")?,
            from_standby: field("BACKUP FROM: ")?.trim() == "standby",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_of_postgresql_parses() {
        let text = b"START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000080\n\
                     BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-21 10:00:00 UTC\nLABEL: x\n\
                     START TIMELINE: 1\n";
        let label = Label::parse(text).expect("it parses");
        assert_eq!(
            (label.start_lsn, label.checkpoint_lsn),
            (Lsn(0x200_0028), Lsn(0x200_0080))
        );
        assert!(!label.from_standby);
        assert!(Label::parse(b"START WAL LOCATION: 0/2000028\n").is_err());
        assert!(Label::parse(b"").is_err());
    }
}
