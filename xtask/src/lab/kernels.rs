//! `cargo xtask lab kernels`: the agent and the tests of its senses on other kernels, in QEMU guests.
//!
//! A guest boots a stock Debian kernel with everything in its initramfs and says over the serial console
//! how each test ended and what the agent reports, with and without BTF. Invariant: a guest that died or hung
//! is started once more, for emulation breaks one now and then; one in which a test failed never is. Non-goal:
//! speed; figures from guests mean nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::{env, thread};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use crate::{setup, workspace};

mod guest;
mod package;

/// A kernel of Debian's cloud flavour: its version, the suite that has it, and what cannot be tested on it,
/// by the reason that the test then prints.
struct Kernel {
    version: &'static str,
    suite: &'static str,
    lacks: &'static [&'static str],
}

/// Why a test of block devices by ublk is not run.
const NO_UBLK: &str = "/dev/ublk-control is not there";

/// The newest suite is a backport and moves on; its version is only a name here.
const KERNELS: [Kernel; 4] = [
    Kernel {
        version: "5.10",
        suite: "bullseye",
        lacks: &["dirty extents cannot be had here", NO_UBLK],
    },
    Kernel {
        version: "6.1",
        suite: "bookworm",
        lacks: &[NO_UBLK],
    },
    Kernel {
        version: "6.12",
        suite: "trixie",
        lacks: &[],
    },
    Kernel {
        version: "newest",
        suite: "trixie-backports",
        lacks: &[],
    },
];

/// What it takes, by a file that shows that it is there.
const NEEDS: [(&str, &str, &str); 10] = [
    ("debian-archive-keyring", package::KEYRING, "their kernels"),
    (
        "ca-certificates",
        "/etc/ssl/certs/ca-certificates.crt",
        "their agents",
    ),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64", "guests"),
    ("seabios", "/usr/share/seabios/bios-256k.bin", "guests"),
    ("cpio", "/usr/bin/cpio", "their initramfs"),
    ("kmod", "/usr/sbin/depmod", "their modules"),
    ("xz-utils", "/usr/bin/xz", "their modules"),
    ("dmsetup", "/usr/sbin/dmsetup", "their mapped devices"),
    ("mdadm", "/usr/sbin/mdadm", "their arrays"),
    ("e2fsprogs", "/usr/sbin/mkfs.ext4", "their disks"),
];

/// Kernels of `cargo xtask test`: the oldest that is supported, and one with every feature that is tested.
const IN_TEST: [&str; 2] = ["5.10", "6.12"];

/// What became of one kernel's tests.
struct Examined {
    version: &'static str,
    console: String,
    report: Result<Report>,
}

/// Runs the tests on the kernels of these versions; on all when none is named.
///
/// # Errors
/// A version is unknown, a guest cannot be made, or what it says is not what is expected; the message holds
/// the reason and the log names the rest.
pub fn kernels(versions: &[String]) -> Result<()> {
    let versions: Vec<&str> = versions.iter().map(String::as_str).collect();
    for version in &versions {
        ensure!(
            KERNELS.iter().any(|kernel| kernel.version == *version),
            "no kernel {version:?}: use {}",
            KERNELS.map(|kernel| kernel.version).join(", ")
        );
    }
    crate::test::build()?;
    let all = versions.is_empty();
    let chosen = KERNELS
        .iter()
        .filter(|kernel| all || versions.contains(&kernel.version));
    let reports = reports(examine(&chosen.collect::<Vec<_>>())?)?;
    if all {
        fs::write(workspace::root().join("docs/kernels.md"), table(&reports))?;
        println!("docs/kernels.md is written");
    }
    Ok(())
}

/// Runs the tests on the kernels that every change is tested on, and has every line that a guest said heard.
/// Everything is built already.
///
/// # Errors
/// As [`kernels`].
pub fn in_test(mut hear: impl FnMut(&str)) -> Result<()> {
    if env::consts::ARCH != "x86_64" {
        println!("guests: not run: they are made for x86-64 only");
        return Ok(());
    }
    let (chosen, others): (Vec<_>, Vec<_>) = KERNELS
        .iter()
        .partition(|kernel| IN_TEST.contains(&kernel.version));
    let others: Vec<&str> = others.iter().map(|kernel| kernel.version).collect();
    println!(
        "guests on Linux {}; not on {}, which `cargo xtask lab kernels` adds: they take as long again",
        IN_TEST.join(" and "),
        others.join(" and ")
    );
    let examined = examine(&chosen)?;
    for one in &examined {
        one.console.lines().for_each(&mut hear);
    }
    reports(examined).map(drop)
}

/// Runs the tests on these kernels, as many at once as there are CPUs, for a guest has one.
fn examine(chosen: &[&'static Kernel]) -> Result<Vec<Examined>> {
    ensure!(
        env::consts::ARCH == "x86_64",
        "guests are made for x86-64 only"
    );
    let missing: Vec<(&str, &str)> = NEEDS
        .iter()
        .filter(|(_, shown_by, _)| !Path::new(shown_by).exists())
        .map(|(package, _, why)| (*package, *why))
        .collect();
    setup::fetch(&missing)?;
    let at_once = thread::available_parallelism()?.get();
    let mut examined = Vec::new();
    for some in chosen.chunks(at_once) {
        thread::scope(|scope| -> Result<()> {
            let guests: Vec<_> = some
                .iter()
                .map(|kernel| scope.spawn(|| check(kernel)))
                .collect();
            for guest in guests {
                let guest = guest
                    .join()
                    .map_err(|_| anyhow!("a guest's check panicked"));
                examined.push(guest?);
            }
            Ok(())
        })?;
    }
    Ok(examined)
}

/// Tells how the tests ended; what a guest said stands in the output when it was not what is expected.
fn reports(examined: Vec<Examined>) -> Result<Vec<Report>> {
    let mut failed = Vec::new();
    let mut reports = Vec::new();
    for one in examined {
        match one.report {
            Ok(report) => {
                println!(
                    "kernel {} ({}): ok, {} tests",
                    one.version,
                    report.release,
                    report.tests.len()
                );
                reports.push(report);
            }
            Err(error) => {
                for line in one.console.lines() {
                    let short: String = line.chars().take(1000).collect();
                    println!("kernel {}: {short}", one.version);
                }
                println!("kernel {}: FAILED: {error:#}", one.version);
                failed.push(one.version);
            }
        }
    }
    ensure!(failed.is_empty(), "failed on {}", failed.join(", "));
    Ok(reports)
}

/// What a guest said of its kernel.
struct Report {
    release: String,
    /// How each test ended.
    tests: BTreeMap<String, &'static str>,
    /// What the agent lost with BTF hidden.
    without_btf: String,
}

fn table(reports: &[Report]) -> String {
    let mut text = String::from(
        "# Kernels\n\nWritten by `cargo xtask lab kernels`, which boots Debian's kernels in guests and runs these \
         tests of the\nsenses there. “not run” is what the kernel lacks: the agent names it and goes on with \
         less.\n\n| test |",
    );
    let row = |cells: Vec<String>| format!(" {} |", cells.join(" | "));
    text.push_str(&row(reports
        .iter()
        .map(|report| report.release.clone())
        .collect()));
    text.push_str("\n|---|");
    text.push_str(&"---|".repeat(reports.len()));
    let names: BTreeSet<&String> = reports
        .iter()
        .flat_map(|report| report.tests.keys())
        .collect();
    for name in names {
        text.push_str(&format!("\n| {} |", name.replace('_', " ")));
        let ended = |report: &Report| (*report.tests.get(name).unwrap_or(&"–")).to_owned();
        text.push_str(&row(reports.iter().map(ended).collect()));
    }
    text.push_str("\n| disabled when BTF is hidden; the rest works |");
    text.push_str(&row(reports
        .iter()
        .map(|report| report.without_btf.clone())
        .collect()));
    text.push('\n');
    text
}

fn check(kernel: &Kernel) -> Examined {
    let mut console = String::new();
    let report = run(kernel, &mut console).and_then(|()| judge(kernel, &console));
    Examined {
        version: kernel.version,
        console,
        report,
    }
}

/// Boots the kernel's guest, twice when it must be; what the last one said is in `console` at the end.
fn run(kernel: &Kernel, console: &mut String) -> Result<()> {
    let dir = workspace::target().join("kernels").join(kernel.version);
    let unpacked = package::fetch(kernel.suite, &dir)?;
    let initramfs = guest::pack(&unpacked, &dir)?;
    for last in [false, true] {
        let said = guest::boot(&dir, &unpacked.image, &initramfs)?;
        *console = said.text;
        if said.whole || a_test_failed(console) {
            break;
        }
        ensure!(!last, "the guest died or hung twice");
        // Emulation breaks a guest now and then, which is nobody's failure.
        println!(
            "kernel {}: the guest died or hung, and no test had failed; once more. It said last:",
            kernel.version
        );
        let lines: Vec<&str> = console.lines().rev().take(5).collect();
        for line in lines.iter().rev() {
            println!("  {}", line.chars().take(200).collect::<String>());
        }
    }
    Ok(())
}

/// A guest in which that happened is not tried again.
fn a_test_failed(console: &str) -> bool {
    let mut lines = console.lines().map(str::trim);
    lines.any(|line| {
        let ended = line.strip_prefix("guest: ");
        let ended = ended.and_then(|line| line.split_once(" ended with "));
        ended.is_some_and(|(_, code)| code != "0") || line.ends_with("... FAILED")
    })
}

/// Compares what the guest said with what is expected of this kernel.
fn judge(kernel: &Kernel, console: &str) -> Result<Report> {
    let said = |what: &str| {
        let start = format!("guest: {what} ");
        let mut lines = console.lines().map(str::trim_end);
        lines.find_map(|line| line.split_once(&start).map(|(_, rest)| rest))
    };
    let snapshot = |what: &str| -> Result<Value> {
        let text = said(what).with_context(|| format!("the guest did not get to {what:?}"))?;
        let status: Value = serde_json::from_str(text).context("no status")?;
        Ok(status["view"]["snapshot"].clone())
    };
    let whole = snapshot("whole")?;
    ensure!(lost(&whole).is_empty(), "the agent lost {:?}", lost(&whole));
    ensure!(has(&whole, "memory.used") && has(&whole, "sched.run_queue_latency_p99"));
    ensure!(
        sane(&whole),
        "a run-queue latency is longer than the guest has run: {whole}"
    );
    let hidden = snapshot("without-btf")?;
    ensure!(
        lost(&hidden) == ["kernel programs"],
        "without BTF: {hidden}"
    );
    ensure!(has(&hidden, "memory.used") && !has(&hidden, "sched.run_queue_latency_p99"));
    for test in guest::TESTS {
        let ended = said(&format!("{test} ended with"));
        ensure!(ended == Some("0"), "{test} ended with {ended:?}");
    }
    Ok(Report {
        release: said("kernel").context("no release")?.to_owned(),
        tests: tests(kernel, console)?,
        without_btf: lost(&hidden).join(", "),
    })
}

/// How each test ended; what one printed that was not run stands below its name.
fn tests(kernel: &Kernel, console: &str) -> Result<BTreeMap<String, &'static str>> {
    let mut tests = BTreeMap::new();
    let mut of = None;
    let mut lacking = BTreeSet::new();
    for line in console.lines().map(str::trim) {
        // The kernel or the test itself may have spoken before it ended; that it ended well is known.
        if let Some((name, _)) = line
            .strip_prefix("test ")
            .and_then(|line| line.split_once(" ... "))
        {
            if name != "helper" {
                tests.insert(name.to_owned(), "ok");
            }
        } else if let Some(name) = line
            .strip_prefix("---- ")
            .and_then(|line| line.strip_suffix(" stdout ----"))
        {
            of = Some(name.to_owned());
        } else if let (Some(why), Some(name)) = (line.strip_prefix("not run: "), &of) {
            let lacks = kernel.lacks.iter().find(|lacks| why.contains(**lacks));
            lacking.insert(*lacks.with_context(|| format!("{name} was not run: {why}"))?);
            tests.insert(name.clone(), "not run");
        }
    }
    ensure!(
        lacking.len() == kernel.lacks.len(),
        "not {:?} but {lacking:?} is lacking",
        kernel.lacks
    );
    Ok(tests)
}

fn lost(snapshot: &Value) -> Vec<&str> {
    let disabled = snapshot["disabled"].as_array().into_iter().flatten();
    disabled.filter_map(|one| one["what"].as_str()).collect()
}

fn samples<'s>(snapshot: &'s Value, metric: &'s str) -> impl Iterator<Item = &'s Value> {
    let all = snapshot["samples"].as_array().into_iter().flatten();
    all.filter(move |sample| sample["metric"] == metric)
}

fn has(snapshot: &Value, metric: &str) -> bool {
    samples(snapshot, metric).next().is_some()
}

/// No guest lives for ten minutes.
fn sane(snapshot: &Value) -> bool {
    samples(snapshot, "sched.run_queue_latency_p99")
        .all(|sample| sample["value"].as_f64().is_some_and(|ns| ns < 600e9))
}

#[cfg(test)]
mod tests {
    use super::a_test_failed;

    #[test]
    fn a_guest_in_which_a_test_failed_is_told_from_one_that_died() {
        assert!(a_test_failed("test a ... ok\ntest b ... FAILED\r\n"));
        assert!(a_test_failed("guest: senses ended with 101\r\n"));
        assert!(!a_test_failed(
            "test a ... ok\nguest: senses ended with 0\r\ntest b ... "
        ));
    }
}
