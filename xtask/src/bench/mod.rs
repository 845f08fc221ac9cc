//! `cargo xtask bench`: the figures, each beside its peer or its goal in the same run.
//!
//! Absolute figures of one machine move from hour to hour, so what counts is the ratio. Everything runs in
//! lab hosts with the release build. `--write` keeps what was printed in `docs/benchmarks.md`, in place of the sections
//! of the same titles; each tells its machine and day.

mod agent;
mod bpftrace;
mod crowd;
mod guard;
mod machine;
mod order;
mod overhead;
mod pause;
mod programs;
mod relations;
mod replay;
mod storm;
mod tools;
mod transfer;
mod verdict;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::process::{as_root, is_root, output};
use crate::{setup, test, workspace};

/// `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// What to measure; everything when none is named.
    subjects: Vec<Subject>,
    /// Keeps the figures in docs/benchmarks.md, in place of those of the same subjects.
    #[arg(long, conflicts_with = "short")]
    write: bool,
    /// Once and with a tenth of the data: shows that it works, no figures to keep.
    #[arg(long)]
    short: bool,
    /// Runs of each transfer, of which the median counts.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Of the transfers, only these: to see what a change does.
    #[arg(long, conflicts_with = "write")]
    only: Vec<transfer::Part>,
    /// Set-up and build are done (how the task calls itself as root).
    #[arg(long, hide = true)]
    built: bool,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Subject {
    /// Lifeboat's data plane, sealed, against rsync and tar over ssh and nbdcopy.
    Transfer,
    /// The pause at the switch under the demo's load.
    Pause,
    /// Memory and idle CPU of an agent with 50 containers.
    Agent,
    /// Cost of an event in each kernel program.
    Programs,
    /// Short connections: whether one is lost, and the cost of a connection's life.
    Storm,
    /// What the agent takes from its host's own work, beside bpftrace.
    Overhead,
    /// Memory and CPU of an agent with 500 containers and many connections.
    Crowd,
    /// What the source's own workload loses beside a copy.
    Guard,
    /// From a fault to the verdict.
    Verdict,
    /// Start order and groups of 100,000 containers with 1,000,000 edges.
    Order,
    /// A day of recording under a policy.
    Replay,
    /// Relations found among containers whose relations are known; writes docs/relations-accuracy.md.
    Relations,
}

const ALL: [Subject; 11] = [
    Subject::Transfer,
    Subject::Guard,
    Subject::Pause,
    Subject::Agent,
    Subject::Programs,
    Subject::Storm,
    Subject::Overhead,
    Subject::Crowd,
    Subject::Verdict,
    Subject::Order,
    Subject::Replay,
];

/// Sets up, builds for release, measures as root and prints Markdown.
///
/// # Errors
/// Set-up, build or a measurement failed, or the figures cannot be written.
pub fn bench(arguments: &Arguments) -> Result<()> {
    let subjects: &[Subject] = match &arguments.subjects[..] {
        [] => &ALL,
        some => some,
    };
    if !arguments.built {
        setup::setup()?;
        test::build_release()?;
    }
    if !is_root() {
        let words = std::env::args_os().skip(1);
        return Err(as_root(words.chain(["--built".into()])));
    }
    workspace::use_release();

    let start = Instant::now();
    let origin = format!("{}, {}.", machine::named(), today()?);
    let mut sections = Vec::new();
    let mut keep = |section: String| {
        println!("{section}");
        sections.push(section);
    };
    keep(machine::limits()?);
    for subject in subjects {
        keep(match subject {
            Subject::Transfer => {
                transfer::measure(arguments.short, arguments.runs, &arguments.only)?
            }
            Subject::Pause => pause::measure(arguments.short)?,
            Subject::Agent => agent::measure(arguments.short)?,
            Subject::Programs => programs::measure(arguments.short)?,
            Subject::Storm => storm::measure(arguments.short)?,
            Subject::Overhead => overhead::measure(arguments.short)?,
            Subject::Crowd => crowd::measure(arguments.short)?,
            Subject::Guard => guard::measure(arguments.short)?,
            Subject::Verdict => verdict::measure(arguments.short)?,
            Subject::Order => order::measure(arguments.short)?,
            Subject::Replay => replay::measure(arguments.short)?,
            Subject::Relations => relations::measure()?,
        });
    }
    eprintln!("bench: {} s", start.elapsed().as_secs());
    if arguments.write {
        write(&sections, &origin)?;
    }
    Ok(())
}

const HEAD: &str = "# Benchmarks\n\nWritten by `cargo xtask bench --write`, section by section. Absolute figures belong to the machine \
    that a section names and move with its load; the ratios were taken side by side.\n\n";

fn write(sections: &[String], origin: &str) -> Result<()> {
    let path: PathBuf = workspace::root().join("docs/benchmarks.md");
    let old =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    fs::write(&path, merged(&old, sections, origin))
        .with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("bench: wrote {}", path.display());
    Ok(())
}

/// `old` with each section of `new` and its `origin` in place of the one with the same title, or at the end.
fn merged(old: &str, new: &[String], origin: &str) -> String {
    let title = |section: &str| section.lines().next().unwrap_or_default().to_owned();
    let mut kept: Vec<String> = old
        .split("\n## ")
        .skip(1)
        .map(|section| format!("## {}", section.trim_end()))
        .collect();
    for section in new {
        let heading = title(section);
        let rest = section.strip_prefix(&heading).unwrap_or_default().trim();
        let whole = format!("{heading}\n\n{origin}\n\n{rest}");
        match kept.iter_mut().find(|known| title(known) == heading) {
            Some(known) => *known = whole,
            None => kept.push(whole),
        }
    }
    format!("{HEAD}{}\n", kept.join("\n\n"))
}

fn today() -> Result<String> {
    Ok(output(Command::new("date").args(["--utc", "+%F"]))?
        .trim()
        .to_owned())
}

/// The middle one of some figures; the mean of the two in the middle for an even number.
fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// A goal and whether it was met, for a table's last column.
fn goal(text: &str, met: bool) -> String {
    format!("{text}: {}", if met { "met" } else { "**not met**" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_figure_whatever_the_order() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
    #[test]
    fn a_section_takes_the_place_of_the_one_of_its_title_and_all_others_stay() {
        let old = "# Benchmarks\n\nHead.\n\n## One\n\n1\n\n### Of one\n\n## Two\n\n2\n";
        let new = ["## Two\n\n3\n\n".to_owned(), "## Three\n\n4".to_owned()];
        let text = merged(old, &new, "Here.");
        let sections =
            "## One\n\n1\n\n### Of one\n\n## Two\n\nHere.\n\n3\n\n## Three\n\nHere.\n\n4\n";
        assert_eq!(text, format!("{HEAD}{sections}"));
        assert_eq!(merged(&text, &[], "There."), text);
    }
}
