//! Tests of the routes without a socket, and of the start without a daemon.

mod claims;
mod conditions;

use http_body_util::BodyExt;
use hyper::{HeaderMap, Method, Request, StatusCode, header::CONTENT_TYPE};
use status::{
    instruments::Instruments,
    report::{
        BackupReport, ClusterReport, Counters, DurableReport, RtoReport, SourceReport, TierReport,
        WindowReport,
    },
    state::State,
};
use wal_format::{Lsn, PgTimestamp, TimelineId};

use super::{access::Access, answer::PROBLEM, *};
use crate::{
    monitor::Monitor,
    notifications::{Links, Notifier},
};

fn report() -> ClusterReport {
    let started = PgTimestamp(845_000_000_000_000);
    ClusterReport {
        schema: "v1",
        cluster: "main".parse().expect("a name"),
        as_of: PgTimestamp(started.0 + 3_600_000_000),
        state: State::Ok,
        reason: "streaming".to_owned(),
        causes: Vec::new(),
        source: SourceReport {
            timeline: Some(TimelineId::FIRST),
            flush_lsn: Some(Lsn(0x300_0000)),
            ..SourceReport::default()
        },
        durable: DurableReport {
            remote: TierReport {
                lsn: Some(Lsn(0x2FF_0000)),
                lag_bytes: Some(65536),
                rpo_seconds: Some(0.25),
            },
            ..DurableReport::default()
        },
        rpo_target_seconds: 5.0,
        window: WindowReport::default(),
        slot: None,
        gap: None,
        standbys: Vec::new(),
        last_backup: Some(BackupReport {
            id: "20261121T101500Z-9f3c".parse().expect("an id"),
            started,
            finished: PgTimestamp(started.0 + 60_000_000),
            start_lsn: Lsn(0x200_0000),
            timeline: TimelineId::FIRST,
            stored_bytes: 1 << 20,
        }),
        counters: Counters {
            reconnects: vec![("closed".to_owned(), 2)],
            ..Counters::default()
        },
        repository: "file:///r&d".to_owned(),
        requests: None,
        rpo_max_24h_seconds: None,
        repositories: Vec::new(),
        wal_bytes_per_second: None,
        caught_up_as_of: None,
        rto: RtoReport::default(),
        last_drill: None,
        last_drill_passed: None,
        last_verify: None,
        failed_backup: None,
        failed_expire: None,
        last_failover_loss: None,
        failover_loss: None,
        corrupt_objects: None,
        unread_outcomes: Vec::new(),
        lost_objects: Vec::new(),
        backup_max_age_seconds: 86_400.0,
        drill_max_age_seconds: None,
        verify_max_age_seconds: None,
        backup_progress: None,
        backup_schedule: None,
        drill_schedule: None,
        archive_command: None,
        slot_missing: false,
        spool_full_in_seconds: None,
        window_missing_seconds: None,
        clock_offset_seconds: None,
        certificate_expiry: None,
        looked: true,
        stream_error: None,
        repository_error: None,
        alerts: Vec::new(),
    }
}

const LOOPBACK: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8432);

fn sources_with(access: &HttpAccess) -> Sources {
    let mut other = report();
    other.cluster = "broken-one".parse().expect("a name");
    other.state = State::Broken;
    Sources {
        reports: Arc::new(move || vec![report(), other.clone()]),
        ..Sources::new(
            Monitor::new(Notifier::start(Vec::new(), Links::default())),
            Instruments::default(),
            access,
            LOOPBACK,
            Arc::new(|_| Box::pin(async {})),
        )
    }
}

fn sources() -> Sources {
    sources_with(&HttpAccess::default())
}

async fn fetch(path: &str, query: &str) -> (StatusCode, String, String) {
    let response = routes::read(path, query, &HeaderMap::new(), &sources()).await;
    let status = response.status();
    let content_type = response.headers()[CONTENT_TYPE]
        .to_str()
        .expect("text")
        .to_owned();
    let body = response
        .into_body()
        .collect()
        .await
        .expect("a body")
        .to_bytes();
    (
        status,
        content_type,
        String::from_utf8(body.to_vec()).expect("UTF-8"),
    )
}

#[tokio::test]
async fn unknown_is_null_in_json_and_nan_in_metrics() {
    let (status, _, body) = fetch("/api/v1/clusters/main", "").await;
    assert_eq!(status, StatusCode::OK);
    let document: serde_json::Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(
        document["durable"]["local"]["rpo_seconds"],
        serde_json::Value::Null
    );
    assert_eq!(document["durable"]["remote"]["lsn"], "0/2FF0000");
    assert_eq!(document["slot"], serde_json::Value::Null);

    let (_, _, metrics) = fetch("/metrics", "").await;
    for line in [
        "pitr_rpo_seconds{cluster=\"main\",tier=\"local\"} NaN",
        "pitr_rpo_seconds{cluster=\"main\",tier=\"remote\"} 0.25",
        "pitr_state{cluster=\"main\",state=\"ok\"} 1.0",
        "pitr_state{cluster=\"main\",state=\"broken\"} 0.0",
        "pitr_stream_reconnects_total{cluster=\"main\",reason=\"closed\"} 2",
        "pitr_backup_duration_seconds{cluster=\"main\"} 60.0",
        "pitr_flush_duration_seconds_count{cluster=\"main\"} 0",
        "pitr_slot_active{cluster=\"main\"} NaN",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
}

#[tokio::test]
async fn the_health_route_turns_red_on_what_is_not_known() {
    let path = "/api/v1/clusters/main/health";
    assert_eq!(
        fetch(path, "max_rpo=1s&max_backup_age=1h").await.0,
        StatusCode::OK
    );
    let (status, _, body) = fetch(path, "max_rpo=200ms").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(body.contains("rpo is 0.2 s"), "{body}");
    assert_eq!(
        fetch(path, "max_drill_age=8d").await.0,
        StatusCode::SERVICE_UNAVAILABLE
    );
    let (status, content_type, _) = fetch(path, "max_rop=1s").await;
    assert_eq!(
        (status, content_type.as_str()),
        (StatusCode::BAD_REQUEST, PROBLEM)
    );
}

#[tokio::test]
async fn the_health_documents_name_each_component() {
    let answer = ask(&guarded(), Method::GET, "/health", &[], "").await;
    assert_eq!(
        answer.status(),
        StatusCode::OK,
        "strangers see that it lives"
    );
    let (status, _, body) = fetch("/health/detailed", "").await;
    assert_eq!(status, StatusCode::OK);
    let document: serde_json::Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(document["status"], "alive");
    let broken = &document["clusters"]["broken-one"];
    assert_eq!(broken["state"], "broken");
    assert_eq!(broken["components"]["slot"]["status"], "unknown");
    let stranger = ask(&guarded(), Method::GET, "/health/detailed", &[], "").await;
    assert_eq!(stranger.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn strangers_get_problem_documents() {
    for path in [
        "/x",
        "/api/v1/clusters/other",
        "/api/v1/clusters/main/x",
        "/metrics/",
    ] {
        let (status, content_type, _) = fetch(path, "").await;
        assert_eq!(
            (status, content_type.as_str()),
            (StatusCode::NOT_FOUND, PROBLEM),
            "{path}"
        );
    }
}

#[tokio::test]
async fn the_runbook_has_an_anchor_for_each_alert() {
    let (status, _, body) = fetch("/runbook", "").await;
    assert_eq!(status, StatusCode::OK);
    for rule in status::alerts::RULES {
        assert!(body.contains(&format!("id=\"{}\"", rule.name)), "{body}");
    }
}

#[tokio::test]
async fn the_fleet_shows_the_worst_first_and_escapes() {
    let (_, _, body) = fetch("/", "").await;
    let place = |text: &str| {
        body.find(text)
            .unwrap_or_else(|| panic!("{text} in {body}"))
    };
    assert!(place(">broken-one<") < place(">main<"), "{body}");
    assert!(body.contains("loses up to 0.2 s"), "{body}");
    assert!(body.contains("The greatest RPO is 0.2 s, of "), "{body}");
    let (_, _, body) = fetch("/", "sort=name&filter=ma").await;
    assert!(
        body.contains(">main<") && !body.contains(">broken-one<"),
        "{body}"
    );
    let (_, _, body) = fetch("/", "sort=rpo&filter=%22%3E").await;
    assert!(body.contains("value=\"&quot;&gt;\""), "{body}");
    assert!(body.contains("No cluster has this in its name."), "{body}");
    assert!(body.contains("1 of 2 clusters"), "{body}");
    assert!(
        !body.contains("style=") && !body.contains("onclick"),
        "the CSP forbids inline"
    );
}

fn guarded() -> Sources {
    let secret = |text: &str| Some(text.to_owned().into());
    sources_with(&HttpAccess {
        read: secret("a-token-that-reads"),
        operate: secret("a-token-that-operates"),
        ..HttpAccess::default()
    })
}

async fn ask(
    sources: &Sources,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> answer::Answer {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let body = http_body_util::Full::new(bytes::Bytes::from(body.to_owned()));
    let request = request.body(body).expect("a request");
    routes::answer(request, sources, &Busy::default()).await
}

#[tokio::test]
async fn strangers_see_that_it_lives_and_nothing_else() {
    let sources = guarded();
    let status = async |path: &str, headers: &[(&str, &str)]| {
        ask(&sources, Method::GET, path, headers, "").await.status()
    };
    for path in ["/healthz", "/readyz", "/login", "/style.css", "/app.js"] {
        assert_eq!(status(path, &[]).await, StatusCode::OK, "{path}");
    }
    for path in [
        "/metrics",
        "/api/v1/clusters",
        "/api/v1/events/stream",
        "/api/v1/openapi.json",
        "/x",
    ] {
        assert_eq!(status(path, &[]).await, StatusCode::UNAUTHORIZED, "{path}");
        let wrong = [("authorization", "Bearer a-token-that-fails")];
        assert_eq!(
            status(path, &wrong).await,
            StatusCode::UNAUTHORIZED,
            "{path}"
        );
    }
    assert_eq!(status("/", &[]).await, StatusCode::SEE_OTHER);
    for token in ["a-token-that-reads", "a-token-that-operates"] {
        let right = format!("Bearer {token}");
        assert_eq!(
            status("/metrics", &[("authorization", &right)]).await,
            StatusCode::OK
        );
    }
}

#[tokio::test]
async fn a_login_makes_a_session_and_a_logout_ends_it() {
    let sources = guarded();
    let wrong = ask(&sources, Method::POST, "/login", &[], "token=wrong").await;
    assert_eq!(wrong.status(), StatusCode::UNAUTHORIZED);
    let login = ask(
        &sources,
        Method::POST,
        "/login",
        &[],
        "token=a-token-that-reads",
    )
    .await;
    assert_eq!(login.status(), StatusCode::SEE_OTHER);
    let cookie = login.headers()["set-cookie"]
        .to_str()
        .expect("text")
        .to_owned();
    assert!(cookie.contains("HttpOnly; SameSite=Lax"), "{cookie}");
    assert!(!cookie.contains("a-token"), "{cookie}");
    let cookie = cookie.split(';').next().expect("a pair").to_owned();
    let with = [("cookie", cookie.as_str())];
    assert_eq!(
        ask(&sources, Method::GET, "/", &with, "").await.status(),
        StatusCode::OK
    );
    ask(&sources, Method::POST, "/logout", &with, "").await;
    assert_eq!(
        ask(&sources, Method::GET, "/", &with, "").await.status(),
        StatusCode::SEE_OTHER
    );
}

#[tokio::test]
async fn only_the_operate_token_acts_and_no_other_site_does() {
    let path = "/api/v1/notify/test";
    let sources = guarded();
    let status = async |headers: &[(&str, &str)]| {
        ask(&sources, Method::POST, path, headers, "")
            .await
            .status()
    };
    assert_eq!(status(&[]).await, StatusCode::UNAUTHORIZED);
    assert_eq!(
        status(&[("authorization", "Bearer a-token-that-reads")]).await,
        StatusCode::FORBIDDEN
    );
    let operates = ("authorization", "Bearer a-token-that-operates");
    assert_eq!(
        status(&[operates]).await,
        StatusCode::CONFLICT,
        "nobody is to be told"
    );
    for (headers, expected) in [
        (
            vec![("origin", "https://evil"), ("host", "here")],
            StatusCode::FORBIDDEN,
        ),
        (
            vec![("origin", "null"), ("host", "here")],
            StatusCode::FORBIDDEN,
        ),
        (
            vec![("sec-fetch-site", "cross-site")],
            StatusCode::FORBIDDEN,
        ),
        // Another host of the same site, which may be controlled by somebody else.
        (
            vec![
                ("sec-fetch-site", "same-site"),
                ("origin", "http://here"),
                ("host", "here"),
            ],
            StatusCode::FORBIDDEN,
        ),
        // Our own pages are accepted, and only the token is missing.
        (
            vec![("origin", "http://here"), ("host", "here")],
            StatusCode::UNAUTHORIZED,
        ),
        (
            vec![("sec-fetch-site", "same-origin"), ("origin", "null")],
            StatusCode::UNAUTHORIZED,
        ),
        // A proxy in front of us that changes `Host`.
        (
            vec![
                ("sec-fetch-site", "same-origin"),
                ("origin", "https://a"),
                ("host", "b"),
            ],
            StatusCode::UNAUTHORIZED,
        ),
    ] {
        assert_eq!(status(&headers).await, expected, "{headers:?}");
    }
    // Without a token, everybody may read and nobody may change anything.
    let open = self::sources();
    assert_eq!(
        ask(&open, Method::POST, path, &[], "").await.status(),
        StatusCode::FORBIDDEN
    );
    let long = "x".repeat(100_000);
    let answer = ask(&sources, Method::POST, "/login", &[], &long).await;
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let answer = ask(&sources, Method::DELETE, "/", &[], "").await;
    assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED);
}

fn operated() -> HttpAccess {
    HttpAccess {
        operate: Some("a-token-that-operates".to_owned().into()),
        allowed_hosts: vec!["tidemark.example.com".to_owned()],
        ..HttpAccess::default()
    }
}

#[tokio::test]
async fn an_operate_token_alone_closes_reading_only_on_a_public_address() {
    let sources = sources_with(&operated());
    let get = async |path| ask(&sources, Method::GET, path, &[], "").await;
    for path in ["/", "/metrics", "/api/v1/clusters"] {
        assert_eq!(get(path).await.status(), StatusCode::OK, "{path}");
    }
    let path = "/api/v1/notify/test";
    let post = async |headers: &[(&str, &str)]| {
        ask(&sources, Method::POST, path, headers, "")
            .await
            .status()
    };
    assert_eq!(post(&[]).await, StatusCode::UNAUTHORIZED);
    let wrong = ("authorization", "Bearer a-token-that-fails");
    assert_eq!(post(&[wrong]).await, StatusCode::UNAUTHORIZED);
    let right = ("authorization", "Bearer a-token-that-operates");
    assert_eq!(
        post(&[right]).await,
        StatusCode::CONFLICT,
        "no receiver is set"
    );
    let public = Sources {
        access: Arc::new(Access::new(
            &operated(),
            SocketAddr::from(([0, 0, 0, 0], 8432)),
        )),
        ..sources.clone()
    };
    let answer = ask(&public, Method::GET, "/metrics", &[], "").await;
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_foreign_name_in_host_is_misdirected_where_reading_is_open() {
    let open = sources_with(&operated());
    let status = async |sources: &Sources, path: &str, host: &str| {
        let headers = [("host", host)];
        ask(sources, Method::GET, path, &headers, "").await.status()
    };
    for host in [
        "localhost",
        "LOCALHOST:8432",
        "localhost.",
        "main.localhost:1",
        "127.0.0.1:8432",
        "10.0.0.7",
        "[::1]:8432",
        "[::1]",
        "Tidemark.Example.com:443",
    ] {
        assert_eq!(
            status(&open, "/metrics", host).await,
            StatusCode::OK,
            "{host}"
        );
    }
    for host in [
        "evil.example:8432",
        "localhost.evil.example",
        "notlocalhost",
        "127.0.0.1.evil.example",
        "127.0.0.1:8432@evil.example",
        "[::1",
        "[evil.example]",
        "",
        "tidemark.example.com.evil.example",
    ] {
        let found = status(&open, "/metrics", host).await;
        assert_eq!(found, StatusCode::MISDIRECTED_REQUEST, "{host}");
        assert_eq!(status(&open, "/healthz", host).await, StatusCode::OK);
    }
    let foreign = [("host", "evil.example"), ("sec-fetch-site", "same-origin")];
    let answer = ask(&open, Method::POST, "/login", &foreign, "token=x").await;
    assert_eq!(answer.status(), StatusCode::MISDIRECTED_REQUEST);
    let body = answer.into_body().collect().await.expect("a body");
    let body = String::from_utf8(body.to_bytes().to_vec()).expect("UTF-8");
    assert!(body.contains("http_allowed_hosts"), "{body}");
    // Where reading needs a token, `Host` is not checked, so a proxy may use any name.
    let right = [
        ("host", "proxy.example"),
        ("authorization", "Bearer a-token-that-reads"),
    ];
    let answer = ask(&guarded(), Method::GET, "/metrics", &right, "").await;
    assert_eq!(answer.status(), StatusCode::OK);
}

#[tokio::test]
async fn the_description_demands_a_token_only_where_one_is_needed() {
    let document = async |sources: &Sources| -> serde_json::Value {
        let right = [("authorization", "Bearer a-token-that-operates")];
        let path = "/api/v1/openapi.json";
        let answer = ask(sources, Method::GET, path, &right, "").await;
        let body = answer.into_body().collect().await.expect("a body");
        serde_json::from_slice(&body.to_bytes()).expect("JSON")
    };
    let open = document(&sources()).await;
    assert_eq!(open["security"], serde_json::json!([]));
    let closed = document(&guarded()).await;
    assert_eq!(closed["security"][0], serde_json::json!({ "bearer": [] }));
    for document in [open, closed] {
        let paths = &document["paths"];
        let backup = &paths["/api/v1/clusters/{cluster}/backups"]["post"]["security"];
        assert_eq!(backup[0], serde_json::json!({ "bearer": [] }), "{paths}");
        assert_eq!(paths["/healthz"]["get"]["security"], serde_json::json!([]));
    }
}

#[tokio::test]
async fn the_metrics_come_in_the_accepted_format_and_complete() {
    let fetch = async |accept: &str| {
        let headers = [("accept", accept)];
        let answer = ask(&sources(), Method::GET, "/metrics", &headers, "").await;
        let content_type = answer.headers()[CONTENT_TYPE].clone();
        let body = answer.into_body().collect().await.expect("a body");
        let body = String::from_utf8(body.to_bytes().to_vec()).expect("UTF-8");
        (content_type.to_str().expect("text").to_owned(), body)
    };
    let (content_type, body) = fetch("application/openmetrics-text;version=1.0.0").await;
    assert!(content_type.starts_with("application/openmetrics-text; version=1.0.0"));
    assert!(body.ends_with("\n# EOF\n"), "{body}");
    let (content_type, text) = fetch("text/plain;version=0.0.4").await;
    assert_eq!(content_type, "text/plain; version=0.0.4; charset=utf-8");
    assert!(!text.contains("# EOF"), "{text}");
    // Each known label value has a series before its first event.
    for line in [
        "pitr_repository_errors_total{cluster=\"main\",op=\"put\",kind=\"unreachable\"} 0",
        "pitr_repository_errors_total{cluster=\"main\",op=\"open\",kind=\"refused\"} 0",
        "pitr_stream_reconnects_total{cluster=\"main\",reason=\"server_stopped\"} 0",
        "pitr_repository_request_duration_seconds_count{cluster=\"main\",op=\"list\",outcome=\"error\"} 0",
        "pitr_runs_failed_total{cluster=\"main\",kind=\"verify\"} 0",
        "# TYPE process_cpu_seconds_total counter",
        "# TYPE pitr_runs_failed_total counter",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
    for name in [
        "process_cpu_seconds_total ",
        "process_open_fds ",
        "process_resident_memory_bytes ",
        "process_start_time_seconds ",
    ] {
        let value = text.lines().find_map(|line| line.strip_prefix(name));
        let value: f64 = value.expect(name).parse().expect("a number");
        assert!(value > 0.0, "{name}{value}");
    }
}

#[tokio::test]
async fn a_public_address_is_refused() {
    let public = "0.0.0.0:0".parse().expect("an address");
    assert!(matches!(
        HttpServer::bind(public, &HttpAccess::default()).await,
        Err(HttpError::Public { .. })
    ));
    let server = HttpServer::bind(
        "127.0.0.1:0".parse().expect("an address"),
        &HttpAccess::default(),
    )
    .await
    .expect("free");
    let taken = server.address();
    let error = HttpServer::bind(taken, &HttpAccess::default())
        .await
        .expect_err("it is taken");
    assert!(error.to_string().contains("--http"), "{error}");
}

#[tokio::test]
async fn every_metric_of_the_contract_has_a_sample_from_the_start() {
    let (_, _, metrics) = fetch("/metrics", "").await;
    for name in [
        "pitr_backup_duration_seconds",
        "pitr_backup_last_success_timestamp_seconds",
        "pitr_backup_next_run_timestamp_seconds",
        "pitr_backup_stored_bytes",
        "pitr_build_info",
        "pitr_drill_last_success_timestamp_seconds",
        "pitr_drill_next_run_timestamp_seconds",
        "pitr_drill_rto_seconds",
        "pitr_flush_duration_seconds",
        "pitr_lag_bytes",
        "pitr_repository_errors_total",
        "pitr_repository_place_failing",
        "pitr_repository_place_lag_seconds",
        "pitr_repository_place_queue_bytes",
        "pitr_repository_request_duration_seconds",
        "pitr_rpo_seconds",
        "pitr_rpo_target_seconds",
        "pitr_rto_estimate_seconds",
        "pitr_slot_active",
        "pitr_slot_retained_bytes",
        "pitr_slot_safe_wal_bytes",
        "pitr_spool_limit_bytes",
        "pitr_spool_used_bytes",
        "pitr_state",
        "pitr_stream_connected",
        "pitr_stream_reconnects_total",
        "pitr_timeline_id",
        "pitr_upload_queue_bytes",
        "pitr_wal_received_bytes_total",
        "pitr_wal_segments_completed_total",
        "pitr_wal_stored_bytes_total",
        "pitr_window_earliest_timestamp_seconds",
        "pitr_window_gaps",
        "pitr_window_latest_timestamp_seconds",
    ] {
        let sampled = metrics.lines().any(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ', '_']))
        });
        assert!(sampled, "{name} has no sample in\n{metrics}");
    }
}

#[tokio::test]
async fn every_field_of_a_report_is_described() {
    let described: serde_json::Value =
        serde_json::from_str(include_str!("openapi.json")).expect("JSON");
    let described = &described["components"]["schemas"]["Cluster"]["properties"];
    let report = serde_json::to_value(report()).expect("JSON");
    for name in report.as_object().expect("an object").keys() {
        assert!(!described[name].is_null(), "openapi.json lacks {name}");
    }
}
