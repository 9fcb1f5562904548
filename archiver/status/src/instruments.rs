//! The daemon's measurements that are distributions. One for the process; `/metrics` reads it, the
//! pipelines feed it.

use prometheus_client::metrics::{
    family::{Family, MetricConstructor},
    histogram::{Histogram, exponential_buckets},
};
use wal_format::ClusterName;

/// Label names and values of a sample.
pub type Labels = Vec<(&'static str, String)>;

/// Makes the histograms of a family.
#[derive(Clone, Copy, Debug)]
pub struct Durations;

impl MetricConstructor<Histogram> for Durations {
    fn new_metric(&self) -> Histogram {
        // 50 microseconds (a disk with a battery) to 26 seconds (one that is dying).
        Histogram::new(exponential_buckets(0.000_05, 2.0, 20))
    }
}

/// The measurements of all clusters. A clone shares them.
#[derive(Clone, Debug)]
pub struct Instruments {
    /// The time at which these instruments were created, which counts as the start of the process.
    pub started: jiff::Timestamp,
    /// The durations of fdatasync, by cluster.
    pub flush_duration: Family<Labels, Histogram, Durations>,
    /// The durations of repository requests, by cluster, request and outcome.
    pub repository_request_duration: Family<Labels, Histogram, Durations>,
}

impl Default for Instruments {
    fn default() -> Self {
        Self {
            started: jiff::Timestamp::now(),
            flush_duration: Family::new_with_constructor(Durations),
            repository_request_duration: Family::new_with_constructor(Durations),
        }
    }
}

impl Instruments {
    /// Seconds that each fdatasync of `cluster`'s spool takes. Ask once and keep it.
    #[must_use]
    pub fn flush_duration(&self, cluster: &ClusterName) -> Histogram {
        self.flush_duration
            .get_or_create(&vec![("cluster", cluster.to_string())])
            .clone()
    }

    /// Seconds of a repository request, by `op` (`put`, `get`, …) and `outcome` (`ok`, `error`).
    #[must_use]
    pub fn repository_request(&self, cluster: &ClusterName, op: &str, outcome: &str) -> Histogram {
        let labels = vec![
            ("cluster", cluster.to_string()),
            ("op", op.to_owned()),
            ("outcome", outcome.to_owned()),
        ];
        self.repository_request_duration
            .get_or_create(&labels)
            .clone()
    }
}
