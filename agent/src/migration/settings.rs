//! What an operator may set about moving data.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Moving data.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The workload is paused when a changeset is at most this many bytes.
    pub changeset_threshold_bytes: u64,
    /// Rounds of replication at most before the pause.
    #[serde(deserialize_with = "some")]
    pub rounds_max: u32,
    /// At stage `prepare`: at most so many bytes a second are read for the copy in advance.
    #[serde(deserialize_with = "some")]
    pub prepare_rate_bytes: u64,
    /// At stage `prepare`: least time between two rounds of the copy; nine times the last round's at least.
    pub prepare_pause_seconds: u64,
    /// What the source's own workload may lose to the copy, in percent; 100: it is not spared.
    #[serde(deserialize_with = "percent")]
    pub workload_loss_max_percent: f64,
    /// Bytes a second that the copy may read however much the workload loses.
    #[serde(deserialize_with = "some")]
    pub rate_min_bytes: u64,
    /// A container without health check and service ports is ready after this many seconds.
    pub settle_seconds: u64,
    /// A twin that is not ready after this many seconds is reported as failed.
    #[serde(deserialize_with = "some")]
    pub ready_timeout_seconds: u64,
    /// Use the thread engine even where io_uring works.
    pub disable_io_uring: bool,
    /// Start migrations on a degraded verdict without an operator.
    pub automatic: bool,
    /// As target: directories below which bind-mounted volumes of other devices may be put.
    pub bind_roots: Vec<PathBuf>,
    /// As target: take volumes with device nodes in them.
    pub device_nodes: bool,
    /// Block devices, or directories of them: as source, those of containers may move; as target, those of
    /// others may be overwritten when they are blank.
    pub block_roots: Vec<PathBuf>,
    /// As target: directory for the images of block devices that have no counterpart in `block_roots`.
    pub image_root: PathBuf,
}

/// A number of which none would be no work at all, or no end of it.
///
/// # Errors
/// It is 0.
pub fn some<'de, T: Deserialize<'de> + Default + PartialEq + Display, D: Deserializer<'de>>(
    from: D,
) -> Result<T, D::Error> {
    let number = T::deserialize(from)?;
    if number == T::default() {
        return Err(D::Error::custom(format!(
            "{number} is too small: write 1 or more"
        )));
    }
    Ok(number)
}

fn percent<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    let percent = f64::deserialize(from)?;
    if !(0.0..=100.0).contains(&percent) {
        return Err(D::Error::custom(format!(
            "{percent} is no percentage: write 0 to 100"
        )));
    }
    Ok(percent)
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            // One second of pause at 16 MiB/s, the slowest link (~130 Mbit/s) we plan for.
            changeset_threshold_bytes: 16 << 20,
            rounds_max: 8,
            // What the slowest link we plan for carries: the copy in advance must not hurt a sick disk.
            prepare_rate_bytes: 16 << 20,
            prepare_pause_seconds: 60,
            workload_loss_max_percent: 30.0,
            rate_min_bytes: 16 << 20,
            settle_seconds: 30,
            ready_timeout_seconds: 120,
            disable_io_uring: false,
            automatic: true,
            bind_roots: [
                "/srv", "/opt", "/data", "/mnt", "/media", "/home", "/var/lib",
            ]
            .map(PathBuf::from)
            .to_vec(),
            device_nodes: false,
            block_roots: Vec::new(),
            image_root: "/var/lib/lifeboat/images".into(),
        }
    }
}

impl Settings {
    /// Settle time.
    #[must_use]
    pub fn settle(&self) -> Duration {
        Duration::from_secs(self.settle_seconds)
    }

    /// Whether a bind-mounted volume may be put at `path`, symbolic links on the way there resolved.
    #[must_use]
    pub fn takes_bind(&self, path: &Path) -> bool {
        let existing = path
            .ancestors()
            .find(|path| path.exists())
            .unwrap_or(Path::new("/"));
        let Ok(real) = existing.canonicalize() else {
            return false;
        };
        let rest = path.strip_prefix(existing).unwrap_or(Path::new(""));
        let real = real.join(rest);
        self.bind_roots
            .iter()
            .any(|root| real.starts_with(root) && real != *root)
    }

    /// Whether a block device of another host may be put on the one of the same path here.
    #[must_use]
    pub fn takes_device(&self, path: &Path) -> bool {
        self.block_roots.iter().any(|root| path.starts_with(root))
    }

    /// Whether a block device of this host may move: also by another name than the one in `block_roots`.
    #[must_use]
    pub fn gives_device(&self, path: &Path) -> bool {
        let Ok(real) = path.canonicalize() else {
            return false;
        };
        let same = |other: &Path| other.canonicalize().is_ok_and(|other| other == real);
        let holds = |root: &Path| {
            let names = std::fs::read_dir(root).into_iter().flatten().flatten();
            names.into_iter().any(|entry| same(&entry.path()))
        };
        self.takes_device(path)
            || self
                .block_roots
                .iter()
                .any(|root| same(root) || holds(root))
    }

    /// Time from a round of the copy in advance, which took `round`, to the next one: a tenth of the time
    /// at most is spent on copying.
    #[must_use]
    pub fn prepare_pause(&self, round: Duration) -> Duration {
        Duration::from_secs(self.prepare_pause_seconds).max(round * 9)
    }

    /// Longest wait for a twin.
    #[must_use]
    pub fn ready_timeout(&self) -> Duration {
        Duration::from_secs(self.ready_timeout_seconds)
    }
}
