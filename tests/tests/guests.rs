//! Real faults of disks, as the built agent tells of them. In guests only.

use lifeboat_tests::disk::output;
use lifeboat_tests::guest::{Loop, is_guest};
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const SOCKET: &str = "/run/guests.sock";

/// Guests are slow, and their host has other work.
const PATIENCE: Duration = Duration::from_secs(90);

const POLICY: &str = "\
version: 1
name: guest
thresholds:
  raid-degraded:
    metric: raid.missing_disks
    above: 0
    severity: critical
    optional: true
degraded:
  - any: [raid-degraded]
";

/// The built agent; ends when dropped.
struct Agent(Child);

impl Agent {
    fn start() -> Self {
        fs::write("/run/policy.yaml", POLICY).expect("written");
        let configuration = format!(
            "device: guest\nstate: /run/guests.state\nsocket: {SOCKET}\nruntimes: []\npolicy: /run/policy.yaml\n"
        );
        fs::write("/run/guests.yaml", configuration).expect("written");
        let log = File::create("/run/guests.log").expect("a log");
        let agent = Command::new("lifeboat")
            .args(["agent", "--config", "/run/guests.yaml"])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        let agent = Self(agent.expect("the agent is in the guest"));
        agent.until("its first sweep", |status| {
            snapshot(status)["at"].as_u64() > Some(0)
        });
        agent
    }

    /// Waits until what the agent says of the host is so.
    fn until(&self, what: &str, mut holds: impl FnMut(&Value) -> bool) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let said = Command::new("lifeboat")
                .args(["--json", "--socket", SOCKET, "status"])
                .output()
                .expect("the agent is in the guest");
            let status = serde_json::from_slice(&said.stdout).unwrap_or(Value::Null);
            if holds(&status) {
                return status;
            }
            assert!(
                Instant::now() < end,
                "not seen: {what}; {status}; the agent: {}; the kernel: {}",
                fs::read_to_string("/run/guests.log").unwrap_or_default(),
                output("dmesg", &[])
            );
            sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn snapshot(status: &Value) -> &Value {
    &status["view"]["snapshot"]
}

/// Values of a metric for a thing of this name; the name of the device itself is empty.
fn values(status: &Value, metric: &str, name: &str) -> Vec<f64> {
    let samples = snapshot(status)["samples"].as_array().into_iter().flatten();
    let of = samples.filter(|sample| {
        sample["metric"] == metric && sample["subject"]["name"].as_str().unwrap_or_default() == name
    });
    of.filter_map(|sample| sample["value"].as_f64()).collect()
}

fn above(status: &Value, metric: &str, name: &str, limit: f64) -> bool {
    values(status, metric, name)
        .iter()
        .any(|value| *value > limit)
}

fn verdict(status: &Value) -> &str {
    status["view"]["verdict"]["kind"]
        .as_str()
        .unwrap_or_default()
}

/// A shell in a cgroup of its own, which the agent takes for a container; ends when dropped.
struct Caged(Child, PathBuf);

impl Caged {
    fn run(name: &str, script: &str) -> Self {
        // As on hosts of containers: the kernel charges block I/O to cgroups with this controller.
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+io").expect("it has cgroup2");
        let cgroup = Path::new("/sys/fs/cgroup").join(name);
        fs::create_dir_all(&cgroup).expect("a cgroup");
        let script = format!("echo $$ > {}/cgroup.procs; {script}", cgroup.display());
        let shell = Command::new("sh")
            .args(["-c", &script])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(shell.expect("a shell"), cgroup)
    }
}

impl Drop for Caged {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        // A command of the script ends by itself.
        let end = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.1).is_err() && Instant::now() < end {
            sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn a_failed_member_of_an_md_array_is_missing_and_the_policy_finds_the_host_degraded() {
    if !is_guest() {
        return;
    }
    let members = ["a", "b"].map(|name| Loop::of(name, 16));
    let [a, b] = [members[0].device(), members[1].device()];
    let how = [
        "--create",
        "/dev/md0",
        "--run",
        "--level=1",
        "--raid-devices=2",
        "--metadata=1.2",
        "--assume-clean",
    ];
    output("mdadm", &[&how[..], &[a, b]].concat());
    let agent = Agent::start();
    let whole = agent.until("the array", |status| {
        !values(status, "raid.missing_disks", "md0").is_empty() && !verdict(status).is_empty()
    });
    assert_eq!(values(&whole, "raid.missing_disks", "md0"), [0.0]);
    assert_ne!(verdict(&whole), "degraded", "{whole}");
    output("mdadm", &["/dev/md0", "--fail", b]);
    let degraded = agent.until("a degraded host", |status| verdict(status) == "degraded");
    assert_eq!(values(&degraded, "raid.missing_disks", "md0"), [1.0]);
    // With one member the data are all there.
    assert_eq!(values(&degraded, "raid.failed", "md0"), [0.0]);
    drop(agent);
    output("mdadm", &["--stop", "/dev/md0"]);
}

/// The disk of scsi_debug.
fn scsi_debug() -> String {
    let disks = fs::read_dir("/sys/block").expect("sysfs");
    disks
        .flatten()
        .find(|disk| {
            fs::read_to_string(disk.path().join("device/model"))
                .is_ok_and(|model| model.trim() == "scsi_debug")
        })
        .map(|disk| disk.file_name().into_string().expect("plain"))
        .expect("a disk of scsi_debug")
}

#[test]
fn a_medium_error_belongs_to_the_container_that_read_and_the_kernel_logged_it() {
    if !is_guest() {
        return;
    }
    let disk = scsi_debug();
    let agent = Agent::start();
    // Sector 4660 and the nine behind it cannot be read (drivers/scsi/scsi_debug.c, SDEBUG_OPT_MEDIUM_ERR).
    fs::write("/sys/bus/pseudo/drivers/scsi_debug/opts", "2").expect("written");
    let reader = Caged::run(
        "reader",
        &format!(
            "while :; do dd if=/dev/{disk} of=/dev/null bs=4k skip=582 count=1 iflag=direct; sleep 0.1; done"
        ),
    );
    // Not its neighbour, which reads where nothing is wrong.
    let neighbour = Caged::run(
        "neighbour",
        &format!(
            "while :; do dd if=/dev/{disk} of=/dev/null bs=4k count=1 iflag=direct; sleep 0.1; done"
        ),
    );
    agent.until("the reader's error", |status| {
        assert!(
            !above(status, "block.errors", "/neighbour", 0.0),
            "{status}"
        );
        above(status, "block.media_errors", "/reader", 0.0)
            && above(status, "block.media_errors", &disk, 0.0)
            && above(status, "block.iops", "/neighbour", 0.0)
    });
    agent.until("the kernel's own message", |status| {
        above(status, "kernel.io_errors", &disk, 0.0)
    });
    drop((reader, neighbour));
    fs::write("/sys/bus/pseudo/drivers/scsi_debug/opts", "0").expect("written");
}
