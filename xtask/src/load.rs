//! `cargo xtask load`: clients that write to the demo application and keep a ledger of every write that
//! was acknowledged.
//!
//! Invariant: a line is in the ledger's file before the client's next request is sent, and only for an
//! answer 200. A write without an answer is repeated under a new id: it may exist or not, so it proves
//! nothing. Non-goal: latency figures.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::Host;
use crate::ledger::{Entry, Ledger};
use crate::workspace;

/// Writes to the demo application until it is told to stop.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Base URL of the application
    #[arg(long)]
    url: String,
    /// Number of clients, each with one request in flight
    #[arg(long, default_value_t = 4)]
    clients: u16,
    /// Bytes of each payload
    #[arg(long, default_value_t = 512)]
    payload: usize,
    /// Pause of each client between two writes, in milliseconds
    #[arg(long, default_value_t = 5)]
    pause_ms: u64,
    /// Ends after this many seconds; otherwise at SIGTERM
    #[arg(long)]
    seconds: Option<u64>,
    /// File of the ledger
    #[arg(long)]
    ledger: PathBuf,
}

static STOP: AtomicBool = AtomicBool::new(false);

fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Does what the command line asks.
///
/// # Errors
/// The ledger cannot be written; a failing application is no error here.
pub fn run(arguments: &Arguments) -> Result<()> {
    ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed)).context("cannot take signals")?;
    let file = File::options()
        .create(true)
        .append(true)
        .open(&arguments.ledger)
        .with_context(|| format!("cannot open the ledger {}", arguments.ledger.display()))?;
    let file = Mutex::new(file);
    let end = arguments
        .seconds
        .map(|seconds| Instant::now() + Duration::from_secs(seconds));
    thread::scope(|scope| {
        let file = &file;
        let clients: Vec<_> = (0..arguments.clients)
            .map(|number| scope.spawn(move || client(arguments, number, end, file)))
            .collect();
        clients.into_iter().try_for_each(|client| {
            client
                .join()
                .unwrap_or_else(|_| anyhow::bail!("a client of the load panicked"))
        })
    })
}

fn client(
    arguments: &Arguments,
    number: u16,
    end: Option<Instant>,
    file: &Mutex<File>,
) -> Result<()> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(5)))
        .timeout_connect(Some(Duration::from_secs(1)))
        .build()
        .into();
    let url = format!("{}/write", arguments.url.trim_end_matches('/'));
    let run = now_ms();
    for sequence in 0_u64.. {
        if STOP.load(Ordering::Relaxed) || end.is_some_and(|end| Instant::now() > end) {
            break;
        }
        let id = format!("{run:x}-{number}-{sequence}");
        // Differs in every write, and can be checked without keeping what was sent.
        let payload: String = format!("{id}|")
            .chars()
            .cycle()
            .take(arguments.payload.max(1))
            .collect();
        let body = serde_json::json!({ "id": id, "payload": payload }).to_string();
        let sent_ms = now_ms();
        let answer = agent
            .post(&url)
            .header("content-type", "application/json")
            .send(&body)
            .and_then(|mut answer| answer.body_mut().read_to_string());
        if answer.is_ok() {
            let entry = Entry {
                id,
                payload,
                sent_ms,
                acked_ms: now_ms(),
            };
            let mut line = serde_json::to_vec(&entry)?;
            line.push(b'\n');
            file.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write_all(&line)
                .context("cannot write to the ledger")?;
            thread::sleep(Duration::from_millis(arguments.pause_ms));
        } else {
            thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// The load running in a lab host. Dropping it stops it.
#[derive(Debug)]
pub struct Load {
    child: Child,
    ledger: PathBuf,
}

impl Load {
    /// Starts `clients` clients in `host` against `url`.
    ///
    /// # Errors
    /// The task runner's binary is missing, or it cannot be started.
    pub fn start(host: &Host, url: &str, clients: u16) -> Result<Self> {
        let ledger = host.log("ledger").with_extension("jsonl");
        let task = workspace::binary("xtask");
        anyhow::ensure!(
            task.exists(),
            "{} is missing: `cargo build -p xtask`",
            task.display()
        );
        let program: &Path = &task;
        let mut argv = vec![program.as_os_str().to_owned()];
        argv.extend(
            [
                "load",
                "--url",
                url,
                "--clients",
                &clients.to_string(),
                "--ledger",
            ]
            .map(Into::into),
        );
        argv.push(ledger.clone().into());
        let child = host.spawn_logged("load", argv)?;
        Ok(Self { child, ledger })
    }

    /// What was acknowledged so far.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub fn ledger(&self) -> Result<Ledger> {
        Ledger::read(&self.ledger)
    }

    /// Stops the clients, waits for their last answers and returns the ledger.
    ///
    /// # Errors
    /// The load had failed by itself, or the ledger cannot be read.
    pub fn stop(mut self) -> Result<Ledger> {
        self.signal();
        let status = self.child.wait().context("the load was lost")?;
        anyhow::ensure!(
            status.success(),
            "the load failed by itself: {status}; see its log in the lab"
        );
        self.ledger()
    }

    fn signal(&self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // Fails when it has ended already, which is what is wanted.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal();
            // It ends by itself within the clients' time-out; the lab's end does not wait for it.
            let _ = self.child.wait();
        }
    }
}
