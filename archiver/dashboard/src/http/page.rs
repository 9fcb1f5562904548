//! The HTML pages. They are rendered here, so that they are readable without JavaScript. `app.js`
//! only updates them and moves the picker.
//!
//! Elements marked `data-live` have an id and are replaced by newer versions. Elements in which a
//! user may be typing are not marked. Invariant: every text from outside goes through
//! [`format::escape`].

use std::fmt::Write as _;

use self::{
    document::{Refresh, document},
    format::escape,
};

mod alerts;
mod answer;
mod badge;
mod chart;
mod document;
mod events;
mod fleet;
mod flow;
mod format;
mod picker;
mod runbook;
mod schedules;
mod strip;
mod tables;
mod tiles;
mod view;

#[cfg(test)]
pub(super) use self::{alerts::render as render_alerts, answer::lines};
pub(super) use self::{
    badge::badge,
    fleet::{Listing, fleet},
    runbook::runbook,
    view::{Picked, Range, Shown, View},
};

/// The style sheet, served as a separate file because the content security policy allows nothing
/// inline.
pub(super) const STYLE: &str = include_str!("page/style.css");
pub(super) const SCRIPT: &str = include_str!("page/app.js");
pub(super) const THEME: &str = include_str!("page/theme.js");
pub(super) const ICON: &str = include_str!("page/icon.svg");

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
    schedules::render(&mut body, view);
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
