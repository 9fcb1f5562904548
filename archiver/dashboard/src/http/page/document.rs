//! The frame around every page.

/// The way in which a page is updated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refresh {
    /// By the script. Without scripts only by a link, because a reload would empty a form that is
    /// being filled in.
    Live,
    Never,
}

/// Renders the frame around every page.
pub(super) fn document(
    title: &str,
    attributes: &str,
    body: &str,
    guarded: bool,
    refresh: Refresh,
) -> String {
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
