//! Encryption over a folder: the contract of any store, and that no modified object decrypts.

use std::{fs, path::Path};

use super::*;
use crate::{ClusterIdentity, Repository, store::LocalStore, store::testing::conformance};

const ONE: &str = "1111111111111111111111111111111111111111111111111111111111111111";
const TWO: &str = "2222222222222222222222222222222222222222222222222222222222222222";

fn store(directory: &Path, cluster: &str, keys: &[&str]) -> EncryptedStore {
    let inner = Arc::new(LocalStore::open(directory).expect("a folder"));
    let ring = KeyRing::parse(&keys.join("\n")).expect("keys");
    EncryptedStore::new(inner, cluster, Arc::new(ring))
}

/// Returns every file below a folder with its content.
fn files(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let inner = LocalStore::open(directory).expect("a folder");
    let mut names = Vec::new();
    inner
        .list("", &mut |object| {
            names.push(object.key);
            ControlFlow::Continue(())
        })
        .expect("it lists");
    names
        .into_iter()
        .map(|name| {
            let content = fs::read(directory.join(&name)).expect("a file");
            (name, content)
        })
        .collect()
}

fn text(length: usize) -> Vec<u8> {
    b"CREATE TABLE secrets "
        .iter()
        .copied()
        .cycle()
        .take(length)
        .collect()
}

#[test]
fn an_encrypted_store_is_a_store() {
    let directory = tempfile::tempdir().expect("a directory");
    let store: Arc<dyn ObjectStore> = Arc::new(store(directory.path(), "main", &[ONE]));
    conformance(&store, 3);
}

#[test]
fn every_length_and_range_comes_back_and_nothing_is_readable() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = store(directory.path(), "main", &[ONE]);
    let frame = 65536;
    for length in [
        0,
        1,
        15,
        16,
        17,
        frame - 1,
        frame,
        frame + 1,
        2 * frame,
        2 * frame + 7,
    ] {
        let key = format!("main/wal/{length}");
        let plain = text(length);
        store.put_if_absent(&key, &plain).expect("a put");
        assert_eq!(store.get(&key).expect("a get"), plain);
        let head = store.head(&key).expect("a head").expect("it is there");
        assert_eq!(head.size, length as u64);
        for start in [0, 1, length / 2, length.saturating_sub(1), length] {
            for end in [start, start + 1, length].map(|end| end.min(length)) {
                if start <= end {
                    let range = start as u64..end as u64;
                    let got = store.get_range(&key, range).expect("a range");
                    assert_eq!(got, plain[start..end], "{start}..{end} of {length}");
                }
            }
        }
        let outside = store.get_range(&key, 0..length as u64 + 1);
        assert!(outside.is_err(), "beyond the end of {length}");
    }
    for (name, content) in files(directory.path()) {
        let readable = content.windows(6).any(|bytes| bytes == b"secret");
        assert!(!readable, "{name} can be read");
    }
}

#[test]
fn a_flip_of_any_byte_is_detected() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = store(directory.path(), "main", &[ONE]);
    store.put_if_absent("main/x", &text(300)).expect("a put");
    let path = directory.path().join("main/x.enc");
    let sound = fs::read(&path).expect("the object");
    assert_eq!(sound.len(), 72 + 300 + 16);
    for at in 0..sound.len() {
        let mut damaged = sound.clone();
        damaged[at] ^= 1;
        fs::write(&path, &damaged).expect("a file");
        let whole = store.get("main/x").expect_err("a flip");
        assert!(
            matches!(whole, Error::Damaged { .. }),
            "byte {at}: {whole:?}"
        );
        let range = store.get_range("main/x", 100..200).expect_err("a flip");
        assert!(
            matches!(range, Error::Damaged { .. }),
            "byte {at}: {range:?}"
        );
    }
}

#[test]
fn frames_can_not_be_cut_off_swapped_or_moved_to_another_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = store(directory.path(), "main", &[ONE]);
    let frame = 65536 + 16;
    for name in ["main/x", "main/y"] {
        store.put_if_absent(name, &text(3 * 65536)).expect("a put");
    }
    let at = |name: &str| directory.path().join(format!("main/{name}.enc"));
    let (x, y) = (
        fs::read(at("x")).expect("an object"),
        fs::read(at("y")).expect("an object"),
    );
    let refused = |bytes: &[u8], what: &str| {
        fs::write(at("x"), bytes).expect("a file");
        let error = store.get("main/x").expect_err(what);
        assert!(matches!(error, Error::Damaged { .. }), "{what}: {error:?}");
    };
    refused(&y, "the whole of another object");
    refused(&x[..72 + 2 * frame], "two frames of three");
    refused(&x[..x.len() - 1], "all but a byte");
    refused(&x[..40], "half a header");
    refused(b"", "nothing");
    refused(&[&x[..], b"\0"].concat(), "a byte more");
    let swapped = [
        &x[..72],
        &x[72 + frame..72 + 2 * frame],
        &x[72..72 + frame],
        &x[72 + 2 * frame..],
    ];
    refused(&swapped.concat(), "two frames in the other order");
    let mixed = [&x[..72 + frame], &y[72 + frame..]];
    refused(&mixed.concat(), "frames of two objects");
    refused(&text(300), "a plain text");
    // A truncated object cannot be read as a shorter one.
    fs::write(at("x"), &x[..72 + 2 * frame]).expect("a file");
    let size = store.head("main/x").expect("a head").expect("it is there");
    let end = store.get_range("main/x", size.size - 100..size.size);
    assert!(
        end.is_ok_and(|bytes| bytes.len() == 100),
        "the frame itself is sound"
    );
    let beyond = store.get_range("main/x", 2 * 65536..3 * 65536);
    let beyond = beyond.expect_err("it is not there");
    assert!(matches!(beyond, Error::Damaged { .. }), "{beyond:?}");
}

#[test]
fn a_wrong_key_is_named_before_anything_is_written_or_deleted() {
    let directory = tempfile::tempdir().expect("a directory");
    let right = store(directory.path(), "main", &[ONE]);
    right.put_if_absent("main/x", b"x").expect("a put");
    let before = files(directory.path());
    let wrong = store(directory.path(), "main", &[TWO]);
    let ids = |text: &str| KeyRing::parse(text).expect("a key").first().id.to_string();
    for refused in [
        wrong.put_if_absent("main/z", b"z").map(drop),
        wrong.delete("main/x"),
        wrong.get("main/x").map(drop),
        wrong.ready_to_write(),
        wrong.rewrap().map(drop),
    ] {
        let error = refused.expect_err("the key is wrong");
        assert_eq!(error.exit_kind(), crate::ExitKind::Usage);
        let said = error.to_string();
        assert!(
            said.contains(&ids(ONE)) && said.contains(&ids(TWO)),
            "{said}"
        );
    }
    assert_eq!(files(directory.path()), before, "nothing was touched");
}

#[test]
fn a_new_key_starts_at_once_and_rewrapping_changes_no_object() {
    let directory = tempfile::tempdir().expect("a directory");
    let old = store(directory.path(), "main", &[ONE]);
    old.put_if_absent("main/old", b"old").expect("a put");
    let both = store(directory.path(), "main", &[TWO, ONE]);
    assert_eq!(both.get("main/old").expect("a get"), &b"old"[..]);
    both.put_if_absent("main/new", b"new").expect("a put");
    // The old key cannot decrypt what is encrypted from now on.
    let data_key = |name: &str| {
        let object = fs::read(directory.path().join(format!("main/{name}.enc")));
        object.expect("an object")[16..32].to_vec()
    };
    assert_ne!(data_key("old"), data_key("new"));
    let only_new = || store(directory.path(), "main", &[TWO]);
    let closed = only_new()
        .get("main/old")
        .expect_err("it was not wrapped again");
    assert!(matches!(closed, Error::Key { .. }), "{closed:?}");
    let before = files(directory.path());
    // The old data key for the new key, and the new data key for the old key.
    assert_eq!(both.rewrap().expect("it wraps"), 2);
    assert_eq!(both.rewrap().expect("again"), 0);
    let after = files(directory.path());
    assert!(before.iter().all(|file| after.contains(file)));
    assert_eq!(after.len(), before.len() + 4);
    for name in ["old", "new"] {
        let key = format!("main/{name}");
        assert_eq!(only_new().get(&key).expect("a get"), name.as_bytes());
    }
    only_new()
        .put_if_absent("main/newer", b"newer")
        .expect("a put");
    assert_eq!(data_key("new"), data_key("newer"));
}

#[test]
fn a_damaged_data_key_is_read_from_its_copy() {
    let directory = tempfile::tempdir().expect("a directory");
    let first = store(directory.path(), "main", &[ONE]);
    first.put_if_absent("main/x", b"x").expect("a put");
    let wrapped = files(directory.path());
    let wrapped = wrapped
        .iter()
        .find(|(name, _)| name.starts_with("main/keys/"));
    let (name, content) = wrapped.expect("a wrapped key");
    for at in 0..content.len() {
        let mut damaged = content.clone();
        damaged[at] ^= 1;
        fs::write(directory.path().join(name), damaged).expect("a file");
        let again = store(directory.path(), "main", &[ONE]);
        assert_eq!(again.get("main/x").expect("a get"), &b"x"[..], "byte {at}");
    }
}

#[test]
fn plain_and_encrypted_clusters_refuse_each_other_s_place() {
    let identity = |cluster: &str| ClusterIdentity {
        format_version: 1,
        cluster: cluster.parse().expect("a name"),
        system_identifier: wal_format::SystemIdentifier(7),
        postgresql_major: wal_format::PgVersion::ALL[4],
        wal_segment_size: wal_format::SegmentSize::DEFAULT,
        created: wal_format::PgTimestamp::from_jiff(jiff::Timestamp::now()),
    };
    let directory = tempfile::tempdir().expect("a directory");
    let name = |cluster: &str| cluster.parse().expect("a name");
    let plain = |cluster: &str| {
        let store = Arc::new(LocalStore::open(directory.path()).expect("a folder"));
        Repository::with_store(store, name(cluster))
    };
    let encrypted = |cluster: &str| {
        let store = Arc::new(store(directory.path(), cluster, &[ONE]));
        Repository::with_store(store, name(cluster))
    };
    plain("a").claim(&identity("a")).expect("a claim");
    encrypted("b").claim(&identity("b")).expect("a claim");
    for (repository, cluster) in [(encrypted("a"), "a"), (plain("b"), "b")] {
        let before = files(directory.path());
        let refused = repository
            .claim(&identity(cluster))
            .expect_err("it is of the other kind");
        assert!(matches!(refused, Error::Key { .. }), "{refused:?}");
        assert_eq!(files(directory.path()), before);
    }
    assert!(encrypted("b").identity().expect("it reads").is_some());
}

#[test]
fn a_stray_plain_object_blocks_nothing_and_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let identity = ClusterIdentity {
        format_version: 1,
        cluster: "main".parse().expect("a name"),
        system_identifier: wal_format::SystemIdentifier(7),
        postgresql_major: wal_format::PgVersion::ALL[4],
        wal_segment_size: wal_format::SegmentSize::new(1 << 20).expect("a size"),
        created: wal_format::PgTimestamp(0),
    };
    let open = || {
        let store = Arc::new(store(directory.path(), "main", &[ONE]));
        Repository::with_store(store, identity.cluster.clone())
    };
    open().claim(&identity).expect("a claim");
    let header = wal_format::SealedHeader::of_segment(
        identity.system_identifier,
        identity.postgresql_major,
        wal_format::Branch::FIRST,
        identity.wal_segment_size,
        wal_format::SegmentNo(3),
    );
    let mut writer = wal_format::SealedWriter::new(header, 1).expect("a writer");
    writer.push(&vec![0; 1 << 20]).expect("it has room");
    let summary = wal_format::SegmentSummary::default();
    let object = writer.finish(&summary, Some(identity.created));
    open()
        .put(&header.key(), &object.expect("whole"))
        .expect("a segment");

    let of_another = wal_format::checked_json::to_vec(&ClusterIdentity {
        system_identifier: wal_format::SystemIdentifier(8),
        ..identity.clone()
    });
    let id = "ab".repeat(16);
    let key = KeyRing::parse(ONE).expect("a key").first().id;
    let strays = [
        "main/7/wal/00000009-0a0b0c0d/00000000/000000090000000000000001.zst".to_owned(),
        "main/epoch-copy/00000001.json".to_owned(),
        "main/epoch/00000002.json".to_owned(),
        "main/epoch/junk".to_owned(),
        "main/junk".to_owned(),
    ];
    let wrapped = [
        format!("main/keys/{id}/{key}.json"),
        format!("main/keys/{id}/0011223344556677.json"),
        "main/keys/junk".to_owned(),
    ];
    let of_another = of_another.expect("JSON");
    for name in strays.iter().chain(&wrapped) {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, &of_another).expect("a stray object");
    }
    for lost in [false, true] {
        if lost {
            for folder in ["epoch", "epoch-copy"] {
                let path = directory
                    .path()
                    .join(format!("main/{folder}/00000001.json.enc"));
                fs::remove_file(path).expect("it goes");
            }
            // Without a key, the place does not count as empty.
            let plain = Arc::new(LocalStore::open(directory.path()).expect("a folder"));
            for name in &strays[1..3] {
                fs::remove_file(directory.path().join(name)).expect("it goes");
            }
            let plain = Repository::with_store(plain, identity.cluster.clone());
            let refused = plain.claim(&identity).expect_err("it is encrypted");
            assert!(matches!(refused, Error::Key { .. }), "{refused:?}");
        }
        let epochs = open().read_epochs().expect("it is read");
        assert_eq!(epochs.known[0].identity, identity);
        assert!(epochs.unnamed.is_empty(), "{epochs:?}");
        assert_eq!(open().claim(&identity).expect("a start"), identity);
        let histories = open().read_histories(identity.system_identifier);
        assert!(histories.expect("it lists").lost.is_empty());
    }
    let store = store(directory.path(), "main", &[ONE]);
    store.check_keys().expect("every key that there is");
    let mut named = store.plain_objects().expect("it lists");
    named.sort();
    let mut left = strays.to_vec();
    left.drain(1..3);
    left.push("main/keys/junk".to_owned());
    left.sort();
    assert_eq!(named, left);
    assert!(!store.broken_keys(false).expect("it lists").is_empty());
}

#[test]
fn a_key_is_not_made_for_a_cluster_that_is_archived_in_plain() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("main/epoch/00000001.json");
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    fs::write(path, "{}").expect("an epoch");
    let before = files(directory.path());
    let error = store(directory.path(), "main", &[ONE]).rewrap();
    let error = error.expect_err("it is plain").to_string();
    assert!(error.contains("is not encrypted"), "{error}");
    assert_eq!(files(directory.path()), before);
}

/// The object was created by an independent implementation from `FORMAT.md` alone: the Python code
/// of its last chapter, in reverse.
#[test]
fn an_object_of_another_implementation_opens() {
    let data = DataKey::of_test([7; 16], [9; 32]);
    let object = object::seal(&data, &[5; 32], "main/x", b"hello, world").expect("it seals");
    assert_eq!(
        hex::encode(&object[72..]),
        "e8e1d5d289408d649369c124e5e270a5e72de17c8af92cd876b27277"
    );
    let header = Header::parse(&object).expect("a header");
    let plain = object::open(&header, &data, "main/x", &object).expect("it opens");
    assert_eq!(plain, b"hello, world");
}

#[test]
fn lost_keys_come_back_from_memory_and_are_never_replaced_by_new_ones() {
    let directory = tempfile::tempdir().expect("a directory");
    let first = store(directory.path(), "main", &[ONE, TWO]);
    first.put_if_absent("main/a", b"content").expect("stored");
    assert_eq!(first.rewrap().expect("rewrapped"), 1);
    let running = store(directory.path(), "main", &[ONE, TWO]);
    running.check_keys().expect("keys");
    let stored = || -> Vec<String> {
        let names = files(directory.path()).into_iter().map(|file| file.0);
        names.filter(|name| name.starts_with("main/keys")).collect()
    };
    let remove = |names: &[String]| {
        for name in names {
            fs::remove_file(directory.path().join(name)).expect("it goes");
        }
    };
    let all = stored();
    assert_eq!(all.len(), 4, "{all:?}");
    remove(&all);
    let other = store(directory.path(), "main", &[ONE, TWO]);
    for error in [
        other.put_if_absent("main/b", b"content").map(drop),
        other.get("main/a").map(drop),
    ] {
        let error = error.expect_err("the keys are lost").to_string();
        assert!(error.contains("main/keys/ or main/keys-copy/"), "{error}");
    }
    assert_eq!(stored(), Vec::<String>::new(), "no new key is made");
    let mut lost = running.put_back_keys().expect("stored again");
    lost.sort();
    assert_eq!(lost, all);
    assert_eq!(stored(), all);
    assert_eq!(running.put_back_keys().expect("nothing is lost"), [""; 0]);
    let other = store(directory.path(), "main", &[TWO]);
    assert_eq!(other.get("main/a").expect("it opens"), "content");

    // A lost copy comes back. A wrapping whose copies were both removed does not, because the data
    // key has another one.
    remove(&all[..1]);
    assert_eq!(running.put_back_keys().expect("stored again"), all[..1]);
    let of_one: Vec<String> = all
        .iter()
        .filter(|name| name.ends_with(&all[0][all[0].len() - 21..]))
        .cloned()
        .collect();
    assert_eq!(of_one.len(), 2, "{of_one:?}");
    remove(&of_one);
    assert_eq!(running.put_back_keys().expect("nothing is lost"), [""; 0]);
}
