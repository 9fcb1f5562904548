//! The process's own metrics, under the names that Prometheus's client libraries use.

use std::{fs, sync::atomic::AtomicU64};

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};
use rustix::{
    process::{Resource, getrlimit},
    time::{ClockId, clock_gettime},
};

/// Adds the process's metrics. A value that this system does not have is `NaN`.
pub(super) fn register(registry: &mut Registry, started: jiff::Timestamp) {
    let cpu = clock_gettime(ClockId::ProcessCPUTime);
    #[expect(clippy::cast_precision_loss, reason = "seconds of processor time")]
    let seconds = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
    let counter = Counter::<f64, AtomicU64>::default();
    counter.inc_by(seconds);
    registry.register(
        "process_cpu_seconds",
        "Total user and system CPU time spent in seconds",
        counter,
    );
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let limit = getrlimit(Resource::Nofile).current;
    for (name, help, value) in [
        (
            "process_resident_memory_bytes",
            "Resident memory size in bytes",
            kib(&status, "VmRSS:"),
        ),
        (
            "process_virtual_memory_bytes",
            "Virtual memory size in bytes",
            kib(&status, "VmSize:"),
        ),
        (
            "process_threads",
            "Number of OS threads in the process",
            field(&status, "Threads:"),
        ),
        (
            "process_open_fds",
            "Number of open file descriptors",
            // The directory's own descriptor is not counted.
            fs::read_dir("/proc/self/fd").map_or(f64::NAN, |files| number(files.count()) - 1.0),
        ),
        (
            "process_max_fds",
            "Maximum number of open file descriptors",
            limit.map_or(f64::INFINITY, |limit| {
                number(usize::try_from(limit).unwrap_or(usize::MAX))
            }),
        ),
        (
            "process_start_time_seconds",
            "Start time of the process since unix epoch in seconds",
            started.as_duration().as_secs_f64(),
        ),
    ] {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    }
}

/// Returns the number in a field of `/proc/self/status`. `NaN` if there is none.
fn field(status: &str, name: &str) -> f64 {
    let value = status.lines().find_map(|line| line.strip_prefix(name));
    let number = value.and_then(|value| value.split_whitespace().next());
    number
        .and_then(|number| number.parse().ok())
        .unwrap_or(f64::NAN)
}

fn kib(status: &str, name: &str) -> f64 {
    field(status, name) * 1024.0
}

fn number(count: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a count to be read")]
    let count = count as f64;
    count
}
