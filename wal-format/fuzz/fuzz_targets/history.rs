//! Arbitrary bytes as a timeline's history file. A file that parses is written again, and must
//! parse to the same history.
//!
//! Input: the timeline (1 byte) and the file.
#![no_main]

use std::fmt::Write;

use libfuzzer_sys::fuzz_target;
use wal_format::{Lsn, TimelineHistory, TimelineId};

fuzz_target!(|input: &[u8]| {
    let Some((timeline, content)) = input.split_first() else {
        return;
    };
    let Some(timeline) = TimelineId::new(u32::from(*timeline)) else {
        return;
    };
    let Ok(history) = TimelineHistory::parse(timeline, content) else {
        return;
    };
    assert!(!history.ancestors.is_empty());
    let mut text = String::new();
    for entry in &history.ancestors {
        assert!(entry.timeline < timeline);
        let _ = writeln!(
            text,
            "{}\t{}\t{}",
            entry.timeline, entry.switch_lsn, entry.reason
        );
        assert!(history.names(entry.timeline));
        let _ = history.timeline_at(entry.switch_lsn);
    }
    assert_eq!(history.timeline_at(Lsn::MAX), timeline);
    assert_eq!(
        TimelineHistory::parse(timeline, text.as_bytes()),
        Ok(history)
    );
});
