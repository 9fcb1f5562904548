//! The HTML pages. They are rendered here, so that they are readable without JavaScript. `app.js`
//! only updates them and moves the picker.
//!
//! Elements marked `data-live` have an id and are replaced by newer versions. Elements in which a
//! user may be typing are not marked. Invariant: no text is marked as HTML already, so that every
//! text is escaped.

use maud::{Markup, html};

use self::document::{Refresh, document};

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
    let body = html! {
        (answer::render(view))
        (alerts::render(report))
        (tiles::render(view))
        (strip::render(view))
        (picker::render(view))
        (chart::render(view))
        (flow::render(view))
        (tables::backups(view))
        (tables::drills(view))
        (schedules::render(view))
        (events::render(view))
        @if view.may_test { (operate(view)) }
    };
    let cluster = report.cluster.as_str();
    let title = format!("{} · {cluster} · Tidemark", badge(report.state).1);
    document(&title, Some(cluster), &body, view.guarded, Refresh::Live)
}

/// Renders what an operator may do from the page.
fn operate(view: &View<'_>) -> Markup {
    html! {
        section class="card" id="operate" aria-labelledby="operate-title" {
            h2 id="operate-title" { "Notifications" }
            form method="post" action={ "/clusters/" (view.report.cluster) "/notify-test" } {
                button { "Send a test notification" }
            }
            @if view.tested {
                p class="hint" role="status" {
                    "A test and its end are on their way to every receiver."
                }
            }
        }
    }
}

pub(super) fn login(failed: bool) -> String {
    let body = html! {
        section class="card login" {
            h1 { "Log in" }
            @if failed { p class="error" role="alert" { "This token is not known." } }
            form method="post" action="/login" {
                label for="token" { "Access token" }
                input id="token" name="token" type="password" autocomplete="current-password"
                    required;
                button { "Log in" }
            }
        }
    };
    document("Log in · Tidemark", None, &body, false, Refresh::Never)
}
