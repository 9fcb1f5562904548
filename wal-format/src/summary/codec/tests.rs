//! Tests of the encoding: every summary is decoded to itself, hostile input is refused, and a
//! transaction is small.

use proptest::prelude::*;

use super::*;

fn lsn() -> impl Strategy<Value = Lsn> {
    prop_oneof![
        4 => (0..0x1_0000_0000_u64).prop_map(|lsn| Lsn(lsn & !7)),
        1 => any::<u64>().prop_map(Lsn),
    ]
}

fn time() -> impl Strategy<Value = PgTimestamp> {
    any::<i64>().prop_map(PgTimestamp)
}

fn timeline() -> impl Strategy<Value = TimelineId> {
    (1..=u32::MAX).prop_map(|id| TimelineId::new(id).expect("not zero"))
}

fn transaction() -> impl Strategy<Value = TransactionEnd> {
    (lsn(), any::<u32>(), time(), any::<u8>()).prop_map(|(lsn, xid, time, bits)| TransactionEnd {
        lsn,
        xid,
        time,
        kind: kind_of_bits(bits),
    })
}

fn relation() -> impl Strategy<Value = RelationFile> {
    any::<(u32, u32, u32)>().prop_map(|(tablespace, database, relation)| RelationFile {
        tablespace,
        database,
        relation,
    })
}

fn event() -> impl Strategy<Value = WalEvent> {
    prop_oneof![
        lsn().prop_map(|start_lsn| WalEvent::BackupEnd { start_lsn }),
        (any::<bool>(), lsn(), timeline(), time(), any::<u64>()).prop_map(
            |(online, redo_lsn, timeline, time, next_xid)| WalEvent::Checkpoint {
                kind: if online {
                    CheckpointKind::Online
                } else {
                    CheckpointKind::Shutdown
                },
                redo_lsn,
                timeline,
                time,
                next_xid,
            }
        ),
        (any::<u32>(), prop::collection::vec(relation(), 0..20))
            .prop_map(|(xid, relations)| WalEvent::DroppedRelations { xid, relations }),
        (time(), timeline(), timeline()).prop_map(|(time, timeline, previous_timeline)| {
            WalEvent::EndOfRecovery {
                time,
                timeline,
                previous_timeline,
            }
        }),
        any::<bool>().prop_map(|enabled| WalEvent::FullPageWrites { enabled }),
        lsn().prop_map(|overwritten_lsn| WalEvent::OverwrittenContrecord { overwritten_lsn }),
        (any::<u32>(), time(), any::<String>()).prop_map(|(xid, time, gid)| WalEvent::Prepare {
            xid,
            time,
            gid
        }),
        (time(), any::<String>()).prop_map(|(time, name)| WalEvent::RestorePoint { time, name }),
        Just(WalEvent::Switch),
        (any::<u32>(), any::<String>())
            .prop_map(|(oid, location)| WalEvent::TablespaceCreate { oid, location }),
        any::<u32>().prop_map(|oid| WalEvent::TablespaceDrop { oid }),
        any::<i32>().prop_map(|level| WalEvent::WalLevel { level }),
    ]
}

fn any_summary() -> impl Strategy<Value = SegmentSummary> {
    (
        any::<u64>(),
        prop::array::uniform4(prop::option::of(lsn())),
        prop::collection::vec(transaction(), 0..40),
        prop::collection::vec((lsn(), event()), 0..12),
    )
        .prop_map(
            |(record_count, [first, last, end, open], transactions, events)| SegmentSummary {
                record_count,
                first_record_lsn: first,
                last_record_lsn: last,
                last_record_end_lsn: end,
                open_record_lsn: open,
                transactions,
                events,
            },
        )
}

proptest! {
    #[test]
    fn every_summary_comes_back(summary in any_summary(), base in lsn()) {
        let bytes = summary.encode(base);
        prop_assert_eq!(SegmentSummary::decode(base, &bytes), Ok(summary));
    }

    #[test]
    fn damaged_bytes_give_an_error_or_another_summary_but_no_panic(
        summary in any_summary(),
        at: prop::sample::Index,
        bit in 0..8_u8,
        cut: prop::sample::Index,
    ) {
        let mut bytes = summary.encode(Lsn(0));
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let _ = SegmentSummary::decode(Lsn(0), &bytes);
        bytes[at] ^= 1 << bit;
        let cut = cut.index(bytes.len());
        prop_assert!(SegmentSummary::decode(Lsn(0), &bytes[..cut]).is_err());
    }

    #[test]
    fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = SegmentSummary::decode(Lsn(0), &bytes);
    }
}

#[test]
fn hostile_counts_are_refused_before_anything_is_allocated() {
    // record_count 0, no LSNs, then 2^63 transactions.
    let mut bytes = vec![0, 0];
    put_varint(&mut bytes, 1 << 63);
    assert!(matches!(
        SegmentSummary::decode(Lsn(0), &bytes),
        Err(DecodeSummaryError::Count { left: 0, .. })
    ));
    let mut events = vec![0, 0, 0];
    put_varint(&mut events, 1 << 40);
    events.extend([0; 100]);
    assert!(matches!(
        SegmentSummary::decode(Lsn(0), &events),
        Err(DecodeSummaryError::Count { left: 100, .. })
    ));
    let empty = SegmentSummary::default().encode(Lsn(0));
    assert_eq!(empty, [0, 0, 0, 0]);
    let cases: [(&[u8], DecodeSummaryError); 5] = [
        (
            &[0, 0, 0, 0, 9],
            DecodeSummaryError::TrailingBytes { left: 1 },
        ),
        (&[0, 16, 0, 0], DecodeSummaryError::Range),
        (
            &[0, 0, 0, 1, 0, 99],
            DecodeSummaryError::UnknownEvent { tag: 99 },
        ),
        (&[0, 0, 0, 1, 0, 8, 0, 1, 0xFF], DecodeSummaryError::Utf8),
        // A number with an eleventh byte, or with a tenth that has more than one bit.
        (&[0x80; 12], DecodeSummaryError::Range),
    ];
    for (bytes, error) in cases {
        assert_eq!(SegmentSummary::decode(Lsn(0), bytes), Err(error));
    }
}

#[test]
fn thirty_thousand_transactions_cost_less_than_five_bytes_each_even_uncompressed() {
    // A segment full of small transactions, about 500 bytes and 300 µs apart, with xids nearly in
    // order.
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut noise = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut lsn = 0x16_B300_0000;
    let mut time = 815_000_000_000_000_i64;
    let transactions: Vec<TransactionEnd> = (0..30_000_u32)
        .map(|index| {
            lsn += 400 + noise(25) * 8;
            time += i64::try_from(noise(600)).expect("small") - 50;
            TransactionEnd {
                lsn: Lsn(lsn),
                xid: 0xFFFF_F000_u32
                    .wrapping_add(index)
                    .wrapping_add(noise(8) as u32),
                time: PgTimestamp(time),
                kind: kind_of_bits(u8::from(noise(100) == 0)),
            }
        })
        .collect();
    let summary = SegmentSummary {
        transactions,
        ..SegmentSummary::default()
    };
    let base = Lsn(0x16_B300_0000);
    let bytes = summary.encode(base);
    assert!(bytes.len() < 30_000 * 5, "{} bytes", bytes.len());
    assert_eq!(SegmentSummary::decode(base, &bytes), Ok(summary));
}

#[test]
fn the_bytes_are_those_that_format_md_describes() {
    let base = Lsn(0x100_0000);
    let end = |distance, xid, time, kind| TransactionEnd {
        lsn: base.add(distance),
        xid,
        time: PgTimestamp(time),
        kind,
    };
    let summary = SegmentSummary {
        record_count: 300,
        first_record_lsn: Some(Lsn(base.0 - 16)),
        last_record_lsn: Some(base.add(64)),
        transactions: vec![
            end(64, 700, 10, TransactionEndKind::CommitPrepared),
            end(128, 699, 7, TransactionEndKind::Abort),
        ],
        events: vec![
            (base.add(64), WalEvent::Switch),
            (
                base.add(72),
                WalEvent::RestorePoint {
                    time: PgTimestamp(1),
                    name: "p".to_owned(),
                },
            ),
        ],
        ..SegmentSummary::default()
    };
    let bytes = [
        &[0xAC, 0x02][..],
        &[0b0011, 31, 0x80, 0x01],
        &[2, 0b0110, 3],
        &[8, 8],
        &[0xF8, 0x0A, 1],
        &[20, 5],
        &[2],
        &[0x80, 0x01, 9],
        &[16, 8, 2, 1, b'p'],
    ]
    .concat();
    assert_eq!(summary.encode(base), bytes);
    assert_eq!(SegmentSummary::decode(base, &bytes), Ok(summary));
}
