//! The command line: one file per subcommand; it parses, calls and prints.
//!
//! Exit codes (documented in `lifeboat --help` and docs/cli.md): 0 done, 1 failed, 2 wrong usage,
//! 3 the daemon or a device cannot be reached, 4 the plan is blocked or was aborted, 5 a proof failed.

/// As the standard library's, for a reader that may have gone away (`| head`) and for names that must not speak to the
/// terminal.
macro_rules! print {
    ($($text:tt)*) => { $crate::cli::output::put(format_args!($($text)*)) };
}

/// As [`print!`], with an end of line.
macro_rules! println {
    ($($text:tt)*) => { $crate::cli::output::put(format_args!("{}\n", format_args!($($text)*))) };
}

/// As [`print!`], to standard error.
macro_rules! eprint {
    ($($text:tt)*) => { $crate::cli::output::put_error(format_args!($($text)*)) };
}

/// As [`println!`], to standard error.
macro_rules! eprintln {
    () => { eprint!("\n") };
    ($($text:tt)*) => { eprint!("{}\n", format_args!($($text)*)) };
}

mod agent;
mod daemon;
mod dirty;
mod duplicator;
mod evacuate;
mod explain;
mod fleet;
mod meter;
mod metrics;
mod observe;
mod output;
mod plan;
mod plans;
mod policy;
mod record;
mod relations;
mod serve;
mod status;
mod trace;

use crate::telemetry::memory;
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Moves containers and their data off a degrading host, and proves that nothing was lost.
#[derive(Parser)]
#[command(
    name = "lifeboat",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 daemon or device not reachable, 4 plan blocked or aborted, 5 proof failed, 141 the reader of the output went away"
)]
struct Cli {
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    json: bool,
    /// Socket of the agent to ask.
    #[arg(long, global = true, default_value = crate::daemon::config::DEFAULT_SOCKET)]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Agent(agent::Arguments),
    Duplicator(duplicator::Args),
    Fleet(fleet::Args),
    /// Who depends on whom, and in which order they start.
    Relations(relations::Args),
    /// Check, test, replay and pause degradation policies.
    Policy(policy::Args),
    Observe(observe::Arguments),
    Record(record::Arguments),
    Trace(trace::Arguments),
    Metrics(metrics::Arguments),
    Plan(plan::Arguments),
    Evacuate(evacuate::Arguments),
    Status(status::Arguments),
    Explain(explain::Arguments),
    Serve(serve::Arguments),
    /// Stops a plan that is not released yet, or switched first and is not whole, and brings everything back.
    Abort(plans::Arguments),
    /// Changes how fast the copy of a plan under way may read.
    Limit(plans::Limit),
    /// Approves a plan as one of the roles that the policy names.
    Approve(plans::Approval),
    /// Tells what a plan did, with figures.
    Report(plans::Arguments),
    /// Proves a plan anew: kept data, release, the target's word, the fence.
    Verify(plans::Arguments),
}

/// What every subcommand is told beside its own arguments.
pub struct Context {
    json: bool,
    socket: PathBuf,
}

/// Why a subcommand did not succeed; chooses the exit code.
#[derive(Debug)]
pub enum Failure {
    /// Anything else: 1.
    Failed(anyhow::Error),
    /// The daemon or a device cannot be reached: 3.
    Unreachable(anyhow::Error),
    /// The plan is blocked or was aborted: 4.
    Blocked(anyhow::Error),
    /// A proof failed: 5.
    Unproven(anyhow::Error),
    /// The subcommand has printed what is wrong by itself; the exit code.
    Told(u8),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// What every subcommand returns.
pub type Outcome = Result<(), Failure>;

/// Parses the arguments, runs the subcommand and returns its documented exit code.
pub fn main() -> ExitCode {
    memory::share_heaps();
    let cli = Cli::parse();
    let context = Context {
        json: cli.json,
        socket: cli.socket,
    };
    let outcome: Outcome = match cli.command {
        Command::Agent(arguments) => agent::run(&arguments),
        Command::Duplicator(args) => duplicator::execute(&args),
        Command::Fleet(args) => fleet::execute(args, context.json),
        Command::Relations(args) => relations::run(&args, &context),
        Command::Policy(args) => policy::run(args, &context),
        Command::Observe(arguments) => observe::run(&arguments, &context),
        Command::Metrics(arguments) => metrics::run(&arguments, &context),
        Command::Plan(arguments) => plan::run(&arguments, &context),
        Command::Evacuate(arguments) => evacuate::run(&arguments, &context),
        Command::Status(arguments) => status::run(&arguments, &context),
        Command::Explain(arguments) => explain::run(&arguments, &context),
        Command::Record(arguments) => record::run(&arguments, &context),
        Command::Trace(arguments) => trace::run(&arguments, &context),
        Command::Serve(arguments) => serve::run(&arguments, &context),
        Command::Abort(arguments) => plans::abort(&arguments, &context),
        Command::Limit(arguments) => plans::limit(&arguments, &context),
        Command::Approve(arguments) => plans::approve(&arguments, &context),
        Command::Report(arguments) => plans::report(&arguments, &context),
        Command::Verify(arguments) => plans::verify(&arguments, &context),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let (code, error) = match failure {
                Failure::Told(code) => return ExitCode::from(code),
                Failure::Failed(error) => (1, error),
                Failure::Unreachable(error) => (3, error),
                Failure::Blocked(error) => (4, error),
                Failure::Unproven(error) => (5, error),
            };
            if context.json {
                println!(
                    "{}",
                    serde_json::json!({ "error": format!("{error:#}"), "code": code })
                );
            } else {
                eprintln!("lifeboat: {error:#}");
            }
            ExitCode::from(code)
        }
    }
}
