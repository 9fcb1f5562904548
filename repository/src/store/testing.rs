//! The conformance suite that every store implementation must pass.

use std::{ops::ControlFlow, sync::Arc, thread};

use super::{ObjectStore, PutOutcome};

fn keys(store: &dyn ObjectStore, prefix: &str) -> Vec<String> {
    let mut keys = Vec::new();
    store
        .list(prefix, &mut |object| {
            keys.push(object.key);
            ControlFlow::Continue(())
        })
        .expect("it lists");
    keys
}

/// Runs the whole suite on an empty store. `races` is the number of races of sixteen writers each,
/// which are slow on a distributed store.
///
/// # Panics
/// On the first violated guarantee of [`ObjectStore`].
pub fn conformance(store: &Arc<dyn ObjectStore>, races: u32) {
    let absent = store.get("a/nothing").expect_err("nothing is there");
    assert!(absent.is_not_found(), "{absent}");
    assert!(
        store
            .head("a/nothing")
            .expect("absence is an answer")
            .is_none()
    );
    store.delete("a/nothing").expect("deleting nothing is fine");

    assert_eq!(
        store.put_if_absent("a/one", b"first").expect("a put"),
        PutOutcome::Created
    );
    assert_eq!(
        store.put_if_absent("a/one", b"other").expect("a put"),
        PutOutcome::AlreadyExists
    );
    assert_eq!(
        &store.get("a/one").expect("a get")[..],
        b"first",
        "a put must not replace"
    );
    assert_eq!(
        store
            .head("a/one")
            .expect("a head")
            .expect("it is there")
            .size,
        5
    );
    assert_eq!(&store.get_range("a/one", 1..3).expect("a range")[..], b"ir");
    assert!(
        store.get_range("a/one", 3..9).is_err(),
        "a range beyond the end is an error"
    );
    assert_eq!(
        store.put_if_absent("empty", b"").expect("a put"),
        PutOutcome::Created
    );
    assert_eq!(store.get("empty").expect("a get").len(), 0);

    for key in ["a/two/x", "a/two-x", "a/three", "b"] {
        store.put_if_absent(key, key.as_bytes()).expect("a put");
    }
    assert_eq!(
        keys(&**store, "a/"),
        ["a/one", "a/three", "a/two-x", "a/two/x"]
    );
    assert_eq!(keys(&**store, "a/two"), ["a/two-x", "a/two/x"]);
    assert_eq!(keys(&**store, "a/two/"), ["a/two/x"]);
    assert_eq!(keys(&**store, "nothing/"), Vec::<String>::new());
    let folders = |prefix: &str| store.folders(prefix).expect("it lists");
    assert_eq!(folders("a/"), ["two"], "a prefix of names is no folder");
    assert_eq!(folders("nothing/"), Vec::<String>::new());
    store.put_if_absent("c/d/e/f", b"f").expect("a put");
    assert_eq!(folders("c/"), ["d"]);
    store.delete("c/d/e/f").expect("a delete");
    let mut seen = 0;
    let stop = &mut |_| {
        seen += 1;
        ControlFlow::Break(())
    };
    store.list("", stop).expect("it lists");
    assert_eq!(seen, 1, "a listing stops when asked to");
    store.delete("a/one").expect("a delete");
    assert!(store.get("a/one").expect_err("it is gone").is_not_found());
    for key in ["", "/", "../x", "a/../x", "a//b", "/a", ".x", "a/.x"] {
        assert!(store.put_if_absent(key, b"x").is_err(), "{key:?} is no key");
    }
    race(store, races);
}

/// Lets sixteen writers put one name: one of them creates the object, and all read its bytes.
fn race(store: &Arc<dyn ObjectStore>, races: u32) {
    for round in 0..races {
        let key = format!("race/{round}");
        let writers: Vec<_> = (0..16u8)
            .map(|writer| {
                let (store, key) = (Arc::clone(store), key.clone());
                thread::spawn(move || store.put_if_absent(&key, &[writer; 4096]).expect("a put"))
            })
            .collect();
        let outcomes: Vec<_> = writers
            .into_iter()
            .map(|writer| writer.join().expect("no panic"))
            .collect();
        let created = outcomes
            .iter()
            .filter(|outcome| **outcome == PutOutcome::Created)
            .count();
        assert_eq!(created, 1, "exactly one writer creates");
        let body = store.get(&key).expect("a get");
        assert!(
            body.len() == 4096 && body.iter().all(|byte| *byte == body[0]),
            "no mixture"
        );
    }
}
