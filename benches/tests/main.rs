//! The main job on every PostgreSQL that is installed. One test after the other: two cores serve everybody.

use std::time::Duration;

use benches::{main_job, tools::servers_or_skip};

fn job(bin: std::path::PathBuf, segment_mib: u32, kill_archiver: bool) -> main_job::Job {
    main_job::Job {
        bin,
        segment_mib,
        clients: 4,
        load: Duration::from_secs(3),
        kill_archiver,
        kills: 0,
        http: "127.0.0.1:0".to_owned(),
    }
}

#[test]
fn nothing_acknowledged_is_lost_on_any_version() {
    for (at, (major, bin)) in servers_or_skip().into_iter().enumerate() {
        // Every segment size and both ways to die meet some version.
        let segment_mib = [1, 16, 64][at % 3];
        let say = |text: &str| eprintln!("PostgreSQL {major}: {text}");
        let outcome = main_job::run(&job(bin, segment_mib, at % 2 == 1), &say)
            .unwrap_or_else(|error| panic!("PostgreSQL {major}: {error:?}"));
        assert!(outcome.latest.acknowledged > 50, "{outcome:?}");
        assert!(
            outcome.middle.present < outcome.latest.present,
            "{outcome:?}"
        );
    }
}

#[test]
fn killed_again_and_again_the_archiver_loses_nothing_acknowledged() {
    let Some((major, bin)) = servers_or_skip().pop() else {
        return;
    };
    let kills = if std::env::var_os("TIDEMARK_LONG").is_some() {
        100
    } else {
        6
    };
    // Small segments: a kill meets every step of completing one.
    let job = main_job::Job {
        kills,
        ..job(bin, 1, true)
    };
    let outcome = main_job::run(&job, &|text| eprintln!("PostgreSQL {major}: {text}"))
        .unwrap_or_else(|error| panic!("PostgreSQL {major}: {error:?}"));
    assert!(outcome.latest.acknowledged > 50, "{outcome:?}");
}
