//! `wal-archiver config check`, `config show` and `config example`.

use std::{
    fmt::{Debug, Display},
    path::Path,
    time::Duration,
};

use dashboard::http;
use replication::ConnInfo;
use repository::{
    access::FolderAccess,
    config::{
        ClusterSettings, RepositoryPlace, S3Credentials, Settings,
        keys::{self, Group, KEYS, Key, Place},
    },
    encryption::KeySource,
    expire::RetentionPolicy,
    schedule::Schedule,
};

use super::{output, places};
use crate::error::Result;

pub(super) fn check(settings: &Settings) -> Result<()> {
    http::check(settings.http, &settings.http_access)?;
    places::require_outside(settings)?;
    for cluster in &settings.clusters {
        ConnInfo::parse(&cluster.conninfo)?;
        for other in cluster.heal_from.iter().chain(&cluster.standbys) {
            ConnInfo::parse(other)?;
        }
        for place in cluster.repository.each() {
            if let Some(source) = &place.encryption {
                source.load()?;
            }
        }
        output::line(&format!("cluster {}: configuration is valid", cluster.name));
    }
    Ok(())
}

/// Prints every key: its value, or as a comment what holds without it. A value that cannot be
/// written as the file has it, and a secret, are comments too.
pub(super) fn show(settings: &Settings) -> Result<()> {
    let top = |key: &&Key| key.place == Place::Top;
    for key in KEYS.iter().filter(top) {
        line(key, of_top(settings, key.name));
    }
    for target in &settings.notify {
        // The URL of a webhook is as secret as a password.
        output::line(&format!("# notify {}: {:?}", target.name, target.kind));
    }
    for cluster in &settings.clusters {
        output::line("");
        output::line(&format!("[cluster.{}]", cluster.name));
        let of_cluster = |key: &&Key| key.place == Place::Cluster;
        for key in KEYS.iter().filter(of_cluster) {
            // The access to a bucket says nothing of a folder.
            if key.group != Group::Bucket || cluster.repository.url.folder().is_none() {
                line(key, of_cluster_key(cluster, key.name)?);
            }
        }
        next_runs(cluster);
        for check in &cluster.drill.checks {
            output::line(&format!(
                "# drill.check \"{}\" in database {}: expects {} within {:?}",
                check.name, check.database, check.expect, check.timeout
            ));
        }
    }
    Ok(())
}

pub(super) fn example() {
    for line in keys::example().lines() {
        output::line(line);
    }
}

/// The value of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Shown {
    /// A value in TOML.
    Value(String),
    /// Words about the value.
    Words(String),
    /// The key is not set, and its default is not a value.
    Unset,
    /// No code knows the key.
    Unknown,
}

fn line(key: &Key, shown: Shown) {
    output::line(&match shown {
        Shown::Value(value) => format!("{} = {value}", key.name),
        Shown::Words(words) => format!("# {}: {words}", key.name),
        Shown::Unset | Shown::Unknown => format!("# {}: {}", key.name, key.default),
    });
}

fn text(value: impl AsRef<str>) -> Shown {
    Shown::Value(toml::Value::from(value.as_ref()).to_string())
}

fn path(value: &Path) -> Shown {
    text(value.display().to_string())
}

fn number(value: impl Display + Copy) -> Shown {
    Shown::Value(value.to_string())
}

fn texts(values: &[String]) -> Shown {
    Shown::Value(toml::Value::from(values.to_vec()).to_string())
}

/// Returns a duration in the largest unit that gives a whole number.
fn duration(value: Duration) -> Shown {
    let millis = value.as_millis();
    let units = [
        (86_400_000, "d"),
        (3_600_000, "h"),
        (60_000, "min"),
        (1000, "s"),
    ];
    let unit = units
        .iter()
        .find(|(length, _)| millis.is_multiple_of(*length));
    let (length, unit) = unit.copied().unwrap_or((1, "ms"));
    text(format!("{}{unit}", millis / length))
}

/// Returns the name of a variant as the file has it.
fn choice(value: &impl Debug) -> Shown {
    text(format!("{value:?}").to_lowercase())
}

fn or_unset<T>(value: Option<T>, shown: impl FnOnce(T) -> Shown) -> Shown {
    value.map_or(Shown::Unset, shown)
}

/// Returns the value of a secret: that it is set.
fn secret<T>(value: Option<&T>) -> Shown {
    or_unset(value, |_| Shown::Words("set".to_owned()))
}

fn of_top(settings: &Settings, name: &str) -> Shown {
    let access = &settings.http_access;
    let tls = access.tls.as_ref();
    match name {
        "http" => text(settings.http.to_string()),
        "http_token_file" => secret(access.read.as_ref()),
        "http_operate_token_file" => secret(access.operate.as_ref()),
        "http_tls_certificate" => or_unset(tls, |(certificate, _)| path(certificate)),
        "http_tls_key" => or_unset(tls, |(_, key)| path(key)),
        "http_allowed_hosts" if access.allowed_hosts.is_empty() => Shown::Unset,
        "http_allowed_hosts" => texts(&access.allowed_hosts),
        "http_public_url" => or_unset(access.public_url.as_ref(), text),
        "runbook_url" => or_unset(settings.runbook_url.as_ref(), text),
        _ => Shown::Unknown,
    }
}

fn of_cluster_key(cluster: &ClusterSettings, name: &str) -> Result<Shown> {
    // Only the parsed form shows which parts are secret.
    let server = |conninfo: &str| -> Result<String> {
        Ok(format!("{:?}", ConnInfo::parse(conninfo)?).replace('"', "'"))
    };
    let servers = |list: &[String]| -> Result<Shown> {
        let list = list.iter().map(|conninfo| server(conninfo));
        Ok(texts(&list.collect::<Result<Vec<_>>>()?))
    };
    Ok(match name {
        "conninfo" => text(server(&cluster.conninfo)?),
        "heal_from" => servers(&cluster.heal_from)?,
        "standbys" => servers(&cluster.standbys)?,
        "slot" => text(&cluster.slot),
        "application_name" => text(&cluster.application_name),
        "acknowledge" => choice(&cluster.acknowledge),
        "gap_grace" => duration(cluster.gap_grace),
        "catalog" => path(&cluster.catalog),
        "compression_level" => number(cluster.compression_level),
        "seal_threads" => number(cluster.seal_threads),
        "rpo_target" => duration(cluster.rpo_target),
        "rto_target" => or_unset(cluster.rto_target, duration),
        "backup_max_age" => duration(cluster.backup_max_age),
        "drill_max_age" => or_unset(cluster.drill_max_age, duration),
        "verify_max_age" => or_unset(cluster.verify_max_age, duration),
        "expire_interval" => duration(cluster.expire_interval),
        "expire_grace" => duration(cluster.expire_grace),
        "audit_keep" => duration(cluster.audit_keep),
        "lock_days" => or_unset(cluster.lock, |lock| number(lock.days)),
        "lock_mode" => or_unset(cluster.lock, |lock| choice(&lock.mode)),
        "drill_scratch" => or_unset(cluster.drill.scratch.as_deref(), path),
        "drill_user" => or_unset(cluster.drill.user.as_ref(), text),
        _ => [of_schedules, of_spool, of_walsender, of_repository]
            .iter()
            .map(|group| group(cluster, name))
            .find(|shown| *shown != Shown::Unknown)
            .unwrap_or(Shown::Unknown),
    })
}

fn of_schedules(cluster: &ClusterSettings, name: &str) -> Shown {
    let schedules = &cluster.schedules;
    let when = |schedule: &Option<Schedule>| or_unset(schedule.as_ref(), |one| text(one.text()));
    let zone =
        |schedule: &Option<Schedule>| or_unset(schedule.as_ref(), |one| text(one.zone_name()));
    match name {
        "backup_schedule" => when(&schedules.backup),
        "backup_time_zone" => zone(&schedules.backup),
        "backup_catch_up" => number(schedules.backup_catch_up),
        "backup_rate_limit" => or_unset(cluster.backup_rate_limit, number),
        "drill_schedule" => when(&schedules.drill),
        "drill_time_zone" => zone(&schedules.drill),
        "drill_report_dir" => or_unset(schedules.drill_report_dir.as_deref(), path),
        _ => Shown::Unknown,
    }
}

/// Prints the next run of each schedule.
fn next_runs(cluster: &ClusterSettings) {
    let schedules = &cluster.schedules;
    for (name, schedule) in [("backup", &schedules.backup), ("drill", &schedules.drill)] {
        if let Some(schedule) = schedule {
            let next = schedule.next_after(jiff::Timestamp::now());
            let next = next.map_or_else(|| "never".to_owned(), |next| format!("{next:.0}"));
            output::line(&format!("# {name}_schedule, next run: {next}"));
        }
    }
}

fn of_spool(cluster: &ClusterSettings, name: &str) -> Shown {
    match name {
        "spool" => path(&cluster.spool),
        "spool_limit_bytes" => or_unset(cluster.spool_limit_bytes, number),
        "when_full" => text(cluster.when_full.name()),
        "primary_wal_max_bytes" => number(cluster.primary_wal_max_bytes),
        "remote_flush_interval" => duration(cluster.remote_flush_interval),
        "remote_flush_bytes" => number(cluster.remote_flush_bytes),
        "spool_group" => group(cluster.spool_access.as_ref()),
        "spool_mode" => mode(cluster.spool_access.as_ref()),
        _ => Shown::Unknown,
    }
}

fn group(access: Option<&FolderAccess>) -> Shown {
    or_unset(access, |access| text(&access.group))
}

fn mode(access: Option<&FolderAccess>) -> Shown {
    let mode = |access: &FolderAccess| if access.may_write { "0770" } else { "0750" };
    or_unset(access, |access| text(mode(access)))
}

fn of_walsender(cluster: &ClusterSettings, name: &str) -> Shown {
    let walsender = cluster.walsender.as_ref();
    let tls = walsender.and_then(|walsender| walsender.tls.as_ref());
    match name {
        "walsender" => or_unset(walsender, |walsender| text(walsender.address.to_string())),
        "walsender_user" => or_unset(walsender, |walsender| text(&walsender.user)),
        "walsender_password_file" => {
            secret(walsender.and_then(|walsender| walsender.password.as_ref()))
        }
        "walsender_tls_certificate" => or_unset(tls, |(certificate, _)| path(certificate)),
        "walsender_tls_key" => or_unset(tls, |(_, key)| path(key)),
        _ => Shown::Unknown,
    }
}

fn of_repository(cluster: &ClusterSettings, name: &str) -> Shown {
    let place = &cluster.repository;
    let source = place.encryption.as_ref();
    match name {
        "repository" => text(place.to_string()),
        "repositories" if place.others.is_empty() => Shown::Unset,
        "repositories" => Shown::Words(others(&place.others)),
        "repositories_required" => choice(&place.required),
        "repository_group" => group(place.access.as_ref()),
        "repository_mode" => mode(place.access.as_ref()),
        "encryption_key_file" => match source {
            Some(KeySource::File(file)) => path(file),
            _ => Shown::Unset,
        },
        "encryption_key_env" => match source {
            Some(KeySource::Environment(variable)) => text(variable),
            _ => Shown::Unset,
        },
        "encryption_key_command" => match source {
            Some(KeySource::Command(command)) => text(command),
            _ => Shown::Unset,
        },
        _ => match of_bucket(place, name) {
            Shown::Unknown => of_retention(place.retention.as_ref(), name),
            shown => shown,
        },
    }
}

/// Returns the further repositories in one line: what `config check` has accepted.
fn others(places: &[RepositoryPlace]) -> String {
    let each = places.iter().map(|place| {
        let bucket = KEYS.iter().filter(|key| key.group == Group::Bucket);
        let bucket = bucket.filter(|_| place.url.folder().is_none());
        let mut entry = format!("{{ url = \"{place}\"");
        for key in bucket {
            if let Shown::Value(value) = of_bucket(place, key.name) {
                entry += &format!(", {} = {value}", key.name);
            }
        }
        if let Some(source) = &place.encryption {
            entry += &format!(", {source}");
        }
        let keeps = place.retention.as_ref();
        let keeps = keeps.map_or_else(|| "everything".to_owned(), ToString::to_string);
        format!("{entry} }} keeps {keeps}")
    });
    each.collect::<Vec<_>>().join("; ")
}

fn of_bucket(place: &RepositoryPlace, name: &str) -> Shown {
    let s3 = &place.s3;
    let keys = match &s3.credentials {
        S3Credentials::Keys {
            access_key,
            secret_key,
            session_token,
        } => Some((access_key, secret_key, session_token.as_ref())),
        S3Credentials::Standard | S3Credentials::File(_) => None,
    };
    match name {
        "s3_endpoint" => or_unset(s3.endpoint.as_ref(), text),
        "s3_region" => or_unset(s3.region.as_ref(), text),
        "s3_profile" => or_unset(s3.profile.as_ref(), text),
        "s3_credentials_file" => match &s3.credentials {
            S3Credentials::File(file) => path(file),
            S3Credentials::Standard | S3Credentials::Keys { .. } => Shown::Unset,
        },
        "s3_access_key" => or_unset(keys, |(access_key, ..)| text(access_key)),
        "s3_secret_key" => secret(keys.map(|(_, secret_key, _)| secret_key)),
        "s3_session_token" => secret(keys.and_then(|(.., token)| token)),
        "s3_ca_file" => or_unset(s3.ca_file.as_deref(), path),
        "s3_path_style" => number(s3.path_style),
        "s3_checksums" => number(s3.checksums),
        _ => Shown::Unknown,
    }
}

fn of_retention(policy: Option<&RetentionPolicy>, name: &str) -> Shown {
    match name {
        "keep_window" => or_unset(policy, |policy| duration(policy.window)),
        "keep_daily" => or_unset(policy, |policy| number(policy.daily)),
        "keep_weekly" => or_unset(policy, |policy| number(policy.weekly)),
        "keep_monthly" => or_unset(policy, |policy| number(policy.monthly)),
        "keep_backups_min" => or_unset(policy, |policy| number(policy.backups_min)),
        "keep_backups" => or_unset(policy, |policy| {
            texts(
                &policy
                    .pinned
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>(),
            )
        }),
        "keep_everything" => number(policy.is_none()),
        _ => Shown::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use repository::config::{CommonArgs, parse_duration};

    use super::*;

    fn settings(text: &str) -> Settings {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("tidemark.toml");
        std::fs::write(&file, text).expect("a file");
        let args = CommonArgs {
            config: Some(file),
            ..CommonArgs::default()
        };
        Settings::resolve(&args).expect("valid")
    }

    /// A new key in the table must be shown, and its default must be what is resolved.
    #[test]
    fn every_key_is_shown_and_its_default_is_true() {
        // Without a window, the other keys of retention have no effect.
        let settings = settings("repository = 'file:///r'\nkeep_window = '14d'");
        let cluster = settings.cluster().expect("one");
        for key in KEYS {
            let shown = match key.place {
                Place::Top => of_top(&settings, key.name),
                Place::Cluster => of_cluster_key(cluster, key.name).expect("valid"),
                Place::Repository | Place::Check | Place::Notify => continue,
            };
            assert_ne!(shown, Shown::Unknown, "{}: no code shows it", key.name);
            let value = |text: &str| format!("v = {text}").parse::<toml::Table>().ok();
            let Shown::Value(shown) = shown else {
                assert_eq!(value(key.default), None, "{}: it is not shown", key.name);
                continue;
            };
            // A default in words holds for the keys that are resolved from others.
            if let Some(default) = value(key.default) {
                let shown = value(&shown).expect("TOML");
                let as_duration = |table: &toml::Table| {
                    let text = table["v"].as_str()?;
                    parse_duration(key.name, text).ok()
                };
                let is_same = shown == default
                    || (key.kind == keys::Kind::Duration
                        && as_duration(&shown) == as_duration(&default));
                assert!(is_same, "{}: {shown:?}, not {default:?}", key.name);
            }
        }
    }

    #[test]
    fn a_duration_is_shown_in_its_largest_unit() {
        for (text, shown) in [
            ("90s", "90s"),
            ("60s", "1min"),
            ("48h", "2d"),
            ("1500ms", "1500ms"),
        ] {
            let value = parse_duration("key", text).expect("valid");
            assert_eq!(duration(value), Shown::Value(format!("\"{shown}\"")));
        }
    }
}
