//! `cargo xtask test`: everything that must pass before a change is believed, and what CI runs.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::lab::kernels;
use crate::process::{is_root, shown};
use crate::{setup, workspace};

/// The kernel programs are built by the agent's build script: for this machine they are no program.
const MEMBERS: [&str; 3] = ["--workspace", "--exclude", "lifeboat-ebpf"];

/// Sums of the lines that `cargo test` ends a test program with.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Counts {
    /// Adds the figures of one line, if it is such a line.
    fn add(&mut self, line: &str) {
        let Some(figures) = line.trim_start().strip_prefix("test result: ") else {
            return;
        };
        for part in figures.split([';', '.']) {
            let mut words = part.split_whitespace();
            if let (Some(Ok(number)), Some(what)) =
                (words.next().map(str::parse::<u64>), words.next())
            {
                match what {
                    "passed" => self.passed += number,
                    "failed" => self.failed += number,
                    "ignored" => self.ignored += number,
                    _ => {}
                }
            }
        }
    }
}

fn cargo(arguments: &[&str]) -> Command {
    // Set when cargo started this task: the same toolchain goes on.
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(workspace::root());
    command
}

/// Runs a step with its output on the terminal, and adds the tests it reports.
fn step(command: &mut Command, counts: &mut Counts) -> Result<bool> {
    println!("\n$ {}", shown(command));
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            counts.add(&line);
            println!("{line}");
        }
    }
    let passed = child.wait()?.success();
    println!(
        "{} in {} s",
        if passed { "ok" } else { "FAILED" },
        start.elapsed().as_secs()
    );
    Ok(passed)
}

fn members(first: &[&str], last: &[&str]) -> Command {
    cargo(&[first, &MEMBERS[..], last].concat())
}

/// Builds every program and test of the workspace: everything at once, and every later step over the
/// same packages, for another selection has other features and would build all dependencies again.
///
/// # Errors
/// The build failed; the compiler has told why.
pub fn build() -> Result<()> {
    if step(
        &mut members(&["build"], &["--all-targets"]),
        &mut Counts::default(),
    )? {
        return Ok(());
    }
    bail!("the build failed")
}

/// Builds the programs that figures are taken with, for release.
///
/// # Errors
/// As [`build`].
pub fn build_release() -> Result<()> {
    if step(
        &mut members(&["build", "--release"], &["--bins", "--examples"]),
        &mut Counts::default(),
    )? {
        return Ok(());
    }
    bail!("the release build failed")
}

/// Sets up, builds, checks the style, runs the unit tests, the end-to-end tests one by one, and then those
/// of other kernels.
///
/// # Errors
/// A step failed; all steps after the build are run nevertheless, and their output tells why.
pub fn test() -> Result<()> {
    let start = Instant::now();
    setup::setup()?;
    let mut counts = Counts::default();
    let mut failed = Vec::new();

    build().context("nothing was tested")?;
    let mut end_to_end = members(
        &["test"],
        &["--no-fail-fast", "--test", "*", "--", "--test-threads=1"],
    );
    if !is_root() {
        // cargo builds as the user and starts only the test programs, which make lab hosts, as root.
        let runner = format!(
            "CARGO_TARGET_{}_UNKNOWN_LINUX_GNU_RUNNER",
            env::consts::ARCH.to_uppercase()
        );
        end_to_end.env(runner, "sudo --preserve-env=PATH,HOME,CARGO_TARGET_DIR");
    }
    let steps = [
        ("format", cargo(&["fmt", "--all", "--check"])),
        (
            "clippy",
            members(
                &["clippy", "--quiet"],
                &["--all-targets", "--", "-D", "warnings"],
            ),
        ),
        (
            "unit tests",
            members(&["test"], &["--no-fail-fast", "--lib", "--bins"]),
        ),
        ("end-to-end tests", end_to_end),
    ];
    for (name, mut command) in steps {
        if !step(&mut command, &mut counts)? {
            failed.push(name);
        }
    }
    println!("\nguests");
    if let Err(error) = kernels::in_test(|line| counts.add(line)) {
        println!("FAILED: {error:#}");
        failed.push("guests");
    }
    println!(
        "\ntest result: {}. {} passed; {} failed; {} ignored; 0 measured; 0 filtered out; finished in {:.2}s",
        if failed.is_empty() { "ok" } else { "FAILED" },
        counts.passed,
        counts.failed,
        counts.ignored,
        start.elapsed().as_secs_f64(),
    );
    if failed.is_empty() {
        return Ok(());
    }
    bail!("failed: {}", failed.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_of_several_test_programs_are_summed() {
        let mut counts = Counts::default();
        counts.add("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.02s");
        counts.add("test result: FAILED. 2 passed; 5 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.50s");
        counts.add("test a_name_is_a_sentence ... ok");
        assert_eq!(
            counts,
            Counts {
                passed: 14,
                failed: 5,
                ignored: 1
            }
        );
    }
}
