//! Assigns requests to routes. The answer to an unknown path or cluster is 404, to another method
//! 405, and to an unauthenticated client 401.

use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::{
    HeaderMap, Method, Request, StatusCode,
    header::{
        ACCEPT, ALLOW, HeaderValue, LOCATION, RETRY_AFTER, SET_COOKIE, VARY, WWW_AUTHENTICATE,
    },
};

use super::{
    access::{Access, Role},
    answer::{Answer, HTML, JSON, TEXT, json, problem, respond},
    api,
    connections::Busy,
    health, live, metrics, page,
    sources::Sources,
};

/// The maximum size of a body. A form with a token is far smaller.
const BODY_BYTES_MAX: usize = 8 * 1024;
/// The time for which a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// The delay of the answer to a wrong token.
const WRONG_TOKEN_PAUSE: Duration = Duration::from_millis(300);

/// Answers a request.
///
/// A connection is `busy`, and so not closed for a new one, only while an authenticated client's
/// request is answered. A body that never arrives, or a wrong token, does not occupy a connection.
pub(super) async fn answer<B>(request: Request<B>, sources: &Sources, busy: &Busy) -> Answer
where
    B: hyper::body::Body + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    let query = head.uri.query().unwrap_or_default();
    if !matches!(path, "/healthz" | "/readyz") && !sources.access.is_known_host(&head.headers) {
        return problem(
            StatusCode::MISDIRECTED_REQUEST,
            "the page is not served under the name in the Host header, because it is open to \
             everyone on this host and another site's page could read it; open it as localhost, add \
             the name to http_allowed_hosts, or set http_token_file",
        );
    }
    match head.method {
        Method::GET | Method::HEAD => get(path, query, &head.headers, sources, busy).await,
        Method::POST => {
            if !Access::is_own_request(&head.headers) {
                return problem(
                    StatusCode::FORBIDDEN,
                    "the request comes from another site's page",
                );
            }
            let announced = body.size_hint().lower();
            let limited = Limited::new(body, BODY_BYTES_MAX).collect();
            if announced > BODY_BYTES_MAX as u64 {
                return problem(StatusCode::PAYLOAD_TOO_LARGE, "the body is too long");
            }
            let Ok(Ok(body)) = tokio::time::timeout(BODY_TIMEOUT, limited).await else {
                return problem(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "the body is too long, or did not arrive in time",
                );
            };
            post(path, &body.to_bytes(), &head.headers, sources, busy).await
        }
        _ => {
            let mut response = problem(
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET, HEAD and POST are served",
            );
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD, POST"));
            response
        }
    }
}

/// Returns the routes that need no token: health, login and its files.
fn open_to_all(path: &str) -> Option<Answer> {
    Some(match path {
        // These routes report only that this process runs. None of them checks the store or
        // PostgreSQL, so that an orchestrator does not stop the archiver exactly when it is needed.
        "/healthz" => respond(StatusCode::OK, TEXT, "alive\n".to_owned()),
        "/health" => json(StatusCode::OK, &health::alive()),
        "/readyz" => respond(StatusCode::OK, TEXT, "ready to stream\n".to_owned()),
        "/login" => respond(StatusCode::OK, HTML, page::login(false)),
        "/style.css" => respond(
            StatusCode::OK,
            "text/css; charset=utf-8",
            page::STYLE.to_owned(),
        ),
        "/app.js" => respond(
            StatusCode::OK,
            "text/javascript; charset=utf-8",
            page::SCRIPT.to_owned(),
        ),
        "/theme.js" => respond(
            StatusCode::OK,
            "text/javascript; charset=utf-8",
            page::THEME.to_owned(),
        ),
        "/icon.svg" => respond(StatusCode::OK, "image/svg+xml", page::ICON.to_owned()),
        _ => return None,
    })
}

async fn get(
    path: &str,
    query: &str,
    headers: &HeaderMap,
    sources: &Sources,
    busy: &Busy,
) -> Answer {
    if let Some(answer) = open_to_all(path) {
        return answer;
    }
    if !sources.access.may_read(headers) {
        if headers.contains_key(hyper::header::AUTHORIZATION) {
            tokio::time::sleep(WRONG_TOKEN_PAUSE).await;
        }
        let is_page = matches!(path, "/" | "/runbook") || path.starts_with("/clusters/");
        return if is_page {
            redirect("/login")
        } else {
            stranger()
        };
    }
    let guard = busy.begin();
    if path == "/api/v1/events/stream" {
        return live::stream(&sources.monitor, guard);
    }
    read(path, query, headers, sources).await
}

/// Answers the routes for clients that may read.
pub(super) async fn read(
    path: &str,
    query: &str,
    headers: &HeaderMap,
    sources: &Sources,
) -> Answer {
    let reports = || (sources.reports)();
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    match *parts.as_slice() {
        [""] => {
            let reports = reports();
            match reports.as_slice() {
                [report] => page_of(report, query, headers, sources, false).await,
                reports => {
                    let asked = api::parameters(query, &["sort", "filter"]).unwrap_or_default();
                    let listing = page::Listing {
                        sort: value_of(&asked, "sort").to_owned(),
                        filter: value_of(&asked, "filter").trim().to_owned(),
                    };
                    let guarded = sources.access.is_guarded();
                    respond(
                        StatusCode::OK,
                        HTML,
                        page::fleet(reports, &listing, guarded),
                    )
                }
            }
        }
        ["clusters", name] => {
            let reports = reports();
            match reports
                .iter()
                .find(|report| report.cluster.as_str() == name)
            {
                Some(report) => page_of(report, query, headers, sources, reports.len() > 1).await,
                None => problem(StatusCode::NOT_FOUND, "no such cluster; see /"),
            }
        }
        ["runbook"] => respond(
            StatusCode::OK,
            HTML,
            page::runbook(sources.access.is_guarded()),
        ),
        ["health", "detailed"] => json(StatusCode::OK, &health::detailed(&reports())),
        ["metrics"] => {
            let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
            let exposition = metrics::Exposition::accepted(accept);
            let text = metrics::render(&reports(), &sources.instruments, exposition);
            let mut answer = respond(StatusCode::OK, exposition.content_type(), text);
            answer
                .headers_mut()
                .insert(VARY, HeaderValue::from_static("Accept"));
            answer
        }
        ["api", "v1", "openapi.json"] => {
            respond(StatusCode::OK, JSON, openapi(sources.access.is_guarded()))
        }
        ["api", "v1", "clusters"] => json(StatusCode::OK, &reports()),
        ["api", "v1", "clusters", name, ref rest @ ..] => {
            let found = reports()
                .into_iter()
                .find(|report| report.cluster.as_str() == name);
            let Some(report) = found else {
                return problem(
                    StatusCode::NOT_FOUND,
                    "no such cluster; see /api/v1/clusters",
                );
            };
            match *rest {
                [] => return json(StatusCode::OK, &report),
                ["health"] => {
                    return match health::judge(&report, query) {
                        Ok(verdict) => json(verdict.status(), &verdict),
                        Err(error) => problem(StatusCode::BAD_REQUEST, &error.to_string()),
                    };
                }
                _ => {}
            }
            let Some(cluster) = sources.monitor.cluster(name) else {
                return problem(StatusCode::NOT_FOUND, "no such route below a cluster");
            };
            match *rest {
                ["window"] => api::window(&cluster, &report),
                ["backups"] => api::backups(&cluster),
                ["drills"] => api::drills(&cluster),
                ["events"] => api::events(&cluster, query),
                ["series"] => api::series(&cluster, query),
                ["locate"] => api::locate(&cluster, query).await,
                _ => problem(StatusCode::NOT_FOUND, "no such route below a cluster"),
            }
        }
        _ => problem(StatusCode::NOT_FOUND, "no such route"),
    }
}

/// Returns the value of a parameter. Empty if it is missing.
fn value_of<'a>(asked: &'a [(String, String)], name: &str) -> &'a str {
    let mut asked = asked.iter();
    let found = asked.find(|(known, _)| known == name);
    found.map_or("", |(_, value)| value.as_str())
}

async fn page_of(
    report: &status::report::ClusterReport,
    query: &str,
    headers: &HeaderMap,
    sources: &Sources,
    of_fleet: bool,
) -> Answer {
    let known = ["at", "range", "from", "to", "events", "tested"];
    let asked = api::parameters(query, &known).unwrap_or_default();
    let value = |name| value_of(&asked, name);
    let Some(cluster) = sources.monitor.cluster(report.cluster.as_str()) else {
        return problem(StatusCode::NOT_FOUND, "no such cluster");
    };
    let picked = match value("at").trim() {
        "" => None,
        text => {
            let time = api::typed_instant(text);
            let located = match &time {
                Ok(time) => api::nearest(&cluster, *time).await,
                Err(error) => Err(error.clone()),
            };
            Some(page::Picked {
                text: text.to_owned(),
                time,
                located,
            })
        }
    };
    let edge = |name| api::instant(value(name)).map(wal_format::PgTimestamp::from_jiff);
    let view = page::View {
        report,
        cluster: &cluster,
        details: cluster.status().details(),
        range: page::Range::of(value("range")),
        picked,
        zoom: edge("from").zip(edge("to")),
        shown: page::Shown::of(value("events")),
        of_fleet,
        guarded: sources.access.is_guarded(),
        may_test: sources.monitor.has_receivers()
            && sources.access.token_role(headers) == Some(Role::Operate),
        tested: value("tested") == "1",
    };
    respond(StatusCode::OK, HTML, page::cluster(&view))
}

async fn post(
    path: &str,
    body: &[u8],
    headers: &HeaderMap,
    sources: &Sources,
    busy: &Busy,
) -> Answer {
    match path {
        "/login" => {
            let form = String::from_utf8_lossy(body);
            let fields = api::parameters(&form, &["token"]).unwrap_or_default();
            let role = fields
                .first()
                .and_then(|(_, token)| sources.access.token(token.trim()));
            let cookie = role.and_then(|role| sources.access.log_in(role));
            let Some(cookie) = cookie else {
                tokio::time::sleep(WRONG_TOKEN_PAUSE).await;
                return respond(StatusCode::UNAUTHORIZED, HTML, page::login(true));
            };
            with_cookie(redirect("/"), &cookie)
        }
        "/logout" => with_cookie(redirect("/login"), &sources.access.log_out(headers)),
        _ => operate(path, headers, sources, busy).await,
    }
}

async fn operate(path: &str, headers: &HeaderMap, sources: &Sources, busy: &Busy) -> Answer {
    let role = sources.access.token_role(headers);
    if role.is_none() && sources.access.has_tokens() {
        tokio::time::sleep(WRONG_TOKEN_PAUSE).await;
        return stranger();
    }
    if role != Some(Role::Operate) {
        return problem(
            StatusCode::FORBIDDEN,
            "this needs the operate token; set http_operate_token_file",
        );
    }
    let _guard = busy.begin();
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    match *parts.as_slice() {
        // The button on the page of a cluster.
        ["clusters", name, "notify-test"] => {
            let name = sources
                .monitor
                .cluster(name)
                .map(|cluster| cluster.settings().name.clone());
            match name {
                Some(name) if sources.monitor.notify_test() => {
                    redirect(&format!("/clusters/{name}?tested=1#operate"))
                }
                _ => problem(
                    StatusCode::NOT_FOUND,
                    "no such cluster, or no receiver; see /",
                ),
            }
        }
        ["api", "v1", "notify", "test"] => {
            if sources.monitor.notify_test() {
                json(
                    StatusCode::ACCEPTED,
                    &serde_json::json!({ "accepted": true }),
                )
            } else {
                problem(
                    StatusCode::CONFLICT,
                    "nobody is to be told: add [notify.NAME] to the configuration",
                )
            }
        }
        ["api", "v1", "clusters", name, "backups"] => {
            let Some(cluster) = sources.monitor.cluster(name) else {
                return problem(
                    StatusCode::NOT_FOUND,
                    "no such cluster; see /api/v1/clusters",
                );
            };
            let Ok(permit) = std::sync::Arc::clone(&sources.backups).try_acquire_owned() else {
                let mut answer = problem(
                    StatusCode::CONFLICT,
                    "a base backup asked for here is under way",
                );
                answer
                    .headers_mut()
                    .insert(RETRY_AFTER, HeaderValue::from_static("60"));
                return answer;
            };
            let taking = (sources.take_backup)(cluster.settings().clone());
            tokio::spawn(async move {
                let _permit = permit;
                taking.await;
            });
            json(
                StatusCode::ACCEPTED,
                &serde_json::json!({ "accepted": true }),
            )
        }
        _ => problem(StatusCode::NOT_FOUND, "nothing to POST to here"),
    }
}

/// Returns the `OpenAPI` document. It demands a token for reading only if this server does.
fn openapi(is_guarded: bool) -> String {
    let document = include_str!("openapi.json");
    if is_guarded {
        return document.to_owned();
    }
    let mut document: serde_json::Value =
        serde_json::from_str(document).expect("BUG: openapi.json is not JSON");
    document["security"] = serde_json::json!([]);
    document.to_string()
}

fn stranger() -> Answer {
    let mut answer = problem(
        StatusCode::UNAUTHORIZED,
        "a token is needed: Authorization: Bearer …, or log in at /login",
    );
    answer
        .headers_mut()
        .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    answer
}

fn redirect(to: &str) -> Answer {
    let mut answer = respond(StatusCode::SEE_OTHER, TEXT, String::new());
    if let Ok(to) = HeaderValue::from_str(to) {
        answer.headers_mut().insert(LOCATION, to);
    }
    answer
}

fn with_cookie(mut answer: Answer, cookie: &str) -> Answer {
    if let Ok(value) = HeaderValue::from_str(cookie) {
        answer.headers_mut().insert(SET_COOKIE, value);
    }
    answer
}
