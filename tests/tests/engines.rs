//! The same move where the kernel forbids io_uring.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::stage::{SOURCE, Service, Stage, TARGET, device};
use serde_json::Value;
use std::fs;
use std::io::ErrorKind;
use xtask::process::is_root;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

/// Whether io_uring may be used (Linux 6.6; 2: by nobody, admin-guide/sysctl/kernel.rst).
const SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";

/// io_uring forbidden on this machine; allowed as before when dropped.
struct Forbidden {
    before: String,
}

impl Forbidden {
    /// `None` for a kernel that cannot forbid it.
    fn new() -> Result<Option<Self>> {
        let before = match fs::read_to_string(SYSCTL) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            before => before.with_context(|| format!("cannot read {SYSCTL}"))?,
        };
        fs::write(SYSCTL, "2").with_context(|| format!("cannot write {SYSCTL}"))?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Forbidden {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SYSCTL, &self.before) {
            eprintln!("{SYSCTL} stays 2 instead of {}: {error}", self.before);
        }
    }
}

#[test]
fn a_move_without_io_uring_passes_and_each_agent_says_so_once() -> Result<()> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(());
    }
    let forbidden = Forbidden::new()?;
    let mut devices = [device(SOURCE, None), device(TARGET, None)];
    let why = if forbidden.is_some() {
        "Operation not permitted"
    } else {
        eprintln!("this kernel has no {SYSCTL}: the agents are configured to do without io_uring");
        for device in &mut devices {
            device.migration.push("disable_io_uring: true".into());
        }
        "not wanted"
    };
    let Some(stage) = Stage::up("engines", &devices, &[CACHE])? else {
        return Ok(());
    };
    stage
        .crew
        .tell(SOURCE, &["evacuate", CACHE.name, "--yes"])?;
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    let plan = stage.plan()?;
    stage.crew.tell(SOURCE, &["verify", &plan])?;
    let release = stage.release(&plan)?;
    let volumes = release["volumes"].as_array().cloned().unwrap_or_default();
    let said = |volume: &Value| release["block_sizes"][volume["volume"].to_string()].is_u64();
    ensure!(
        !volumes.is_empty() && volumes.iter().all(said),
        "of which blocks its roots are is not said: {release:#}"
    );
    for device in [SOURCE, TARGET] {
        let log = stage.crew.log(device);
        let said: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("plain threads do the work"))
            .collect();
        ensure!(
            said.len() == 1 && said[0].contains(why),
            "{device}: {said:?} in {log}"
        );
    }
    stage.lab.down()
}
