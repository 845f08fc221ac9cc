//! Running other programs: one place that turns a failure into a message with the command and its output.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, anyhow, bail};

/// The command as a person would type it, for messages.
#[must_use]
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs to the end and returns standard output.
///
/// # Errors
/// The program could not be started, or ended with a failure: the message holds the command and what it
/// wrote to standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let result = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    checked(command, &result)
}

/// As [`output`], with `input` on standard input.
///
/// # Errors
/// As [`output`].
pub fn output_with_input(command: &mut Command, input: &[u8]) -> Result<String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    let mut stdin = child.stdin.take().context("child without standard input")?;
    // Written from a second thread: a child that answers before it has read everything would block both.
    let result = thread::scope(|scope| {
        let writer = scope.spawn(move || stdin.write_all(input));
        let result = child.wait_with_output();
        // A child that stops reading early reports it through its exit status.
        let _ = writer.join();
        result
    })
    .with_context(|| format!("`{}` was lost", shown(command)))?;
    checked(command, &result)
}

fn checked(command: &Command, result: &Output) -> Result<String> {
    let stdout = String::from_utf8_lossy(&result.stdout);
    if result.status.success() {
        return Ok(stdout.trim_end().to_owned());
    }
    let stderr = String::from_utf8_lossy(&result.stderr);
    bail!(
        "`{}` ended with {}: {}{}",
        shown(command),
        result.status,
        stderr.trim_end(),
        if stderr.trim().is_empty() {
            stdout.trim_end()
        } else {
            ""
        },
    )
}

/// Runs with the terminal's standard streams and fails if the program fails.
///
/// # Errors
/// The program could not be started or ended with a failure; its own output has told why.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    if status.success() {
        return Ok(());
    }
    bail!("`{}` ended with {status}", shown(command))
}

/// Between two questions of [`wait_for`].
const SHORTEST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_millis(200);

/// Asks until the answer is `Some`, with the given patience. What a question took is waited before the next, within limits:
/// it may cost just what the answer is waiting for.
///
/// # Errors
/// The patience is over (the message names `what`), or the question itself failed.
pub fn wait_for<T>(
    what: &str,
    patience: Duration,
    mut question: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        let asked = Instant::now();
        if let Some(answer) = question()? {
            return Ok(answer);
        }
        if start.elapsed() > patience {
            bail!("{what}: not within {patience:?}");
        }
        thread::sleep(asked.elapsed().clamp(SHORTEST_WAIT, LONGEST_WAIT));
    }
}

/// True when this process may make namespaces and cgroups.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Replaces this process by itself under `sudo` unless it is root already.
///
/// # Errors
/// `sudo` could not be started.
pub fn become_root() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    Err(as_root(env::args_os().skip(1)))
}

/// Replaces this process by itself under `sudo` with other arguments; returns only when that fails.
pub fn as_root<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(arguments: I) -> anyhow::Error {
    let exe = match env::current_exe().context("cannot find this program's own file") {
        Ok(exe) => exe,
        Err(error) => return error,
    };
    let error = Command::new("sudo")
        .arg("--preserve-env=PATH,HOME,CARGO,CARGO_TARGET_DIR")
        .arg(exe)
        .args(arguments)
        .exec();
    anyhow!(error).context("lab hosts need root: run this as root, or install sudo")
}

/// The last `limit` bytes of a log, for an error message.
#[must_use]
pub fn log_tail(path: &std::path::Path, limit: usize) -> String {
    let mut text = Vec::new();
    if let Ok(mut file) = std::fs::File::open(path) {
        // An unreadable log only shortens the message it was wanted for.
        let _ = file.read_to_end(&mut text);
    }
    let start = text.len().saturating_sub(limit);
    String::from_utf8_lossy(&text[start..]).trim().to_owned()
}
