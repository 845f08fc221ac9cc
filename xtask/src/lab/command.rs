//! `cargo xtask lab`: a lab for a person, which stays up until `down`.

use std::os::unix::process::CommandExt;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};

use super::kernels;
use super::{Fault, HostSpec, Lab, LabSpec, remove};
use crate::demo_app;
use crate::process::become_root;

/// Lab hosts on this machine.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Name of the lab
    #[arg(long = "lab", default_value = "lab", global = true)]
    lab: String,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Builds the lab hosts and leaves them running
    Up {
        /// Host names
        #[arg(default_values = ["source", "paired", "target", "duplicator", "client"])]
        hosts: Vec<String>,
        /// Stays and ends the lab at Ctrl-C
        #[arg(long)]
        foreground: bool,
    },
    /// Ends the lab; nothing is left
    Down,
    /// Runs the agent and the tests of its senses on other kernels, in QEMU guests
    Kernels {
        /// Their versions: 5.10, 6.1, 6.12, newest; all when none is given
        versions: Vec<String>,
    },
    /// Shows the hosts, their addresses and processes
    Status,
    /// Runs a command in a host
    Exec {
        /// Host name
        host: String,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Starts the demo application on a host, at its port 8080
    DemoApp {
        /// Host name
        host: String,
    },
    /// Makes a host go bad for a while
    Fault {
        /// Host name
        host: String,
        /// What goes wrong
        kind: Kind,
        /// How long, e.g. `90s` or `5m`
        #[arg(long = "for", default_value = "60s", value_parser = duration)]
        time: Duration,
        /// Busy loops (cpu), jobs (disk)
        #[arg(long, default_value_t = 8)]
        workers: u16,
        /// Memory held in MiB (memory)
        #[arg(long, default_value_t = 512)]
        mib: u32,
        /// Cap in Mbit/s (net)
        #[arg(long, default_value_t = 20)]
        mbit: u32,
        /// Lost packets in percent (net)
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(0..=100))]
        loss: u8,
    },
    /// Ends a fault before its time
    ClearFault {
        /// Host name
        host: String,
        /// The fault to end
        kind: Kind,
    },
    /// Cuts two hosts from each other
    Partition {
        /// Host name
        a: String,
        /// Host name
        b: String,
        /// Join them again
        #[arg(long)]
        heal: bool,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    Cpu,
    Disk,
    Memory,
    Net,
    LinkDown,
}

impl Kind {
    fn fault(self, workers: u16, mib: u32, mbit: u32, loss_percent: u8) -> Fault {
        match self {
            Self::Cpu => Fault::Cpu { workers },
            Self::Disk => Fault::Disk { jobs: workers },
            Self::Memory => Fault::Memory { mib },
            Self::Net => Fault::Net { mbit, loss_percent },
            Self::LinkDown => Fault::LinkDown,
        }
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(
        text.find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len()),
    );
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?}: write e.g. 90s or 5m"))?;
    match unit {
        "" | "s" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_secs(number * 60)),
        _ => Err(format!("{text:?}: the unit is s or m")),
    }
}

/// Does what the command line asks.
///
/// # Errors
/// As the library's functions; `exec` does not return when it succeeds.
pub fn run(arguments: &Arguments) -> Result<()> {
    // Guests are made by anyone.
    if !matches!(arguments.action, Action::Kernels { .. }) {
        become_root()?;
    }
    let name = &arguments.lab;
    match &arguments.action {
        Action::Up { hosts, foreground } => {
            let lab = Lab::up(&LabSpec {
                name: name.clone(),
                hosts: hosts
                    .iter()
                    .map(|host| HostSpec::from(host.as_str()))
                    .collect(),
            })?;
            status(&lab);
            if *foreground {
                println!("end it with Ctrl-C");
                loop {
                    // The lab's own signal handler ends it and this process.
                    thread::park();
                }
            }
            println!("end it with `cargo xtask lab --lab {name} down`");
            lab.leave_running()
        }
        Action::Down => remove(name),
        Action::Kernels { versions } => kernels::kernels(versions),
        Action::Status => {
            status(&Lab::open(name)?);
            Ok(())
        }
        Action::Exec { host, command } => {
            let lab = Lab::open(name)?;
            let error = lab.host(host)?.command(command).exec();
            Err(error).context("cannot start `sh`")
        }
        Action::DemoApp { host } => demo_app::deploy(Lab::open(name)?.host(host)?),
        Action::Fault {
            host,
            kind,
            time,
            workers,
            mib,
            mbit,
            loss,
        } => {
            let lab = Lab::open(name)?;
            let fault = kind.fault(*workers, *mib, *mbit, *loss);
            lab.fault(lab.host(host)?, fault, *time)?;
            println!("{host}: {kind:?} for {} s", time.as_secs());
            Ok(())
        }
        Action::ClearFault { host, kind } => {
            let lab = Lab::open(name)?;
            lab.clear_fault(lab.host(host)?, kind.fault(0, 0, 0, 0))
        }
        Action::Partition { a, b, heal } => {
            let lab = Lab::open(name)?;
            lab.partition(lab.host(a)?, lab.host(b)?, !heal)
        }
    }
}

fn status(lab: &Lab) {
    println!("lab {} in {}", lab.name(), lab.dir().display());
    for host in lab.hosts() {
        let containers = host
            .podman(["ps", "--format", "{{.Names}} ({{.Status}})"])
            .unwrap_or_else(|error| format!("no containers: {error:#}"));
        println!(
            "  {:<12} {:<12} pid {:<8} {}",
            host.name(),
            host.address(),
            host.pid,
            containers.replace('\n', ", ")
        );
    }
}
