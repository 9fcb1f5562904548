//! Tests of what the page and the alerts claim about facts that are missing or bad.

use status::light::CauseKind;

use super::{conditions::because, *};

fn place(url: &str, error: Option<&str>) -> repository::store::MemberState {
    repository::store::MemberState {
        url: url.to_owned(),
        queued_objects: 0,
        queued_bytes: 0,
        behind: false,
        lag_seconds: 0.0,
        error: error.map(str::to_owned),
        older: None,
    }
}

#[test]
fn a_place_that_is_away_among_several_is_told() {
    let told = |repositories| {
        let report = ClusterReport {
            repositories,
            ..report()
        };
        let told = status::alerts::firing(&report);
        let told = told.iter().find(|(name, _)| *name == "PitrRepositoryAway");
        told.map(|(_, summary)| summary.clone())
    };
    let fires = |near: Option<&str>, far: Option<&str>| {
        let repositories = vec![place("file:///near", near), place("s3://far/away", far)];
        let report = ClusterReport {
            repositories: repositories.clone(),
            ..report()
        };
        let metrics = metrics::render(
            std::slice::from_ref(&report),
            &Instruments::default(),
            metrics::Exposition::Text,
        );
        assert!(metrics.contains("pitr_repository_failing{cluster=\"main\"} 0.0"));
        let of_place =
            "pitr_repository_place_failing{cluster=\"main\",repository=\"s3://far/away\"} 1.0";
        assert_eq!(metrics.contains(of_place), far.is_some());
        told(repositories)
    };
    assert_eq!(fires(None, None), None);
    assert_eq!(
        fires(None, Some("no route to host")).expect("it is away"),
        "The repository s3://far/away is away, WAL is stored in file:///near meanwhile: \
         no route to host."
    );
    // While no repository answers, the summary names none that has the WAL.
    assert_eq!(
        fires(Some("it is not mounted"), Some("no route to host")).expect("both are away"),
        "The repository file:///near is away, no other repository answers: it is not mounted."
    );
    let older = repository::store::MemberState {
        older: Some("it held an older state of the archive".to_owned()),
        ..place("s3://far/away", None)
    };
    assert_eq!(
        told(vec![older]).expect("it was an older copy"),
        "The repository s3://far/away was incomplete: it held an older state of the archive."
    );
}

#[test]
fn the_page_claims_nothing_that_is_not_known() {
    let alerts = |report: &ClusterReport| page::render_alerts(report).into_string();
    let mut found = report();
    assert!(alerts(&found).contains("Nothing needs you."));
    because(
        &mut found,
        &[(State::Unknown, CauseKind::Unseen, "it is not seen")],
    );
    assert!(!alerts(&found).contains("Nothing needs you."));

    // No drill has measured a restore: the duration is an estimate and no bound.
    let mut found = report();
    found.rto.wal_since_backup_bytes = Some(3 << 20);
    let lines = page::lines(&found).into_string();
    assert!(!lines.contains("class=\"bad\""), "{lines}");
    let expected = "A restore takes about 1 min plus the replay of 3.0 MiB. \
                    <small class=\"estimate\">estimate</small>";
    assert!(lines.contains(expected), "{lines}");
    // The estimate of a restore that the plan refuses is no answer.
    found.rto.estimate_seconds = Some(90.0);
    found.window.refusal = Some("WAL is missing".to_owned());
    found.window.latest = Some(found.as_of);
    let lines = page::lines(&found).into_string();
    assert!(!lines.contains("A restore takes"), "{lines}");
    assert!(lines.contains("loses everything after 2026-"), "{lines}");
    assert!(lines.contains("class=\"bad\""), "{lines}");
    let expected = "How long a restore to that time takes is not known.";
    assert!(lines.contains(expected), "{lines}");
}
