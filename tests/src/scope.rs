//! A cgroup2 subtree with senses of its own, for tests that need no containers.

use lifeboat::model::container::Container;
use lifeboat::model::edge::Edge;
use lifeboat::model::units::UnixMillis;
use lifeboat::telemetry::{ConnectionLimits, Telemetry, TelemetryConfig};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A subtree of cgroup2, removed with its processes when dropped.
pub struct Scope(PathBuf);

impl Scope {
    /// Makes it; none, with the reason printed, where that is not possible.
    pub fn new(name: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("procfs");
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "));
        let Some(mount) = mount.and_then(|line| line.split(' ').nth(4)) else {
            println!("not run: cgroup2 is not mounted");
            return None;
        };
        let path = Path::new(mount).join(format!("senses-{name}-{}", std::process::id()));
        if let Err(error) = fs::create_dir(&path) {
            println!("not run: cannot make a cgroup: {error}");
            return None;
        }
        // What is written back is charged by these two; fails where they are of cgroup v1.
        for controller in ["+memory", "+io"] {
            let _ = fs::write(path.join("cgroup.subtree_control"), controller);
        }
        Some(Self(path))
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A cgroup below it.
    pub fn cgroup(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir(&path).expect("a cgroup below ours");
        path
    }

    /// Senses of this subtree, all of which work.
    pub fn senses(&self) -> Telemetry {
        self.senses_within(ConnectionLimits::default())
    }

    /// The same with room for other numbers of connections.
    pub fn senses_within(&self, limits: ConnectionLimits) -> Telemetry {
        self.start(limits, Vec::new())
    }

    /// The same after an earlier life that saw these edges, with an age of an hour.
    pub fn senses_remembering(&self, remembered: Vec<Edge>) -> Telemetry {
        self.start(ConnectionLimits::default(), remembered)
    }

    fn start(&self, limits: ConnectionLimits, remembered: Vec<Edge>) -> Telemetry {
        let senses = Telemetry::start(TelemetryConfig {
            root: PathBuf::from("/"),
            cgroup: self.0.clone(),
            edge_age: Duration::from_secs(3600),
            remembered,
            limits,
        });
        assert_eq!(senses.disabled(), [], "this kernel can run everything");
        senses
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let end = Instant::now() + Duration::from_secs(5);
        let children = fs::read_dir(&self.0).into_iter().flatten().flatten();
        for child in children.filter(|child| child.path().is_dir()) {
            while fs::remove_dir(child.path()).is_err() && Instant::now() < end {
                sleep(Duration::from_millis(10));
            }
        }
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("left behind {}: {error}", self.0.display());
        }
    }
}

/// A container as a runtime would tell of it, in the cgroup of its name.
#[must_use]
pub fn container(name: &str, pid: i32) -> Container {
    Container {
        name: name.into(),
        ..Container::of_cgroup(&format!("/{name}"), 0, pid)
    }
}

/// The time as snapshots have it.
#[must_use]
pub fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    UnixMillis(since.expect("after 1970").as_millis() as u64)
}
