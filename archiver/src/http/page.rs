//! The HTML pages. They are rendered here, so that they are readable without JavaScript. `app.js`
//! only updates them and moves the picker.
//!
//! Elements marked `data-live` have an id and are replaced by newer versions. Elements in which a
//! user may be typing are not marked. Invariant: every text from outside goes through
//! [`format::escape`].

use std::{fmt::Write as _, sync::Arc};

use jiff::Timestamp;
use status::{details::Details, locate::Located, report::ClusterReport, state::State};
use wal_format::PgTimestamp;

use self::format::escape;
use crate::monitor::Watched;

mod alerts;
mod answer;
mod chart;
mod events;
mod fleet;
mod flow;
mod format;
mod picker;
mod runbook;
mod strip;
mod tables;
mod tiles;

#[cfg(test)]
pub(super) use self::{alerts::render as render_alerts, answer::lines};
pub(super) use self::{
    chart::Range,
    events::Shown,
    fleet::{Listing, fleet},
    runbook::runbook,
};

/// The style sheet, served as a separate file because the content security policy allows nothing
/// inline.
pub(super) const STYLE: &str = include_str!("page/style.css");
pub(super) const SCRIPT: &str = include_str!("page/app.js");
pub(super) const THEME: &str = include_str!("page/theme.js");
pub(super) const ICON: &str = include_str!("page/icon.svg");

/// The content of the page of one cluster.
pub(super) struct View<'a> {
    pub(super) report: &'a ClusterReport,
    pub(super) cluster: &'a Watched,
    pub(super) details: Arc<Details>,
    pub(super) range: Range,
    /// The text of the picker and what it leads to. `None` if nothing was picked.
    pub(super) picked: Option<Picked>,
    /// The part of the strip that is shown. `None` for all of it.
    pub(super) zoom: Option<(PgTimestamp, PgTimestamp)>,
    /// The kind of events that are shown.
    pub(super) shown: Shown,
    pub(super) of_fleet: bool,
    pub(super) guarded: bool,
    /// True if the client may send a test notification.
    pub(super) may_test: bool,
    /// True if a test notification was sent a moment ago.
    pub(super) tested: bool,
}

/// A choice of the picker.
pub(super) struct Picked {
    /// The text as it was typed.
    pub(super) text: String,
    /// The instant, or the reason why the text names none.
    pub(super) time: Result<Timestamp, String>,
    /// The restore to that instant.
    pub(super) located: Result<Located, String>,
}

/// Renders the page of one cluster.
pub(super) fn cluster(view: &View<'_>) -> String {
    let report = view.report;
    let mut body = String::new();
    answer::render(&mut body, view);
    alerts::render(&mut body, report);
    tiles::render(&mut body, view);
    strip::render(&mut body, view);
    picker::render(&mut body, view);
    chart::render(&mut body, view);
    flow::render(&mut body, view);
    tables::backups(&mut body, view);
    tables::drills(&mut body, view);
    events::render(&mut body, view);
    operate(&mut body, view);
    let title = format!("{} · {} · Tidemark", badge(report.state).1, report.cluster);
    let attributes = format!(" data-cluster=\"{}\"", escape(report.cluster.as_str()));
    document(&title, &attributes, &body, view.guarded, Refresh::Live)
}

/// Renders what an operator may do from the page.
fn operate(out: &mut String, view: &View<'_>) {
    if !view.may_test {
        return;
    }
    let sent = if view.tested {
        "<p class=\"hint\" role=\"status\">A test and its end are on their way to every receiver.</p>"
    } else {
        ""
    };
    // Writing to a String does not fail.
    let _ = write!(
        out,
        "<section class=\"card\" id=\"operate\" aria-labelledby=\"operate-title\"><h2 id=\"operate-title\">Notifications</h2>\
         <form method=\"post\" action=\"/clusters/{}/notify-test\"><button>Send a test notification</button></form>{sent}</section>",
        view.report.cluster
    );
}

/// The way in which a page is updated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refresh {
    /// By the script. Without scripts only by a link, because a reload would empty a form that is
    /// being filled in.
    Live,
    Never,
}

/// Renders the frame around every page.
fn document(title: &str, attributes: &str, body: &str, guarded: bool, refresh: Refresh) -> String {
    let reload = if refresh == Refresh::Live {
        "<noscript><p class=\"hint\">Without JavaScript this page does not update itself. \
         <a href=\"\">Reload</a></p></noscript>"
    } else {
        ""
    };
    let logout = if guarded {
        "<form method=\"post\" action=\"/logout\"><button class=\"quiet\">Log out</button></form>"
    } else {
        ""
    };
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\"><title>{title}</title>\
         <link rel=\"icon\" href=\"/icon.svg\"><link rel=\"stylesheet\" href=\"/style.css\">\
         <script src=\"/theme.js\"></script><script src=\"/app.js\" defer></script>\
         </head><body{attributes}>\
         <a class=\"skip\" href=\"#main\">Skip to content</a>\
         <header class=\"bar\"><a class=\"brand\" href=\"/\"><img src=\"/icon.svg\" alt=\"\" width=\"22\" height=\"22\"> Tidemark</a>\
         <nav aria-label=\"Elsewhere\"><a href=\"/metrics\">Metrics</a><a href=\"/api/v1/clusters\">API</a>\
         <a href=\"/api/v1/openapi.json\">OpenAPI</a><button type=\"button\" class=\"quiet\" id=\"theme\" hidden>Switch to dark</button>{logout}</nav></header>\
         <p id=\"stale\" role=\"status\" hidden></p>\
         <p id=\"announce\" class=\"only-read\" role=\"status\" aria-live=\"polite\"></p><main id=\"main\">{reload}{body}</main></body></html>"
    )
}

pub(super) fn login(failed: bool) -> String {
    let wrong = if failed {
        "<p class=\"error\" role=\"alert\">This token is not known.</p>"
    } else {
        ""
    };
    let body = format!(
        "<section class=\"card login\"><h1>Log in</h1>{wrong}<form method=\"post\" action=\"/login\">\
         <label for=\"token\">Access token</label>\
         <input id=\"token\" name=\"token\" type=\"password\" autocomplete=\"current-password\" required>\
         <button>Log in</button></form></section>"
    );
    document("Log in · Tidemark", "", &body, false, Refresh::Never)
}

/// Returns the shape and the word of a state, so that it is recognizable without colours.
pub(super) fn badge(state: State) -> (&'static str, &'static str) {
    match state {
        State::Ok => ("●", "OK"),
        State::Degraded => ("▲", "DEGRADED"),
        State::AtRisk => ("◆", "AT RISK"),
        State::Broken => ("✖", "BROKEN"),
        State::Unknown => ("?", "UNKNOWN"),
    }
}

fn badge_html(state: State) -> String {
    let (shape, word) = badge(state);
    format!(
        "<span class=\"badge {}\"><span aria-hidden=\"true\">{shape}</span> {word}</span>",
        state.name()
    )
}
