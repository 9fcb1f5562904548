use super::*;

const SYSTEM: SystemIdentifier = SystemIdentifier(7);

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).expect("a timeline")
}

/// The state of database 5 at `lsn`: file, table, and whether the file is the table's.
fn read(on: u32, lsn: u64, files: &[(u32, u32, bool)]) -> ReadDatabase {
    let named = |(file, table, is_table): &(u32, u32, bool)| {
        let name = format!("public.t{table}");
        let table = *table;
        let is_table = *is_table;
        (
            *file,
            NamedFile {
                table,
                name,
                is_table,
            },
        )
    };
    ReadDatabase {
        name: "app".to_owned(),
        timeline: timeline(on),
        lsn: Lsn(lsn),
        files: files.iter().map(named).collect(),
        is_complete: true,
    }
}

fn file(relation: u32) -> RelationFile {
    RelationFile {
        tablespace: 1663,
        database: 5,
        relation,
    }
}

fn describe(names: &RelationNames, lsn: u64, relations: &[u32]) -> String {
    describe_on(names, 1, lsn, relations, &[lsn])
}

/// Returns the description without the last part, which names the transaction.
fn describe_on(
    names: &RelationNames,
    on: u32,
    lsn: u64,
    relations: &[u32],
    removals: &[u64],
) -> String {
    let files: Vec<RelationFile> = relations.iter().copied().map(file).collect();
    let removals = removals.iter().map(|lsn| (5, Lsn(*lsn))).collect();
    let removal = Removal {
        xid: 9,
        timeline: timeline(on),
        lsn: Lsn(lsn),
        files: &files,
    };
    let text = names.describe(removal, &removals);
    let end = "; `pitr-restore locate --xid 9` shows the transaction";
    text.strip_suffix(end).expect("the command").to_owned()
}

fn known(files: &[(u32, u32, bool)]) -> RelationNames {
    let mut names = RelationNames::of_system(RelationNames::default(), SYSTEM);
    assert!(names.learn(5, read(1, 100, files)));
    names
}

#[test]
fn a_removed_table_is_named_and_what_happened_is_told_once_it_is_proved() {
    let (table, index, other) = ((20, 1, true), (21, 1, false), (30, 2, true));
    let mut names = known(&[table, index, other]);
    let undecided = "table dropped, truncated or rewritten: public.t1 (database app)";
    assert_eq!(describe(&names, 150, &[20, 21]), undecided);
    // The commit may not be visible yet to a reading after it.
    assert!(!names.learn(5, read(1, 200, &[table, index, other])));
    assert_eq!(describe(&names, 150, &[20, 21]), undecided);
    let mut truncated = names.clone();
    assert!(names.learn(5, read(1, 300, &[other])));
    let dropped = "table dropped: public.t1 (database app)";
    assert_eq!(describe(&names, 150, &[20, 21]), dropped);
    let text = describe(&names, 150, &[20, 21, 40]);
    let unknown = "a table or an index was dropped, truncated or rewritten (file 40 in database 5, \
                   name not known)";
    assert_eq!(text, format!("{dropped}; {unknown}"));
    // A later removal before the reading may be the drop, and this one a truncate.
    assert_eq!(describe_on(&names, 1, 150, &[20], &[150, 250]), undecided);
    assert_eq!(describe_on(&names, 1, 150, &[20], &[150, 350]), dropped);

    assert!(truncated.learn(5, read(1, 300, &[(22, 1, true), (23, 1, false), other])));
    let rewritten = "table truncated or rewritten: public.t1 (database app)";
    assert_eq!(describe(&truncated, 150, &[20, 21]), rewritten);
    // A drop afterwards does not change what the first removal was.
    assert!(truncated.learn(5, read(1, 400, &[other])));
    assert_eq!(describe(&truncated, 150, &[20, 21]), rewritten);
    assert_eq!(describe(&truncated, 350, &[22, 23]), dropped);
    let text = describe(&truncated, 350, &[23]);
    assert_eq!(text, "index of public.t1 dropped or rebuilt (database app)");
}

#[test]
fn many_tables_are_listed_up_to_three() {
    let files: Vec<_> = (1..=5).map(|table| (table + 20, table, true)).collect();
    let mut names = known(&files);
    assert!(names.learn(5, read(1, 300, &[])));
    let text = describe(&names, 150, &[21, 22, 23, 24, 25]);
    let expected = "tables dropped: public.t1, public.t2, public.t3 and 2 more (database app)";
    assert_eq!(text, expected);
}

#[test]
fn a_name_is_of_its_timeline_and_of_its_server_only() {
    let mut names = known(&[(20, 1, true)]);
    let unknown = "a table or an index was dropped, truncated or rewritten (file 20 in database 5, \
                   name not known)";
    assert_eq!(describe_on(&names, 2, 150, &[20], &[150]), unknown);
    // On timeline 2, the number is another table's; the one of timeline 1 is not known to be gone.
    assert!(names.learn(5, read(2, 300, &[(20, 8, true)])));
    assert_eq!(describe(&names, 150, &[20]), unknown);
    let text = describe_on(&names, 2, 350, &[20], &[350]);
    assert!(text.contains("public.t8"), "{text}");

    let stored = known(&[(20, 1, true)]);
    let same = RelationNames::of_system(stored.clone(), SYSTEM);
    assert!(describe(&same, 150, &[20]).contains("public.t1"));
    let other = RelationNames::of_system(stored, SystemIdentifier(8));
    assert_eq!(describe(&other, 150, &[20]), unknown);
}

#[test]
fn the_names_of_a_dropped_database_are_kept_and_all_of_it_is_bounded() {
    let mut names = known(&[(20, 1, true)]);
    assert!(!names.retain(&BTreeSet::from([5])));
    assert!(names.retain(&BTreeSet::new()));
    assert!(describe(&names, 150, &[20]).contains("public.t1"));
    let many = |from: u32| (from..from + 30_000).map(|file| (file, file, true));
    let mut names = known(&many(1).collect::<Vec<_>>());
    assert_eq!(names.databases[&5].files.len(), FILES_MAX);
    // The newest are kept.
    assert!(names.databases[&5].files.contains_key(&30_000));
    // A reading that is not complete proves nothing of the files that it lacks.
    let mut partial = names.clone();
    let partly = ReadDatabase {
        is_complete: false,
        ..read(1, 300, &[])
    };
    assert!(partial.learn(5, partly));
    let text = describe(&partial, 150, &[30_000]);
    assert!(
        text.starts_with("table dropped, truncated or rewritten"),
        "{text}"
    );
    assert!(names.learn(5, read(1, 300, &[])));
    assert_eq!(names.databases[&5].removed.len(), REMOVED_MAX);
    assert_eq!(names.order.len(), REMOVED_MAX);
}
