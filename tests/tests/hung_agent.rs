//! An agent that is stopped or hangs: whoever asks it is told so, and does not wait for ever. Needs root.

use anyhow::{Result, ensure};
use lifeboat_tests::shop::says;
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};
use xtask::crew::{Crew, Device};
use xtask::lab::{HostSpec, Lab, LabSpec};
use xtask::process::is_root;

const DEVICE: &str = "device";

#[test]
fn whoever_asks_an_agent_that_is_stopped_is_told_so_and_answered_once_it_goes_on() -> Result<()> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(());
    }
    let mut spec = LabSpec::of("hung", &[]);
    spec.hosts = [DEVICE, "duplicator"]
        .map(|host| HostSpec {
            containers: false,
            ..host.into()
        })
        .into();
    let lab = Lab::up(&spec)?;
    let crew = Crew::start(&lab, "duplicator", &[Device::new(DEVICE)])?;
    crew.signal_agent(DEVICE, Signal::SIGSTOP)?;
    let since = Instant::now();
    for question in [&["status"][..], &["verify", "p1-1"]] {
        let (code, answer) = crew.ask(DEVICE, question)?;
        ensure!(code == 3, "{code}: {answer}");
        says(&answer.to_string(), &["agent.sock", "stopped or hangs"])?;
    }
    ensure!(
        since.elapsed() < Duration::from_secs(180),
        "{:?}",
        since.elapsed()
    );
    crew.signal_agent(DEVICE, Signal::SIGCONT)?;
    let (code, status) = crew.ask(DEVICE, &["status"])?;
    ensure!(code == 0 && status["device"] == DEVICE, "{code}: {status}");
    lab.down()
}
