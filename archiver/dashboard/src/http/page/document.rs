//! The frame around every page.

use maud::{DOCTYPE, Markup, html};

/// The way in which a page is updated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refresh {
    /// By the script. Without scripts only by a link, because a reload would empty a form that is
    /// being filled in.
    Live,
    Never,
}

/// Renders the frame around every page. The script reads the name of the `cluster` that the page
/// shows.
pub(super) fn document(
    title: &str,
    cluster: Option<&str>,
    body: &Markup,
    guarded: bool,
    refresh: Refresh,
) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) }
                link rel="icon" href="/icon.svg";
                link rel="stylesheet" href="/style.css";
                script src="/theme.js" {}
                script src="/app.js" defer {}
            }
            body data-cluster=[cluster] {
                a class="skip" href="#main" { "Skip to content" }
                header class="bar" {
                    a class="brand" href="/" {
                        img src="/icon.svg" alt="" width="22" height="22"; " Tidemark"
                    }
                    nav aria-label="Elsewhere" {
                        a href="/metrics" { "Metrics" }
                        a href="/api/v1/clusters" { "API" }
                        a href="/api/v1/openapi.json" { "OpenAPI" }
                        button type="button" class="quiet" id="theme" hidden { "Switch to dark" }
                        @if guarded {
                            form method="post" action="/logout" {
                                button class="quiet" { "Log out" }
                            }
                        }
                    }
                }
                p id="stale" role="status" hidden {}
                p id="announce" class="only-read" role="status" aria-live="polite" {}
                main id="main" {
                    @if refresh == Refresh::Live {
                        noscript {
                            p class="hint" {
                                "Without JavaScript this page does not update itself. "
                                a href="" { "Reload" }
                            }
                        }
                    }
                    (body)
                }
            }
        }
    };
    page.into_string()
}
