//! `lifeboat record`: the device's samples into a file, for `lifeboat policy replay`.

use super::daemon::ask;
use super::{Context, Failure, Outcome};
use crate::api::client::{Client, ClientError};
use crate::api::local::Sweep;
use crate::health::{Encoder, MAGIC, RecordingHeader, recorded, span};
use crate::model::units::{Bytes, UnixMillis, human_duration};
use crate::telemetry::trace::What;
use anyhow::{Context as _, anyhow};
use clap::ArgGroup;
use std::fs::{File, TryLockError};
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
#[command(
    group(ArgGroup::new("record").required(true).args(["output", "dirty", "trace"])),
    group(ArgGroup::new("traced").args(["device", "volume"]).conflicts_with_all(["output", "dirty"]))
)]
pub struct Arguments {
    /// The recording.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print which extents of this block device were written, zeroed or discarded; needs root and no agent.
    #[arg(long, value_name = "DEVICE")]
    dirty: Option<PathBuf>,
    /// Write an access trace to this file, of --device or --volume; needs root. The agent, when it runs, names
    /// the containers.
    #[arg(long, value_name = "FILE", requires = "traced")]
    trace: Option<PathBuf>,
    /// The block device that is traced.
    #[arg(long, requires = "trace")]
    device: Option<PathBuf>,
    /// The directory whose files are traced.
    #[arg(long, value_name = "DIRECTORY", requires = "trace")]
    volume: Option<PathBuf>,
    /// Length of an epoch of `--dirty`.
    #[arg(long, value_name = "SPAN", value_parser = span, default_value = "1s", conflicts_with_all = ["output", "trace"])]
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
            serde_json::json!({
                "sweeps": done.sweeps, "bytes": done.bytes, "missed": done.missed,
                "lost_sweeps": done.lost,
            })
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
    if done.lost > 0 {
        println!(
            "{} sweeps are missing: they were fetched too late",
            done.lost
        );
    }
    if done.missed > Duration::ZERO {
        println!(
            "without samples for {}: the agent did not run, or swept late",
            human_duration(done.missed)
        );
    }
    Ok(())
}

/// What of `record` needs root says so, where that is why it fails.
pub fn as_root<E: Into<anyhow::Error>>(what: &str) -> impl FnOnce(E) -> anyhow::Error {
    move |error| {
        let error = error.into();
        if nix::unistd::geteuid().is_root() {
            return error;
        }
        error.context(format!(
            "`record {what}` needs root (`sudo lifeboat record {what} …`)"
        ))
    }
}

struct Recorder {
    file: File,
    path: PathBuf,
    encoder: Encoder,
    started: Instant,
    last: UnixMillis,
    /// Life of the agent and number of the last sweep.
    heard: (UnixMillis, u64),
    sweeps: u64,
    bytes: u64,
    missed: Duration,
    /// Sweeps that the agent made and that are not in the file.
    lost: u64,
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
            heard: (first.life, first.number.saturating_sub(1)),
            sweeps: 0,
            bytes: 0,
            missed: Duration::ZERO,
            lost: 0,
        };
        recorder.append(&header)?;
        recorder.sweep(&first)?;
        Ok(recorder)
    }

    async fn run(&mut self, agent: &Client) -> Outcome {
        loop {
            let (life, number) = self.heard;
            let path = format!("/v1/samples?life={}&number={number}", life.0);
            match agent.get::<Sweep>(&path).await {
                Ok(sweep) => self.sweep(&sweep)?,
                // A restarted agent is waited for: a recording lasts longer than an upgrade, and than a hang.
                Err(ClientError::Unreachable { .. } | ClientError::Silent { .. }) => {
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(Failure::of(error)),
            }
        }
    }

    fn sweep(&mut self, sweep: &Sweep) -> Outcome {
        let since = sweep.at.since(self.last);
        if since > LATE {
            self.missed += since;
        }
        let lost = lost(self.heard, (sweep.life, sweep.number));
        if !lost.is_empty() {
            self.lost += lost.end - lost.start;
            eprintln!(
                "sweeps {} to {} of the agent's are missing",
                lost.start,
                lost.end - 1
            );
        }
        self.heard = (sweep.life, sweep.number);
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

/// Numbers of the sweeps between one and the next; of another life of the agent, those before it.
fn lost(heard: (UnixMillis, u64), now: (UnixMillis, u64)) -> std::ops::Range<u64> {
    let first = if heard.0 == now.0 { heard.1 + 1 } else { 1 };
    first..now.1
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
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::Error(error)) => Err(error).with_context(|| named("lock"))?,
        Err(TryLockError::WouldBlock) => {
            return Err(anyhow!(
                "another recorder writes to {}; choose another file",
                path.display()
            )
            .into());
        }
    }
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
    let end = recorded(&bytes).with_context(|| path.display().to_string())?;
    if end.altered {
        return Err(anyhow!(
            "{} was altered at byte {}, and {} bytes follow that a crash does not explain: it stays as it is; record into another file",
            path.display(),
            end.whole,
            end.torn
        )
        .into());
    }
    let whole = end.whole as u64;
    file.set_len(whole).with_context(|| named("cut"))?;
    file.seek(std::io::SeekFrom::Start(whole))
        .with_context(|| named("seek in"))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recording(sweeps: u64) -> Vec<u8> {
        let header = RecordingHeader {
            device: "h1".into(),
            version: "0".into(),
            at: UnixMillis(1),
        };
        let (mut encoder, start) = Encoder::start(&header).unwrap();
        let mut bytes = [MAGIC, &start].concat();
        for number in 0..sweeps {
            bytes.extend(encoder.sweep(UnixMillis(number), &[]));
        }
        bytes
    }

    #[test]
    fn what_is_to_be_recorded_is_one_thing_and_only_what_belongs_to_it_may_be_said() {
        use clap::Args as _;
        let parse = |said: &[&str]| {
            let command = Arguments::augment_args(clap::Command::new("record"));
            let parsed = command.try_get_matches_from([&["record"], said].concat());
            parsed.map(|_| ()).map_err(|error| error.to_string())
        };
        let nothing = parse(&[]).unwrap_err();
        let ways = "<--output <FILE>|--dirty <DEVICE>|--trace <FILE>>";
        assert!(
            nothing.contains(ways) && !nothing.contains("--device"),
            "{nothing}"
        );
        let trace = parse(&["--trace", "t"]).unwrap_err();
        assert!(
            trace.contains("<--device <DEVICE>|--volume <DIRECTORY>>"),
            "{trace}"
        );
        for good in [
            &["-o", "f", "--for", "1m"][..],
            &["--dirty", "d", "--every", "2s"],
            &["--trace", "t", "--device", "d"],
            &["--trace", "t", "--volume", "v"],
        ] {
            parse(good).unwrap();
        }
        for bad in [
            &["-o", "f", "--device", "d"][..],
            &["-o", "f", "--every", "2s"],
            &["-o", "f", "--dirty", "d"],
            &["--dirty", "d", "--volume", "v"],
            &["--trace", "t", "--device", "d", "--volume", "v"],
        ] {
            parse(bad).unwrap_err();
        }
    }

    #[test]
    fn a_file_that_was_cut_is_continued_and_one_that_was_altered_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r");
        let whole = recording(9);
        for left in [
            [whole.as_slice(), &whole[MAGIC.len()..MAGIC.len() + 11]].concat(),
            [whole.as_slice(), &[0; 4096]].concat(),
        ] {
            std::fs::write(&path, &left).unwrap();
            drop(open(&path).unwrap());
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
        let mut altered = whole.clone();
        altered[MAGIC.len() + 20] ^= 1;
        std::fs::write(&path, &altered).unwrap();
        assert!(open(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), altered);
    }

    #[test]
    fn of_two_recorders_into_one_file_the_second_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r");
        let first = open(&path).unwrap();
        assert!(open(&path).is_err());
        drop(first);
        assert!(open(&path).is_ok());
    }

    #[test]
    fn a_sweep_that_is_missing_is_counted_also_over_a_restart_of_the_agent() {
        let (a, b) = (UnixMillis(1), UnixMillis(2));
        assert!(lost((a, 7), (a, 8)).is_empty());
        assert_eq!(lost((a, 7), (a, 10)), 8..10);
        assert!(lost((a, 7), (b, 1)).is_empty());
        assert_eq!(lost((a, 7), (b, 3)), 1..3);
    }
}
