//! Disks that can be made to fail, and the built agent that tells of it. They need md, the device mapper and
//! scsi_debug, so the tests that use them run in the guests of `cargo xtask lab kernels`.

use crate::disk::output;
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

const SOCKET: &str = "/run/guests.sock";

/// Guests are slow, and their host has other work.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is told of but makes nothing degraded keeps the tests apart: an event stays evidence for longer than
/// a guest lives.
const POLICY: &str = "\
version: 1
name: guest
thresholds:
  raid-degraded:
    metric: raid.missing_disks
    above: 0
    severity: critical
    optional: true
  hung-task:
    metric: kernel.hung_tasks
    count: { at_least: 1, within: 1h }
  lockup:
    metric: kernel.lockups
    count: { at_least: 1, within: 1h }
  filesystem-error:
    metric: kernel.filesystem_errors
    count: { at_least: 1, within: 1h }
  read-only:
    metric: kernel.read_only_remounts
    count: { at_least: 1, within: 1h }
degraded:
  - any: [raid-degraded]
guards:
  hold: 1s
";

/// Whether this is such a guest, whose emulated processor is some twenty times as slow.
#[must_use]
pub fn in_guest() -> bool {
    std::env::var_os("LIFEBOAT_GUEST").is_some()
}

/// The same; prints that the test is not run when it is not.
#[must_use]
pub fn is_guest() -> bool {
    let is = in_guest();
    if !is {
        println!("not run: only in the guests of `cargo xtask lab kernels`");
    }
    is
}

/// A loop device, given back when dropped.
pub struct Loop(String);

impl Loop {
    /// Over a new file of zeros in memory.
    #[must_use]
    pub fn of(name: &str, mib: u64) -> Self {
        let file = Path::new("/tmp").join(name);
        let backing = File::create(&file).expect("a file");
        backing.set_len(mib << 20).expect("sparse");
        let path = file.to_str().expect("plain");
        let device = Self(output("losetup", &["--find", "--show", path]));
        // It lives as long as the device has it open.
        fs::remove_file(file).expect("removed");
        device
    }

    /// Over a block device, past the page cache.
    #[must_use]
    pub fn over(device: &Path) -> Self {
        let device = device.to_str().expect("plain");
        let how = ["--direct-io=on", "--find", "--show", device];
        Self(output("losetup", &how))
    }

    /// Its path, `/dev/loop0`.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.0
    }

    /// Its name in metrics, `loop0`.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.trim_start_matches("/dev/")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// Nobody here makes the nodes of devices.
const NO_UDEV: [&str; 2] = ["--noudevsync", "--noudevrules"];

/// A mapped device, removed when dropped.
pub struct Mapped(String);

impl Mapped {
    /// Of a table (dmsetup(8)).
    #[must_use]
    pub fn new(name: &str, table: &str) -> Self {
        Self::create(&["create", name, "--table", table], name)
    }

    /// The same with the identity of one that LVM made.
    #[must_use]
    pub fn of_lvm(name: &str, table: &str) -> Self {
        let uuid = format!("LVM-{name}");
        Self::create(&["create", name, "--uuid", &uuid, "--table", table], name)
    }

    fn create(how: &[&str], name: &str) -> Self {
        output("dmsetup", &[how, &NO_UDEV].concat());
        output("dmsetup", &["mknodes"]);
        Self(name.to_owned())
    }

    /// Gives it another table, under those who use it.
    pub fn change(&self, table: &str) {
        self.suspend();
        output("dmsetup", &["reload", &self.0, "--table", table]);
        self.resume();
    }

    /// Holds whatever is asked of it until it is resumed.
    pub fn suspend(&self) {
        output("dmsetup", &["suspend", "--nolockfs", &self.0]);
    }

    /// Goes on.
    pub fn resume(&self) {
        output("dmsetup", &[&["resume", &self.0], &NO_UDEV[..]].concat());
    }

    /// Its path.
    #[must_use]
    pub fn device(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.0)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = Command::new("dmsetup")
            .args(["remove", "--force", "--retry", "--noudevsync", &self.0])
            .output();
    }
}

/// The built agent, one for all tests of a program; the guest's first process ends it.
pub struct Agent;

static AGENT: LazyLock<Agent> = LazyLock::new(Agent::start);

/// The agent, which has swept when this returns.
#[must_use]
pub fn agent() -> &'static Agent {
    &AGENT
}

impl Agent {
    #[expect(
        clippy::zombie_processes,
        reason = "the guest's first process ends it, and the guest"
    )]
    fn start() -> Self {
        fs::write("/run/policy.yaml", POLICY).expect("written");
        let configuration = format!(
            "device: guest\nstate: /run/guests.state\nsocket: {SOCKET}\nruntimes: []\npolicy: /run/policy.yaml\n"
        );
        fs::write("/run/guests.yaml", configuration).expect("written");
        let log = File::create("/run/guests.log").expect("a log");
        Command::new("lifeboat")
            .args(["agent", "--config", "/run/guests.yaml"])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the agent is in the guest");
        let agent = Self;
        agent.until("its first sweep", |seen| {
            seen.0["view"]["snapshot"]["at"].as_u64() > Some(0) && !seen.verdict().is_empty()
        });
        agent
    }

    fn ask(&self, arguments: &[&str]) -> Value {
        let said = Command::new("lifeboat")
            .args(["--json", "--socket", SOCKET])
            .args(arguments)
            .output()
            .expect("the agent is in the guest");
        serde_json::from_slice(&said.stdout).unwrap_or(Value::Null)
    }

    /// Waits until what the agent says of the host is so.
    pub fn until(&self, what: &str, mut holds: impl FnMut(&Seen) -> bool) -> Seen {
        let mut seen = Seen(Value::Null);
        self.wait(what, &["status"], |said| {
            seen = Seen(said);
            holds(&seen)
        });
        seen
    }

    /// Waits until the list of these metrics is so.
    pub fn until_metrics(&self, what: &str, metrics: &str, mut holds: impl FnMut(&Value) -> bool) {
        self.wait(what, &["metrics", metrics], |said| holds(&said));
    }

    fn wait(&self, what: &str, question: &[&str], mut holds: impl FnMut(Value) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !holds(self.ask(question)) {
            assert!(
                Instant::now() < end,
                "not seen: {what}; {}; the agent: {}; the kernel: {}",
                self.ask(question),
                fs::read_to_string("/run/guests.log").unwrap_or_default(),
                output("dmesg", &[])
            );
            sleep(Duration::from_millis(100));
        }
    }
}

/// One value that `lifeboat metrics` lists for a metric, of a thing of this name.
#[must_use]
pub fn listed(metrics: &Value, metric: &str, name: &str) -> Option<f64> {
    let rows = metrics.as_array()?;
    let row = rows.iter().find(|row| row["name"] == metric)?;
    let values = row["values"].as_array()?;
    values.iter().find(|one| one["name"] == name)?["value"].as_f64()
}

/// What the agent said of the host.
#[derive(Debug)]
pub struct Seen(Value);

impl Seen {
    /// Values of a metric for a thing of this name; the name of the device itself is empty.
    #[must_use]
    pub fn values(&self, metric: &str, name: &str) -> Vec<f64> {
        let samples = self.0["view"]["snapshot"]["samples"].as_array();
        let of = samples.into_iter().flatten().filter(|sample| {
            sample["metric"] == metric
                && sample["subject"]["name"].as_str().unwrap_or_default() == name
        });
        of.filter_map(|sample| sample["value"].as_f64()).collect()
    }

    /// Whether one of them is above this.
    #[must_use]
    pub fn above(&self, metric: &str, name: &str, limit: f64) -> bool {
        self.values(metric, name).iter().any(|value| *value > limit)
    }

    /// The verdict, in a word.
    #[must_use]
    pub fn verdict(&self) -> &str {
        self.0["view"]["verdict"]["kind"]
            .as_str()
            .unwrap_or_default()
    }

    /// Whether a threshold of the policy is passed.
    #[must_use]
    pub fn fails(&self, threshold: &str) -> bool {
        let evidence = self.0["view"]["verdict"]["evidence"].as_array();
        let mut evidence = evidence.into_iter().flatten();
        evidence.any(|one| one["threshold"] == threshold)
    }
}

/// A shell in a cgroup of its own, which the agent takes for a container; ends when dropped.
pub struct Caged(Child, PathBuf);

impl Caged {
    /// Starts it.
    #[must_use]
    pub fn run(name: &str, script: &str) -> Self {
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
