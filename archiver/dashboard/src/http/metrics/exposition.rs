//! The two text formats of `/metrics`, and the choice between them by `Accept`.
//!
//! A scraper that prefers `OpenMetrics` gets it. Every other client gets Prometheus's text format
//! 0.0.4, which `promtool` and simple scripts read.

use super::super::answer;

/// A format of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::http) enum Exposition {
    /// `OpenMetrics` 1.0.0.
    OpenMetrics,
    /// Prometheus's text format 0.0.4.
    Text,
}

impl Exposition {
    /// Returns the format that the value of an `Accept` header asks for.
    pub(in crate::http) fn accepted(accept: Option<&str>) -> Self {
        let (mut open_metrics, mut text) = (0.0_f64, 0.0_f64);
        for range in accept.unwrap_or("*/*").split(',') {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default().to_ascii_lowercase();
            let quality = parts
                .find_map(|part| part.strip_prefix("q="))
                .map_or(Some(1.0), |quality| quality.parse().ok())
                .filter(|quality: &f64| quality.is_finite())
                .unwrap_or(0.0);
            match media.as_str() {
                "application/openmetrics-text" => open_metrics = open_metrics.max(quality),
                "text/plain" | "text/*" | "*/*" => text = text.max(quality),
                _ => {}
            }
        }
        if open_metrics > 0.0 && open_metrics >= text {
            Self::OpenMetrics
        } else {
            Self::Text
        }
    }

    /// Returns the `Content-Type` of the answer.
    pub(in crate::http) fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => answer::PROMETHEUS_TEXT,
        }
    }

    /// Converts a document of `OpenMetrics`.
    ///
    /// The text format has no end mark, and describes a counter under the name of its sample, which
    /// ends in `_total`.
    pub(super) fn convert(self, document: String) -> String {
        if self == Self::OpenMetrics {
            return document;
        }
        let mut counters = Vec::new();
        for line in document.lines() {
            let described = line.strip_prefix("# TYPE ");
            if let Some(name) = described.and_then(|rest| rest.strip_suffix(" counter")) {
                counters.push(name);
            }
        }
        let mut text = String::with_capacity(document.len());
        for line in document.lines().filter(|line| *line != "# EOF") {
            let described = ["# HELP ", "# TYPE "].into_iter().find_map(|word| {
                let (name, rest) = line.strip_prefix(word)?.split_once(' ')?;
                counters
                    .contains(&name)
                    .then(|| format!("{word}{name}_total {rest}"))
            });
            text.push_str(described.as_deref().unwrap_or(line));
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_header_chooses_the_format() {
        let check = |accept: Option<&str>, expected| {
            assert_eq!(Exposition::accepted(accept), expected, "{accept:?}");
        };
        check(None, Exposition::Text);
        check(Some("*/*"), Exposition::Text);
        check(Some("text/html"), Exposition::Text);
        check(
            Some("application/openmetrics-text; version=1.0.0"),
            Exposition::OpenMetrics,
        );
        // The header that Prometheus 2.53 and 3 send.
        check(
            Some(
                "application/openmetrics-text;version=1.0.0;q=0.5,\
                 application/openmetrics-text;version=0.0.1;q=0.4,\
                 text/plain;version=0.0.4;q=0.3,*/*;q=0.1",
            ),
            Exposition::OpenMetrics,
        );
        check(
            Some("text/plain;version=0.0.4;q=0.9, application/openmetrics-text;q=0.2"),
            Exposition::Text,
        );
        check(Some("application/openmetrics-text;q=0"), Exposition::Text);
    }

    #[test]
    fn the_text_format_describes_counters_under_their_samples_name() {
        let document = "# HELP a A counter.\n# TYPE a counter\na_total{x=\"# TYPE b counter\"} 1\n\
                        # HELP b A gauge.\n# TYPE b gauge\nb 2\n# EOF\n";
        let expected = "# HELP a_total A counter.\n# TYPE a_total counter\n\
                        a_total{x=\"# TYPE b counter\"} 1\n# HELP b A gauge.\n# TYPE b gauge\nb 2\n";
        assert_eq!(Exposition::Text.convert(document.to_owned()), expected);
        assert_eq!(
            Exposition::OpenMetrics.convert(document.to_owned()),
            document
        );
    }
}
