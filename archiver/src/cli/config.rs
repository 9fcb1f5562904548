//! `wal-archiver config check` and `config show`.

use dashboard::http;
use replication::ConnInfo;
use repository::config::Settings;

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

pub(super) fn show(settings: &Settings) -> Result<()> {
    output::line(&format!("http = \"{}\"", settings.http));
    let access = &settings.http_access;
    for (key, token) in [
        ("http_token", &access.read),
        ("http_operate_token", &access.operate),
    ] {
        if token.is_some() {
            output::line(&format!("# {key}: set"));
        }
    }
    if let Some((certificate, key)) = &access.tls {
        output::line(&format!(
            "http_tls_certificate = \"{}\"",
            certificate.display()
        ));
        output::line(&format!("http_tls_key = \"{}\"", key.display()));
    }
    if !access.allowed_hosts.is_empty() {
        output::line(&format!("http_allowed_hosts = {:?}", access.allowed_hosts));
    }
    if let Some(url) = &access.public_url {
        output::line(&format!("http_public_url = \"{url}\""));
    }
    if let Some(url) = &settings.runbook_url {
        output::line(&format!("runbook_url = \"{url}\""));
    }
    for target in &settings.notify {
        // The URL of a webhook is as secret as a password.
        output::line(&format!("# notify {}: {:?}", target.name, target.kind));
    }
    for cluster in &settings.clusters {
        // Only the parsed form shows which parts are secret.
        let conninfo = ConnInfo::parse(&cluster.conninfo)?;
        let servers = |list: &[String]| {
            list.iter()
                .map(|other| Ok(format!("{:?}", ConnInfo::parse(other)?).replace('"', "'")))
                .collect::<Result<Vec<_>>>()
        };
        let (heal_from, standbys) = (servers(&cluster.heal_from)?, servers(&cluster.standbys)?);
        let acknowledge = format!("{:?}", cluster.acknowledge).to_lowercase();
        for line in [
            String::new(),
            format!("[cluster.{}]", cluster.name),
            format!(
                "conninfo = \"{}\"",
                format!("{conninfo:?}").replace('"', "'")
            ),
            format!("heal_from = {heal_from:?}"),
            format!("standbys = {standbys:?}"),
            format!("gap_grace = \"{:?}\"", cluster.gap_grace),
            format!("slot = \"{}\"", cluster.slot),
            format!("application_name = \"{}\"", cluster.application_name),
            format!("repository = \"{}\"", cluster.repository),
            format!("spool = \"{}\"", cluster.spool.display()),
            cluster.spool_limit_bytes.map_or_else(
                || "# spool_limit_bytes: as much as the spool's disk takes".to_owned(),
                |bytes| format!("spool_limit_bytes = {bytes}"),
            ),
            format!(
                "when_full = \"{}\"  # {}",
                cluster.when_full.name(),
                cluster.when_full.cost()
            ),
            format!("primary_wal_max_bytes = {}", cluster.primary_wal_max_bytes),
            format!("catalog = \"{}\"", cluster.catalog.display()),
            format!("acknowledge = \"{acknowledge}\""),
            format!(
                "remote_flush_interval = \"{:?}\"",
                cluster.remote_flush_interval
            ),
            format!("remote_flush_bytes = {}", cluster.remote_flush_bytes),
            format!("rpo_target = \"{:?}\"", cluster.rpo_target),
            format!("backup_max_age = \"{:?}\"", cluster.backup_max_age),
            match &cluster.repository.retention {
                Some(policy) => format!("# keeps {policy}"),
                None => "# keeps everything for ever".to_owned(),
            },
            format!("expire_interval = \"{:?}\"", cluster.expire_interval),
            format!("expire_grace = \"{:?}\"", cluster.expire_grace),
            match cluster.lock {
                None => "# lock_days: nothing is locked".to_owned(),
                Some(lock) => format!(
                    "lock_days = {}  # lock_mode = \"{}\"",
                    lock.days,
                    format!("{:?}", lock.mode).to_lowercase()
                ),
            },
            format!("compression_level = {}", cluster.compression_level),
            format!("seal_threads = {}", cluster.seal_threads),
        ] {
            output::line(&line);
        }
        if let Some(scratch) = &cluster.drill.scratch {
            output::line(&format!("drill_scratch = \"{}\"", scratch.display()));
        }
        if let Some(user) = &cluster.drill.user {
            output::line(&format!("drill_user = \"{user}\""));
        }
        for check in &cluster.drill.checks {
            output::line(&format!(
                "# drill.check \"{}\" in database {}: expects {} within {:?}",
                check.name, check.database, check.expect, check.timeout
            ));
        }
        if let Some(walsender) = &cluster.walsender {
            output::line(&format!("walsender = \"{}\"", walsender.address));
            output::line(&format!("walsender_user = \"{}\"", walsender.user));
            if walsender.password.is_some() {
                output::line("# walsender_password: set");
            }
            if let Some((certificate, key)) = &walsender.tls {
                output::line(&format!(
                    "walsender_tls_certificate = \"{}\"",
                    certificate.display()
                ));
                output::line(&format!("walsender_tls_key = \"{}\"", key.display()));
            }
        }
        if let Some(source) = &cluster.repository.encryption {
            output::line(&source.to_string());
        }
        if !cluster.repository.others.is_empty() {
            let required = format!("{:?}", cluster.repository.required).to_lowercase();
            output::line(&format!("repositories_required = \"{required}\""));
        }
        for other in &cluster.repository.others {
            let mut entry = format!("url = \"{other}\"");
            let s3 = other
                .s3
                .lines()
                .into_iter()
                .filter(|_| other.url.folder().is_none());
            for line in s3.chain(other.encryption.as_ref().map(ToString::to_string)) {
                entry.push_str(", ");
                entry.push_str(&line);
            }
            let keeps = other.retention.as_ref();
            let keeps = keeps.map_or_else(|| "everything for ever".to_owned(), ToString::to_string);
            output::line(&format!("# repositories: {{ {entry} }} keeps {keeps}"));
        }
        if cluster.repository.url.folder().is_none() {
            for line in cluster.repository.s3.lines() {
                output::line(&line);
            }
        }
    }
    Ok(())
}
