//! `pitr-restore drill`: its options, the plan, and the output.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Args;
use quick::{push::wait_for_daemon, whole};
use repository::{ExitKind, config::ClusterSettings};
use wal_format::{CheckVerdict, SystemIdentifier};

use super::{
    arguments::{self, buffers, bytes, duration, pair},
    audit::tell_the_daemon,
    chosen::{self, TargetArgs},
    opening::{absolute, archive},
    output,
    restore::{bar, refuse_relative},
};
use crate::{
    Error, PlanError, RestorePlan, Result,
    drill::{
        self, Course, Drill, Failure, Options,
        pick::{ATTEMPTS_MAX, Goal, Picked, new_seed, parse_goal, pick},
        report::Report,
        scratch::Scratch,
    },
    execute::{Action, Destination, Recovery},
    inventory::{Archive, Inventory},
    space,
    start::{self, Interrupt},
    tablespaces::{self, Directories},
    unfinished,
};

/// Default of `--amcheck-limit`: some minutes at most.
const AMCHECK_LIMIT_DEFAULT: &str = "4GB";

#[derive(Debug, Args)]
pub(super) struct DrillArgs {
    /// The target: latest, random, an LSN or a time. --target-time and the like name others.
    #[arg(long = "target", value_name = "TARGET", group = "target", value_parser = parse_goal)]
    goal: Option<Goal>,
    #[command(flatten)]
    chosen: TargetArgs,
    /// Repeat the choice of a random target. Default: a new one, which is printed.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Write a report into this directory: Markdown and JSON.
    #[arg(long, value_name = "DIR")]
    pub(super) report: Option<PathBuf>,
    /// Restore below this directory. Default: `drill_scratch`, or else the system's directory for
    /// temporary files.
    #[arg(long, value_name = "DIR")]
    pub(super) scratch: Option<PathBuf>,
    /// Keep the copy, without a running server.
    #[arg(long)]
    keep: bool,
    /// Dump every database to nowhere, which reads every row.
    #[arg(long)]
    dump: bool,
    /// Check at most this much of each database with `pg_amcheck`: random tables with their
    /// indexes. 0 turns it off.
    #[arg(long, value_name = "SIZE", default_value = AMCHECK_LIMIT_DEFAULT, value_parser = bytes)]
    amcheck_limit: u64,
    /// Time limit of each run of `pg_amcheck`, `pg_dump` and `pg_checksums`, and of the first
    /// connection if it is below 60 s.
    #[arg(long, value_name = "DURATION", default_value = "6h", value_parser = duration)]
    check_timeout: Duration,
    /// Give up when the recovery makes no progress for this long.
    #[arg(long, value_name = "DURATION", default_value = "15min", value_parser = duration)]
    recovery_timeout: Duration,
    /// `shared_buffers` of the server of the drill.
    #[arg(long, value_name = "SIZE", value_parser = buffers)]
    recovery_buffers: Option<String>,
    /// Append a setting to the restored configuration.
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    set: Vec<(String, String)>,
    /// Number of threads that extract. Default: one for each processor.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Directory of PostgreSQL's programs.
    #[arg(long, value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// As root: the user who runs the drill.
    #[arg(long, value_name = "USER")]
    pub(super) owner: Option<String>,
    /// Print one JSON document.
    #[arg(long)]
    pub(super) json: bool,
}

/// Runs a drill. Returns the exit code of its result.
///
/// # Errors
/// Those of a drill that could not begin: they are no result, and nothing is recorded.
pub(super) fn run(
    cluster: &ClusterSettings,
    config: Option<PathBuf>,
    system: Option<SystemIdentifier>,
    args: &DrillArgs,
    json: bool,
) -> Result<ExitCode> {
    let began = Instant::now();
    if rustix::process::getuid().is_root() {
        return Err(Error::usage(
            "PostgreSQL does not run as root: name the user who runs the drill with --owner",
        ));
    }
    arguments::check_settings(&args.set)?;
    refuse_relative(cluster)?;
    let base = args
        .scratch
        .clone()
        .or_else(|| cluster.drill.scratch.clone());
    let base = absolute(&base.unwrap_or_else(std::env::temp_dir))?;
    let report = args.report.as_deref().map(absolute).transpose()?;
    let mut archive = archive(cluster, system)?;
    let system = archive.identity().system_identifier;
    let version = archive.identity().postgresql_major;
    let postgres = start::find_postgres(args.pg_bin.as_deref(), version)?;
    let picked = pick_target(args, &mut archive)?;
    // Until here a signal ends the program at once, and there is nothing to remove.
    let interrupt = Interrupt::catch()?;
    let mut scratch = Scratch::take(&base, &cluster.name, system, &output::note)?;
    let mut course = Course::begin(cluster, picked.words.clone(), picked.seed, began);
    if !json {
        output::line(&format!(
            "drill         {} of cluster {}",
            course.outcome.id, cluster.name
        ));
        let seed = picked
            .seed
            .map_or_else(String::new, |seed| format!(" (seed {seed})"));
        output::line(&format!("target        {}{seed}", picked.words));
    }
    let directory = scratch.directory(args.keep, &course.outcome.id)?;
    course.step("the restore is planned");
    let planned = plan(&mut archive, &picked, args, &directory);
    let archive = Arc::new(archive);
    let done = match planned {
        Ok((plan, mapping)) => {
            // A drill that does not fit, or whose server cannot listen, says nothing of the
            // archive.
            space::refuse_shortage(&plan)?;
            let mut set = drill::prepare_access(&directory)?;
            set.extend(args.set.iter().cloned());
            let destination = Destination {
                directory: directory.join("data"),
                tablespaces: mapping,
                delta: false,
                jobs: args
                    .jobs
                    .unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from)),
                recovery: Recovery {
                    action: Action::Promote,
                    standby: false,
                    start: false,
                    keep_archiving: false,
                    port: None,
                    set,
                    repository: cluster.repository.clone(),
                    config,
                    program: whole::called().map_err(Error::io("find", "this program"))?,
                },
            };
            drill::run(
                &Drill {
                    archive: &archive,
                    cluster,
                    target: &picked.target,
                    plan: &plan,
                    destination: &destination,
                    directory: &directory,
                    postgres: &postgres,
                    interrupt: &interrupt,
                    bar: &bar(&plan),
                    tell: &output::note,
                    options: Options {
                        dump: args.dump,
                        amcheck_limit_bytes: args.amcheck_limit,
                        check_timeout: args.check_timeout,
                        recovery_timeout: args.recovery_timeout,
                        buffers: args.recovery_buffers.clone(),
                    },
                },
                &mut course,
            )
        }
        Err(error @ Error::Plan(_)) if !picked.is_own => return Err(error),
        Err(error @ Error::Usage { .. }) => return Err(error),
        Err(error) => Err(error),
    };
    if interrupt.check().is_err() || matches!(done, Err(Error::Interrupted { .. })) {
        scratch.remove()?;
        let copy = if args.keep { "kept" } else { "removed" };
        output::error(&format!(
            "a signal came: the drill was stopped and its copy {copy}; nothing is recorded"
        ));
        return Ok(ExitCode::from(ExitKind::Failed.code()));
    }
    if let Err(error) = &done {
        course.fail(Failure::from(error));
    }
    course.step(if args.keep {
        "the copy is kept"
    } else {
        "the copy is removed"
    });
    if let Err(error) = scratch.remove() {
        course.fail(Failure {
            kind: ExitKind::Failed,
            message: format!("the scratch directory was not removed: {error}"),
        });
    }
    let (outcome, failure) = course.end();
    let local = report.as_deref().unwrap_or(&base);
    let mut told = Report::record(&archive, system, outcome, local)?;
    told.kept = args.keep.then_some(directory);
    tell_the_daemon(cluster, &told.outcome.id);
    wait_for_daemon(cluster);
    let written = report.map(|directory| told.write(&directory)).transpose()?;
    print(&told, written.as_deref(), json)?;
    Ok(match failure {
        None => ExitCode::SUCCESS,
        Some(failure) => {
            output::error(&format!("the drill has failed: {}", told.outcome.message));
            ExitCode::from(failure.kind.code())
        }
    })
}

fn pick_target(args: &DrillArgs, archive: &mut Archive) -> Result<Picked> {
    if args.seed.is_some() && args.goal != Some(Goal::Random) {
        return Err(Error::usage("--seed goes with --target random"));
    }
    if let Some(words) = args.chosen.shown() {
        return Ok(Picked {
            target: args.chosen.recovery_target(jiff::Timestamp::now())?,
            words,
            seed: None,
            is_own: false,
        });
    }
    let goal = args.goal.as_ref().unwrap_or(&Goal::Latest);
    let zone = args.chosen.time_zone.as_deref();
    let seed = args.seed.unwrap_or_else(new_seed);
    let mut picked = pick(goal, (seed, 0), zone, archive)?;
    if *goal != Goal::Random {
        return Ok(picked);
    }
    // The begin of the window is known to a second only: the plan may refuse a time in it.
    for attempt in 1..ATTEMPTS_MAX {
        let planned = chosen::plan(archive, &picked.target, &args.chosen, false);
        if !matches!(planned, Err(Error::Plan(PlanError::TooEarly { .. }))) {
            break;
        }
        picked = pick(goal, (seed, attempt), zone, archive)?;
    }
    Ok(picked)
}

/// Plans the restore into the scratch directory. Every tablespace gets a directory there.
fn plan(
    archive: &mut Archive,
    picked: &Picked,
    args: &DrillArgs,
    directory: &Path,
) -> Result<(RestorePlan, BTreeMap<PathBuf, PathBuf>)> {
    let mut plan = chosen::plan(archive, &picked.target, &args.chosen, false)?;
    unfinished::settle(archive, &mut plan, false)?;
    let locations = tablespaces::locations(archive, &plan)?;
    let places = (1..).map(|number: u32| directory.join(format!("tablespace{number}")));
    let mapping: BTreeMap<PathBuf, PathBuf> = locations.into_iter().zip(places).collect();
    let target = directory.join("data");
    let directories = Directories {
        target: Some(&target),
        mapping: &mapping,
        delta: false,
        standby: false,
    };
    chosen::settle(archive, &mut plan, &directories)?;
    Ok((plan, mapping))
}

fn print(told: &Report, written: Option<&Path>, json: bool) -> Result<()> {
    if let Some((path, reason)) = &told.recorded_locally {
        output::error(&format!(
            "the result could not be stored in the repository ({reason}); it is in {}",
            path.display()
        ));
    }
    if json {
        return output::json(told);
    }
    let outcome = &told.outcome;
    let seconds = |value: Option<f64>| {
        value.map_or_else(|| "unknown".to_owned(), |value| format!("{value:.1} s"))
    };
    if let Some(backup) = &outcome.backup {
        output::line(&format!("backup        {backup}"));
    }
    for check in outcome.drill.iter().flat_map(|record| &record.checks) {
        let verdict = match check.verdict {
            CheckVerdict::Passed => "ok",
            CheckVerdict::Failed => "FAILED",
            CheckVerdict::Skipped => "skipped",
        };
        output::line(&format!("{verdict:<13} {}: {}", check.name, check.answer));
    }
    output::line(&format!(
        "measured      fetch {}, replay {}, first answer after {}, lost {}",
        seconds(outcome.fetch_seconds),
        seconds(outcome.replay_seconds),
        seconds(outcome.rto_seconds),
        seconds(outcome.loss_seconds)
    ));
    for change in &told.changes {
        output::line(&format!("changed       {change}"));
    }
    if let Some(kept) = &told.kept {
        output::line(&format!(
            "kept          {}; remove it when it is no longer needed",
            kept.display()
        ));
    }
    if let Some(path) = written {
        output::line(&format!("report        {}", path.display()));
    }
    let verdict = if outcome.passed { "passed" } else { "FAILED" };
    output::line(&format!("{verdict:<13} {}", outcome.message));
    Ok(())
}
