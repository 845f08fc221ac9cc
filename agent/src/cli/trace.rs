//! `lifeboat record --trace`, and `lifeboat trace`, which shows what it recorded.

use super::output::{say, table};
use super::record::as_root;
use super::{Context, Outcome};
use crate::api::client::Client;
use crate::api::local::Status;
use crate::containers::Scope;
use crate::fleet::files::write_private;
use crate::model::trace::{Cause, MAX_TRACE, Of, Trace};
use crate::model::units::{Bytes, human_duration, utc};
use crate::telemetry::trace::{Recorder, What};
use anyhow::{Context as _, ensure};
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};

/// Between two sweeps of the kernel's map.
const SWEEP: Duration = Duration::from_millis(500);

/// Extents that are printed as the hottest.
const SHOWN: usize = 10;

/// Shows an access trace that `record --trace` wrote: who accessed how much, and the hottest extents; with
/// --json every extent in the order of first access.
#[derive(clap::Args)]
pub struct Arguments {
    /// The trace.
    file: PathBuf,
}

/// Prints a trace.
pub fn run(arguments: &Arguments, context: &Context) -> Outcome {
    let trace = read(&arguments.file)?;
    if context.json {
        say(&serde_json::to_string(&json(&trace))?);
    } else {
        say(&render(&trace));
    }
    Ok(())
}

fn read(file: &Path) -> anyhow::Result<Trace> {
    let named = || format!("cannot read {}", file.display());
    let mut bytes = Vec::new();
    fs::File::open(file)
        .and_then(|file| file.take(MAX_TRACE as u64 + 1).read_to_end(&mut bytes))
        .with_context(named)?;
    Trace::decode(&bytes).with_context(|| file.display().to_string())
}

fn write(file: &Path, trace: &Trace) -> anyhow::Result<usize> {
    let bytes = trace.encode();
    ensure!(
        bytes.len() <= MAX_TRACE,
        "the trace would be longer than {}; trace for a shorter time",
        Bytes(MAX_TRACE as u64)
    );
    write_private(file, &bytes).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(bytes.len())
}

/// Records until the time is over, Ctrl-C or SIGTERM, and writes the trace.
pub fn record(file: &Path, what: What, lasting: Option<Duration>, context: &Context) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let agent = Client::new(&context.socket)?;
    let trace = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let end = lasting.map(|lasting| Instant::now() + lasting);
        let cgroup = Scope::default().cgroup_root;
        let now = crate::fleet::now();
        let mut recorder =
            Recorder::start(Path::new("/"), &cgroup, what, now).map_err(as_root("--trace"))?;
        eprintln!("tracing; Ctrl-C ends it and writes {}", file.display());
        let mut is_over = false;
        while !is_over {
            let next = Instant::now() + SWEEP;
            let next = end.map_or(next, |end| end.min(next));
            is_over = tokio::select! {
                () = sleep_until(next) => end.is_some_and(|end| next >= end),
                _ = tokio::signal::ctrl_c() => true,
                _ = terminate.recv() => true,
            };
            if recorder.sweep() {
                // Without an agent there are the cgroups.
                if let Ok(status) = agent.get::<Status>("/v1/status").await {
                    recorder.name(&status.view.containers);
                }
            }
        }
        Ok::<_, anyhow::Error>(recorder.finish()?)
    })?;
    let bytes = write(file, &trace)?;
    if context.json {
        say(&serde_json::json!({
            "touches": trace.touches.len(),
            "files": trace.files.len(),
            "lost": trace.lost,
            "elsewhere": trace.elsewhere,
            "bytes": bytes,
        })
        .to_string());
    } else {
        say(&format!(
            "{}: {}\n{}",
            file.display(),
            Bytes(bytes as u64),
            render(&trace)
        ));
    }
    Ok(())
}

fn json(trace: &Trace) -> serde_json::Value {
    let touches: Vec<_> = trace
        .touches
        .iter()
        .map(|touch| {
            serde_json::json!({
                "path": String::from_utf8_lossy(&trace.files[touch.file as usize].path),
                "offset": touch.extent * trace.extent.0,
                "cause": touch.cause,
                "write": touch.write,
                "at_ms": touch.at_ms,
                "heat": touch.heat,
            })
        })
        .collect();
    serde_json::json!({
        "of": trace.of,
        "started": trace.started,
        "lasted_ms": trace.lasted.as_millis() as u64,
        "extent": trace.extent,
        "lost": trace.lost,
        "elsewhere": trace.elsewhere,
        "causes": trace.causes,
        "touches": touches,
    })
}

fn render(trace: &Trace) -> String {
    let (what, files) = match &trace.of {
        Of::Device(device) => (device, String::new()),
        Of::Directory(directory) => (directory, format!(" in {} files", trace.files.len())),
    };
    let mut text = format!(
        "{} of {what} from {}: {} extents of {}{files}\n",
        human_duration(trace.lasted),
        utc(trace.started),
        trace.touches.len(),
        trace.extent
    );
    if trace.elsewhere > 0 {
        text.push_str(&format!(
            "{} accesses to other parts of its device, as metadata and files that are gone\n",
            trace.elsewhere
        ));
    }
    if trace.lost > 0 {
        text.push_str(&format!("{} accesses found no room\n", trace.lost));
    }
    let sum = |cause: usize, write: bool| {
        let of = |touch: &&_| is_of(touch, cause, write);
        let touches = trace.touches.iter().filter(of);
        let (extents, heat) = touches.fold((0, 0_u64), |(extents, heat), touch| {
            (extents + 1, heat.saturating_add(touch.heat))
        });
        format!("{heat} in {extents} extents")
    };
    let causes: Vec<[String; 3]> = (0..trace.causes.len())
        .map(|cause| {
            let name = name(&trace.causes[cause]);
            [name, sum(cause, false), sum(cause, true)]
        })
        .collect();
    text.push_str(&table(["BY", "READS", "WRITES"], &causes));
    let hottest: Vec<[String; 3]> = trace
        .hottest(|_| true)
        .into_iter()
        .take(SHOWN)
        .map(|(file, extent, reads)| {
            let path = String::from_utf8_lossy(&trace.files[file as usize].path);
            let offset = extent * trace.extent.0;
            [reads.to_string(), offset.to_string(), path.into_owned()]
        })
        .collect();
    if !hottest.is_empty() {
        text.push('\n');
        text.push_str(&table(["READS", "OFFSET", "FILE"], &hottest));
    }
    text
}

fn is_of(touch: &crate::model::trace::Touch, cause: usize, write: bool) -> bool {
    touch.cause as usize == cause && touch.write == write
}

fn name(cause: &Cause) -> String {
    match &cause.container {
        Some(container) => container.to_string(),
        None if cause.cgroup.is_empty() => "a cgroup that is gone".to_owned(),
        None => format!("cgroup {}", cause.cgroup),
    }
}
