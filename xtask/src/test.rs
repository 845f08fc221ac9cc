//! `cargo xtask test`: everything that must pass before a change is believed, and what CI runs.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::sys::statvfs::statvfs;

use crate::lab::kernels;
use crate::process::{is_root, shown};
use crate::{setup, workspace};

/// The kernel programs are built by the agent's build script: for this machine they are no program.
const MEMBERS: [&str; 3] = ["--workspace", "--exclude", "lifeboat-ebpf"];

/// End-to-end tests that may fail once and pass when they are run again with nothing beside them. More than so
/// many at once are no accident of the machine.
const ONCE_MORE: usize = 2;

/// Tests that pass print too: what they did not do is told at the end.
const SHOWN: &str = "--show-output";

/// Sums of the lines that `cargo test` ends a test program with, and the names of what failed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
    failures: Vec<String>,
    /// Test programs that began, less those that told their result.
    silent: i64,
    /// Within the lists of a program's failures: how many names other programs gave before.
    listed: Option<usize>,
    /// How many of the two lists of a program's successes have begun: the first is of what the tests printed.
    shown: u32,
    /// The test that printed what follows, and what tests said of what they did not do.
    printed_by: String,
    not_run: Vec<String>,
}

impl Counts {
    /// Adds what one line says.
    fn add(&mut self, line: &str) {
        self.shown += u32::from(line == "successes:");
        if self.shown == 1 {
            if let Some(name) = line.strip_prefix("---- ") {
                name.trim_end_matches(" stdout ----")
                    .clone_into(&mut self.printed_by);
            } else if line.starts_with("not run: ") || line.starts_with("skipped: ") {
                self.not_run.push(format!("{}: {line}", self.printed_by));
            }
            return;
        }
        if line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test")) {
            self.silent += 1;
        }
        if line == "failures:" {
            // The first is of what the tests printed, the second of their names.
            let before = *self.listed.get_or_insert(self.failures.len());
            self.failures.truncate(before);
        }
        let Some(figures) = line.trim_start().strip_prefix("test result: ") else {
            if let Some(name) = line.strip_prefix("    ").filter(|_| self.listed.is_some())
                && !name.is_empty()
                && name
                    .chars()
                    .all(|c| c.is_alphanumeric() || "_:".contains(c))
            {
                self.failures.push(name.to_owned());
            }
            return;
        };
        self.listed = None;
        self.shown = 0;
        self.silent -= 1;
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

    fn sum(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.not_run.extend_from_slice(&other.not_run);
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
        "{} in {} s; {} GiB of the disk are free",
        if passed { "ok" } else { "FAILED" },
        start.elapsed().as_secs(),
        free()? >> 30
    );
    Ok(passed)
}

/// Bytes that the disk of the build has left.
fn free() -> Result<u64> {
    let disk = statvfs(workspace::root())?;
    Ok(disk.blocks_available() * disk.fragment_size())
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

fn end_to_end_tests(only: &[String]) -> Command {
    let mut arguments = vec!["--no-fail-fast", "--test", "*", "--", "--test-threads=1"];
    arguments.push(SHOWN);
    if !only.is_empty() {
        arguments.push("--exact");
        arguments.extend(only.iter().map(String::as_str));
    }
    let mut command = members(&["test"], &arguments);
    if !is_root() {
        // cargo builds as the user and starts only the test programs, which make lab hosts, as root.
        let runner = format!(
            "CARGO_TARGET_{}_UNKNOWN_LINUX_GNU_RUNNER",
            env::consts::ARCH.to_uppercase()
        );
        command.env(runner, "sudo --preserve-env=PATH,HOME,CARGO_TARGET_DIR");
    }
    command
}

/// Runs the end-to-end tests, and once more at most [`ONCE_MORE`] that failed: they drive other people's
/// programs and kernels, and what those do now and then is to be told, but not to cost a whole run.
/// Returns whether all passed, and which did so only then.
fn end_to_end(counts: &mut Counts) -> Result<(bool, Vec<String>)> {
    let mut first = Counts::default();
    let passed = step(&mut end_to_end_tests(&[]), &mut first)?;
    counts.sum(&first);
    // A program that died in its tests names none of them.
    let named = first.failures.len() as u64 == first.failed && first.silent == 0;
    if passed || !named || first.failures.is_empty() || first.failures.len() > ONCE_MORE {
        return Ok((passed, Vec::new()));
    }
    let mut second = Counts::default();
    let passed =
        step(&mut end_to_end_tests(&first.failures), &mut second)? && second.passed == first.failed;
    if !passed {
        return Ok((false, Vec::new()));
    }
    counts.failed -= first.failed;
    counts.passed += first.failed;
    Ok((true, first.failures))
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
            members(
                &["test"],
                &["--no-fail-fast", "--lib", "--bins", "--", SHOWN],
            ),
        ),
    ];
    for (name, mut command) in steps {
        if !step(&mut command, &mut counts)? {
            failed.push(name);
        }
    }
    let (passed, again) = end_to_end(&mut counts)?;
    if !passed {
        failed.push("end-to-end tests");
    }
    println!("\nguests");
    if let Err(error) = kernels::in_test(|line| counts.add(line)) {
        println!("FAILED: {error:#}");
        failed.push("guests");
    }
    for name in again {
        println!(
            "\n{name}: failed once (see above) and passed when it ran again alone: find out why"
        );
    }
    if !counts.not_run.is_empty() {
        println!("\n{} not run or in part:", counts.not_run.len());
    }
    for line in &counts.not_run {
        println!("  {line}");
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
        counts.add("running 13 tests");
        counts.add("running 1 test");
        counts.add("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.02s");
        counts.add("test result: FAILED. 2 passed; 5 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.50s");
        counts.add("test a_name_is_a_sentence ... ok");
        assert_eq!(
            counts,
            Counts {
                passed: 14,
                failed: 5,
                ignored: 1,
                ..Counts::default()
            }
        );
    }

    #[test]
    fn the_names_of_failed_tests_are_those_of_the_list_and_not_what_tests_print() {
        let mut counts = Counts::default();
        let output = "running 5 tests\ntest that_it_holds ... Killed\n    indented\nFAILED\n\nfailures:\n\n---- that_it_holds stdout ----\n\n\
             thread 'that_it_holds' panicked at here:\n  left: 1\n    word\n\n\nfailures:\n    that_it_holds\n    module::that_too\n\n\
             test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 7.37s\n    indented";
        output.lines().for_each(|line| counts.add(line));
        assert_eq!(counts.failures, ["that_it_holds", "module::that_too"]);
        assert_eq!((counts.passed, counts.failed, counts.silent), (3, 2, 0));
    }

    #[test]
    fn what_passing_tests_print_is_no_result_but_says_what_they_did_not_do() {
        let mut counts = Counts::default();
        let output = "running 3 tests\ntest one ... ok\n\nsuccesses:\n\n---- one stdout ----\nrunning 7 tests\n\
             test result: ok. 7 passed; 0 failed\nskipped: lab hosts need root\n\n---- two stdout ----\n\
             not run: cgroup2 is not mounted\n\n\nsuccesses:\n    one\n    two\n\nfailures:\n\n---- three stdout ----\n\
             not at all\n\n\nfailures:\n    three\n\ntest result: FAILED. 2 passed; 1 failed; 0 ignored; finished in 1s";
        output.lines().for_each(|line| counts.add(line));
        assert_eq!((counts.passed, counts.failed, counts.silent), (2, 1, 0));
        assert_eq!(counts.failures, ["three"]);
        let said = [
            "one: skipped: lab hosts need root",
            "two: not run: cgroup2 is not mounted",
        ];
        assert_eq!(counts.not_run, said);
    }
}
