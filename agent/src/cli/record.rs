//! `lifeboat record`: the device's samples into a file, for `lifeboat policy replay`.

use super::daemon::ask;
use super::{Context, Failure, Outcome};
use crate::api::client::{Client, ClientError};
use crate::api::local::Sweep;
use crate::health::{Encoder, MAGIC, RecordingHeader, recorded, span};
use crate::model::units::{Bytes, UnixMillis, human_duration};
use crate::telemetry::trace::What;
use anyhow::Context as _;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// Between two tries to reach an agent that was restarted.
const RETRY: Duration = Duration::from_secs(1);

/// Records the device's samples, sweep by sweep, until Ctrl-C. A file that is there already is continued.
/// Or prints what changed on a block device, epoch by epoch. Or traces which parts of a device or directory
/// are accessed first and how often.
#[derive(clap::Args)]
pub struct Arguments {
    /// The recording.
    #[arg(short, long, value_name = "FILE", required_unless_present_any = ["dirty", "trace"])]
    output: Option<PathBuf>,
    /// Print which extents of this block device were written, zeroed or discarded; needs root and no agent.
    #[arg(long, value_name = "DEVICE", conflicts_with = "output")]
    dirty: Option<PathBuf>,
    /// Write an access trace to this file, of --device or --volume; needs root. The agent, when it runs, names
    /// the containers.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["output", "dirty"])]
    trace: Option<PathBuf>,
    /// The block device that is traced.
    #[arg(long, requires = "trace", required_unless_present_any = ["volume", "output", "dirty"])]
    device: Option<PathBuf>,
    /// The directory whose files are traced.
    #[arg(
        long,
        value_name = "DIRECTORY",
        requires = "trace",
        conflicts_with = "device"
    )]
    volume: Option<PathBuf>,
    /// Length of an epoch of `--dirty`.
    #[arg(long, value_name = "SPAN", value_parser = span, default_value = "1s", requires = "dirty")]
    every: Duration,
    /// End after this time, such as 10m or 1d.
    #[arg(long = "for", value_name = "SPAN", value_parser = span)]
    lasting: Option<Duration>,
}

/// Records until the time is over, Ctrl-C or SIGTERM.
pub fn run(arguments: &Arguments, context: &Context) -> Outcome {
    if let Some(device) = &arguments.dirty {
        return super::dirty::run(device, arguments.every, arguments.lasting, context);
    }
    if let Some(file) = &arguments.trace {
        let device = arguments.device.clone().map(What::Device);
        let volume = arguments.volume.clone().map(What::Directory);
        let what = device
            .or(volume)
            .context("neither a device nor a directory is named")?;
        return super::trace::record(file, what, arguments.lasting, context);
    }
    let output = arguments.output.as_deref().context("no file is named")?;
    let done = ask(&context.socket, async |agent| {
        let mut terminate = signal(SignalKind::terminate())?;
        let lasting = arguments.lasting.unwrap_or(Duration::MAX);
        let mut recorder = Recorder::start(output, agent).await?;
        let ended = tokio::select! {
            ended = recorder.run(agent) => ended,
            _ = tokio::time::sleep(lasting) => Ok(()),
            _ = tokio::signal::ctrl_c() => Ok(()),
            _ = terminate.recv() => Ok(()),
        };
        recorder
            .file
            .sync_all()
            .with_context(|| format!("cannot sync {}", output.display()))?;
        ended.map(|()| recorder)
    })?;
    if context.json {
        println!(
            "{}",
            serde_json::json!({ "sweeps": done.sweeps, "bytes": done.bytes, "missed": done.missed })
        );
        return Ok(());
    }
    println!(
        "{}: {} sweeps in {}, {} ({} bytes a sweep)",
        output.display(),
        done.sweeps,
        human_duration(done.started.elapsed()),
        Bytes(done.bytes),
        done.bytes / done.sweeps.max(1)
    );
    if done.missed > Duration::ZERO {
        println!(
            "without samples for {}: the agent did not run, or swept late",
            human_duration(done.missed)
        );
    }
    Ok(())
}

struct Recorder {
    file: File,
    path: PathBuf,
    encoder: Encoder,
    started: Instant,
    last: UnixMillis,
    sweeps: u64,
    bytes: u64,
    missed: Duration,
}

/// A sweep a second is the agent's own; later than this, one was missed.
const LATE: Duration = Duration::from_secs(3);

impl Recorder {
    async fn start(path: &Path, agent: &Client) -> Result<Self, Failure> {
        let first: Sweep = agent.get("/v1/samples").await.map_err(Failure::of)?;
        let (encoder, header) = Encoder::start(&RecordingHeader {
            device: first.device.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            at: first.at,
        })?;
        let file = open(path)?;
        let mut recorder = Self {
            file,
            path: path.to_owned(),
            encoder,
            started: Instant::now(),
            last: first.at,
            sweeps: 0,
            bytes: 0,
            missed: Duration::ZERO,
        };
        recorder.append(&header)?;
        recorder.sweep(&first)?;
        Ok(recorder)
    }

    async fn run(&mut self, agent: &Client) -> Outcome {
        loop {
            let path = format!("/v1/samples?after={}", self.last.0);
            match agent.get::<Sweep>(&path).await {
                Ok(sweep) => self.sweep(&sweep)?,
                // A restarted agent is waited for: a recording lasts longer than an upgrade.
                Err(ClientError::Unreachable { .. }) => tokio::time::sleep(RETRY).await,
                Err(error) => return Err(Failure::of(error)),
            }
        }
    }

    fn sweep(&mut self, sweep: &Sweep) -> Outcome {
        let since = sweep.at.since(self.last);
        if since > LATE {
            self.missed += since;
        }
        self.last = sweep.at;
        self.sweeps += 1;
        let frame = self.encoder.sweep(sweep.at, &sweep.samples);
        self.append(&frame)
    }

    fn append(&mut self, frame: &[u8]) -> Outcome {
        self.bytes += frame.len() as u64;
        let written = self.file.write_all(frame);
        Ok(written.with_context(|| format!("cannot write {}", self.path.display()))?)
    }
}

/// A new recording, or one that is there, cut to its last whole frame.
fn open(path: &Path) -> Result<File, Failure> {
    let named = |what: &str| format!("cannot {what} {}", path.display());
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| named("open"))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)
        .with_context(|| named("read"))?;
    // A recorder that died with its first bytes left a part of the magic.
    if MAGIC.starts_with(&bytes) {
        file.set_len(0).with_context(|| named("cut"))?;
        file.rewind().with_context(|| named("seek in"))?;
        file.write_all(MAGIC).with_context(|| named("write"))?;
        return Ok(file);
    }
    let whole = recorded(&bytes)
        .with_context(|| path.display().to_string())?
        .whole as u64;
    file.set_len(whole).with_context(|| named("cut"))?;
    file.seek(std::io::SeekFrom::Start(whole))
        .with_context(|| named("seek in"))?;
    Ok(file)
}
