//! One of two repositories is away: the page, the API, Nagios, the metrics and a notification say
//! so, and say that it is back.

use std::fs;

use super::{body, notifications::Receiver};
use crate::{
    present::{backup, metric, report},
    support::{Place, Server, folder_refuses, postgres_bin, wait_flushed, wait_until},
    truth::nagios,
};

#[test]
fn one_of_two_repositories_that_is_away_is_told_everywhere() {
    const AWAY: &str = "PitrRepositoryAway";
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let receiver = Receiver::start();
    let far = place.repository().with_extension("far");
    fs::create_dir(&far).expect("a directory");
    let url = format!("file://{}", far.display());
    let configuration = place.spool().with_extension("toml");
    let text = format!(
        "repositories = [{{ url = '{url}' }}]\nrepositories_required = 'any'\n\
         [notify.a]\ntype = 'webhook'\nurl = 'http://127.0.0.1:{}/'\n",
        receiver.port
    );
    fs::write(&configuration, text).expect("a configuration");
    let mut command = place.command(&server.conninfo());
    command.arg("--config").arg(&configuration);
    let archiver = place.run_with(command);
    archiver.wait_for_log("INFO streaming");
    server.write_wal(100);
    backup(&place, &server);
    let failing = |url: &str| {
        let name = "pitr_repository_place_failing";
        metric(
            &archiver,
            &format!("{name}{{cluster=\"main\",repository=\"{url}\"}}"),
        )
    };
    let firing = || {
        let page = body(&archiver.get("/"));
        let metrics = body(&archiver.get("/metrics"));
        let sample = format!("pitr_alert_firing{{cluster=\"main\",alert=\"{AWAY}\"}} 1.0");
        [
            page.contains(&format!("<strong>{AWAY}</strong>")),
            metrics.contains(&sample),
            report(&archiver)["alerts"].to_string().contains(AWAY),
        ]
    };
    wait_until("all is well", || report(&archiver)["state"] == "ok");
    assert_eq!(nagios(&archiver, &place), Some(0));
    assert_eq!(failing(&url), Some(0.0));

    let comes_back = folder_refuses(&far);
    server.write_wal(100);
    wait_until("every view shows the alert", || {
        server.sql("SELECT pg_logical_emit_message(true, '', 'more WAL')");
        firing() == [true; 3] && !receiver.about(AWAY, "firing").is_empty()
    });
    let told = report(&archiver);
    assert_eq!(told["state"], "degraded", "{told}");
    let reason = told["reason"].as_str().expect("a reason");
    assert!(reason.contains(&url), "{reason}");
    let near = format!("file://{}", place.repository().display());
    let summary = receiver.about(AWAY, "firing")[0]["summary"].to_string();
    let expected = format!("{url} is away, WAL is stored in {near} meanwhile");
    assert!(summary.contains(&expected), "{summary}");
    assert_eq!((failing(&url), failing(&near)), (Some(1.0), Some(0.0)));
    assert_eq!(nagios(&archiver, &place), Some(1));
    // Losing the primary still loses nothing: the other repository has the WAL.
    wait_flushed(&server, server.lsn());
    wait_until("nothing would be lost", || {
        body(&archiver.get("/")).contains("loses nothing that it had flushed")
    });

    comes_back();
    wait_until("no view shows the alert", || {
        firing() == [false; 3] && !receiver.about(AWAY, "resolved").is_empty()
    });
    wait_until("all is well again", || report(&archiver)["state"] == "ok");
    assert_eq!(nagios(&archiver, &place), Some(0));
    assert_eq!(failing(&url), Some(0.0));
    assert_eq!(receiver.about(AWAY, "firing").len(), 1);
}
