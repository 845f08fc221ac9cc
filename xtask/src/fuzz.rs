//! `cargo xtask fuzz [TARGET] [--for 5m]`: libFuzzer over the decoders of bytes from outside.
//!
//! It needs no nightly toolchain: the coverage counters are an LLVM pass that any compiler can be told to run, and
//! libFuzzer comes with the crate `libfuzzer-sys`. What it finds, and the inputs that reach new code, go to the
//! corpus in `tests/fuzz/corpus`, which `cargo test` replays.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::process::{output, run};
use crate::{setup, workspace};

/// What to fuzz, and for how long.
#[derive(Debug, Args)]
pub struct Arguments {
    /// One decoder; without it all, one after the other
    target: Option<String>,
    /// Time for each: seconds, or with `s` or `m`
    #[arg(long = "for", default_value = "5m", value_parser = seconds)]
    time: u64,
}

fn seconds(text: &str) -> Result<u64> {
    let (number, unit) = match text.strip_suffix('m') {
        Some(number) => (number, 60),
        None => (text.strip_suffix('s').unwrap_or(text), 1),
    };
    let number: u64 = number.parse().context("use a time such as 90s or 5m")?;
    Ok(number * unit)
}

/// What the compiler is told, so that libFuzzer sees which code an input reaches.
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// An input may be this long, in bytes.
const INPUT_CAP: u32 = 4096;

/// Builds the fuzzer and runs it.
///
/// # Errors
/// It cannot be built, or a decoder broke: the input that did it is in the corpus then.
pub fn fuzz(arguments: &Arguments) -> Result<()> {
    setup::setup()?;
    setup::provide("g++", "g++", "compiles libFuzzer")?;
    let package = workspace::root().join("tests/fuzz");
    let corpus = package.join("corpus");
    let targets = targets(&corpus)?;
    let wanted = match &arguments.target {
        None => targets,
        Some(one) => {
            ensure!(
                targets.contains(one),
                "there is no decoder {one}; there are {}",
                targets.join(", ")
            );
            vec![one.clone()]
        }
    };
    let program = build(&package)?;
    let mut broken = Vec::new();
    for target in wanted {
        println!("fuzz: {target} for {} s", arguments.time);
        let seeds = corpus.join(&target);
        if fuzz_one(&program, &target, &seeds, arguments.time).is_err() {
            broken.push(target);
        }
    }
    if broken.is_empty() {
        return Ok(());
    }
    bail!(
        "broke: {}; the inputs are crash-…, oom-… or timeout-… in {}, where `cargo test` replays them",
        broken.join(", "),
        corpus.display()
    )
}

/// The decoders: each has a directory of seeds.
fn targets(corpus: &Path) -> Result<Vec<String>> {
    let mut targets = Vec::new();
    for entry in fs::read_dir(corpus).with_context(|| corpus.display().to_string())? {
        targets.extend(entry?.file_name().into_string());
    }
    targets.sort();
    Ok(targets)
}

fn build(package: &Path) -> Result<PathBuf> {
    let version = output(Command::new("rustc").arg("-vV"))?;
    let triple = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .context("rustc does not say for which machine it compiles")?;
    let target = workspace::target().join("fuzz");
    // With a named target, build scripts and macros are compiled without the counters.
    run(Command::new("cargo")
        .args(["build", "--release", "--target", triple])
        .arg("--manifest-path")
        .arg(package.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", COVERAGE.join(" ")))?;
    Ok(target.join(triple).join("release/lifeboat-fuzz"))
}

/// Fuzzes, then keeps the smallest set of inputs that reaches the same code.
fn fuzz_one(program: &Path, target: &str, seeds: &Path, time: u64) -> Result<()> {
    let found = workspace::target().join("fuzz/corpus").join(target);
    fs::create_dir_all(&found)?;
    let mut fuzzer = Command::new(program);
    let fuzzer = fuzzer.env("FUZZ_TARGET", target);
    fuzzer.arg(format!("-max_total_time={time}"));
    fuzzer.arg(format!("-max_len={INPUT_CAP}"));
    fuzzer.args(["-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1"]);
    fuzzer.arg(format!("-artifact_prefix={}/", seeds.display()));
    run(fuzzer.arg(&found).arg(seeds))?;
    let mut merge = Command::new(program);
    merge.env("FUZZ_TARGET", target);
    // How often code was reached is left aside, so that the corpus stays small.
    merge.args(["-set_cover_merge=1", "-use_counters=0"]);
    run(merge.arg(seeds).arg(&found))
}
