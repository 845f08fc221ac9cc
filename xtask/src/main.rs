//! `cargo xtask`: one subcommand a file.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Development tasks of Lifeboat.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct CommandLine {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Installs what is missing; a second run only looks
    Setup,
    /// Sets up, builds and runs all checks and tests
    Test,
    /// A host goes bad, its containers and their data leave, and it is proven
    Demo(xtask::demo::Arguments),
    /// The figures, beside their peers and goals
    Bench(xtask::bench::Arguments),
    /// Random bytes into every decoder of bytes from outside
    Fuzz(xtask::fuzz::Arguments),
    /// Lab hosts on this machine
    Lab(xtask::lab::command::Arguments),
    /// Random failures over and over
    Soak(xtask::soak::Arguments),
    /// Writes to the demo application and keeps a ledger
    Load(xtask::load::Arguments),
}

fn main() -> ExitCode {
    let result = match CommandLine::parse().task {
        Task::Setup => xtask::setup::setup(),
        Task::Test => xtask::test::test(),
        Task::Demo(arguments) => xtask::demo::demo(&arguments),
        Task::Bench(arguments) => xtask::bench::bench(&arguments),
        Task::Fuzz(arguments) => xtask::fuzz::fuzz(&arguments),
        Task::Lab(arguments) => xtask::lab::command::run(&arguments),
        Task::Soak(arguments) => xtask::soak::soak(&arguments),
        Task::Load(arguments) => xtask::load::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
