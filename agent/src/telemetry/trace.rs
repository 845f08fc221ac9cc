//! Recording the access trace of a device, or of the files of a directory.
//!
//! Invariants: memory is bounded, in the kernel by a map that is emptied at every sweep and here by
//! [`MAX_RUNS`]; what found no room is counted in the trace. Non-goals: what the page cache answers, which
//! never reaches the block layer; files that are gone when the trace ends.

use super::btf::KernelTypes;
use super::cgroups::{Cgroups, owner};
use super::device::{self, Place};
use super::extents;
use super::kernel::mapped::Mapped;
use super::kernel::{BTF_PATH, allow_locked_memory, attach, chain, find_scope, forbidden, hooks};
use super::layout::{self, Family};
use super::ports::Clock;
use crate::model::container::Container;
use crate::model::extent::Extent;
use crate::model::trace::{Cause, MAX_TOUCHES, Of, Touch, Trace, TracedFile};
use crate::model::units::{Bytes, UnixMillis};
use aya::maps::{Array, HashMap as KernelMap, MapData};
use aya::{Ebpf, EbpfLoader};
use lifeboat_ebpf::{Access, AccessKey, Layout, SECTOR_SHIFT, Traced, access, loss};
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lifeboat-trace.o"));

/// Length of an extent: the smallest block of a volume.
pub const EXTENT: u64 = 64 << 10;

/// Most runs of sectors, each with its cause, that are told apart: some 64 MiB of memory.
const MAX_RUNS: usize = 1 << 20;

/// How long a program that began in an epoch is waited for when the epoch is over. One that takes longer is
/// read one epoch later.
const GRACE: Duration = Duration::from_millis(2);

/// What to trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A disk, partition or stacked device.
    Device(PathBuf),
    /// A directory: the files in it, on the device that holds them.
    Directory(PathBuf),
}

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It is no block device, or lies on none.
    #[error("{what} cannot be traced: {why}; name a block device, or a directory on one")]
    NoDevice {
        /// As named.
        what: PathBuf,
        /// What was missing.
        why: String,
    },
    /// The files cannot be found on their device.
    #[error(
        "the files of {directory} cannot be found on their device: {source}; trace the device itself"
    )]
    Unmapped {
        /// The directory.
        directory: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The kernel cannot run the programs.
    #[error("access traces cannot be had here: {0}")]
    Kernel(String),
}

/// A trace that is being recorded.
pub struct Recorder {
    ebpf: Ebpf,
    epoch: Mapped,
    what: What,
    size: u64,
    started: UnixMillis,
    started_ns: u64,
    since: Instant,
    cgroups: Cgroups,
    /// Index in `causes` by cgroup.
    known: HashMap<u64, u32>,
    causes: Vec<Cause>,
    runs: HashMap<Run, Seen>,
    lost: u64,
}

/// Sectors that were accessed together, on the device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Run {
    sector: u64,
    sectors: u32,
    cause: u32,
    write: bool,
}

impl Run {
    fn begin(&self) -> u64 {
        self.sector << SECTOR_SHIFT
    }

    fn end(&self) -> u64 {
        (self.sector + u64::from(self.sectors)) << SECTOR_SHIFT
    }
}

/// When a run was accessed first, ns since the start, and how often.
#[derive(Clone, Copy)]
struct Seen {
    first_ns: u64,
    count: u64,
}

impl Recorder {
    /// Traces from now on; `root` is the root of procfs and sysfs, and nothing beyond the cgroup2 directory
    /// `cgroup` is recorded.
    ///
    /// # Errors
    /// [`RecordError::NoDevice`] and [`RecordError::Kernel`].
    pub fn start(
        root: &Path,
        cgroup: &Path,
        what: What,
        now: UnixMillis,
    ) -> Result<Self, RecordError> {
        let what = match what {
            What::Directory(directory) => {
                What::Directory(fs::canonicalize(&directory).unwrap_or(directory))
            }
            device => device,
        };
        let (named, number) = match &what {
            What::Device(device) => (device, device::number(device)),
            What::Directory(directory) => (directory, device_of(directory)),
        };
        let place = number
            .and_then(|number| Place::find(root, number))
            .map_err(|why| RecordError::NoDevice {
                what: named.clone(),
                why,
            })?;
        let traced = Traced {
            first_sector: place.first_sector,
            sectors: place.sectors,
            device: place.disk,
            padding: 0,
        };
        let ebpf = load(root, cgroup, &traced).map_err(RecordError::Kernel)?;
        let epoch = ebpf.map("EPOCH").ok_or("it is not in the embedded object");
        let epoch = epoch.map_err(str::to_owned).and_then(Mapped::writable);
        Ok(Self {
            epoch: epoch.map_err(RecordError::Kernel)?,
            ebpf,
            what,
            size: place.sectors << SECTOR_SHIFT,
            started: now,
            started_ns: Clock::new(now).monotonic_ns,
            since: Instant::now(),
            cgroups: Cgroups::new(cgroup.to_owned()),
            known: HashMap::new(),
            causes: Vec::new(),
            runs: HashMap::new(),
            lost: 0,
        })
    }

    /// Empties the kernel's map; meant for about twice a second. True when a cgroup was seen for the first
    /// time, which [`Recorder::name`] may then know. Blocking, milliseconds.
    pub fn sweep(&mut self) -> bool {
        let before = self.epoch.words()[0].fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(GRACE);
        let odd = (before & 1) as u32 * access::ODD;
        let Some(mut map) = self
            .ebpf
            .map_mut("ACCESSES")
            .and_then(|map| KernelMap::<&mut MapData, AccessKey, Access>::try_from(map).ok())
        else {
            return false;
        };
        let mut ended: Vec<(AccessKey, Access)> = map
            .iter()
            .filter_map(Result::ok)
            .filter(|(key, _)| key.kind & access::ODD == odd)
            .collect();
        for (key, _) in &ended {
            // Nobody else removes any.
            let _ = map.remove(key);
        }
        ended.sort_unstable_by_key(|(_, access)| access.first_ns);
        self.cgroups.know(ended.iter().map(|(key, _)| key.cgroup));
        let causes = self.causes.len();
        for (key, access) in ended {
            self.add(&key, &access);
        }
        self.causes.len() > causes
    }

    fn add(&mut self, key: &AccessKey, access: &Access) {
        let next = self.causes.len() as u32;
        let cause = *self.known.entry(key.cgroup).or_insert_with(|| {
            self.causes.push(Cause {
                container: None,
                cgroup: self.cgroups.path(key.cgroup).unwrap_or_default().to_owned(),
            });
            next
        });
        let run = Run {
            sector: key.sector,
            sectors: key.sectors,
            cause,
            write: key.kind & access::WRITE != 0,
        };
        if let Some(seen) = self.runs.get_mut(&run) {
            seen.count += access.count;
        } else if self.runs.len() < MAX_RUNS {
            let first_ns = access.first_ns.saturating_sub(self.started_ns);
            let count = access.count;
            self.runs.insert(run, Seen { first_ns, count });
        } else {
            self.lost += access.count;
        }
    }

    /// Gives causes the names of containers; a cause that has one keeps it.
    pub fn name(&mut self, containers: &[Container]) {
        // Their paths are those of the agent's scope, which may lie below this one.
        let containers: Vec<Container> = containers
            .iter()
            .map(|container| {
                let mut container = container.clone();
                if let Some(path) = self.cgroups.path(container.cgroup_id) {
                    container.cgroup_path = path.to_owned();
                }
                container
            })
            .collect();
        for cause in &mut self.causes {
            if cause.container.is_none() {
                cause.container = owner(&cause.cgroup, &containers).cloned();
            }
        }
    }

    /// Ends the trace. Of a directory, finds its files on the device, which reads every inode of it.
    ///
    /// # Errors
    /// [`RecordError::Unmapped`].
    pub fn finish(mut self) -> Result<Trace, RecordError> {
        // Twice: the second one has what began before the first and ended after it.
        self.sweep();
        self.sweep();
        let lasted = self.since.elapsed();
        let losses = self.ebpf.map("LOSSES");
        let losses = losses.and_then(|map| Array::<&MapData, u64>::try_from(map).ok());
        let lost = losses.and_then(|losses| losses.get(&loss::ACCESSES, 0).ok());
        let Self {
            ebpf,
            what,
            size,
            started,
            causes,
            runs,
            ..
        } = self;
        // Looking for the files is no access of theirs.
        drop(ebpf);
        let mut placer = Placer::new(runs);
        let of = match what {
            What::Device(device) => {
                placer.file(Vec::new(), size, &[Extent::whole(size)]);
                Of::Device(device.to_string_lossy().into_owned())
            }
            What::Directory(directory) => {
                let files = extents::walk(&directory, |file| {
                    placer.file(file.path, file.length, &file.pieces);
                });
                files.map_err(|source| RecordError::Unmapped {
                    directory: directory.clone(),
                    source,
                })?;
                Of::Directory(directory.to_string_lossy().into_owned())
            }
        };
        let placed = placer.finish();
        Ok(Trace {
            of,
            started,
            lasted: Duration::from_millis(lasted.as_millis() as u64),
            extent: Bytes(EXTENT),
            lost: self.lost + lost.unwrap_or(0) + placed.lost,
            elsewhere: placed.elsewhere,
            causes,
            files: placed.files,
            touches: placed.touches,
        })
    }
}

/// The device that holds a directory.
fn device_of(directory: &Path) -> Result<u64, String> {
    let metadata = fs::metadata(directory).map_err(|error| error.to_string())?;
    if !metadata.is_dir() {
        return Err("it is no directory".to_owned());
    }
    if nix::sys::stat::major(metadata.dev()) == 0 {
        return Err(
            "its file system has no block device of its own, as btrfs and overlay".to_owned(),
        );
    }
    Ok(metadata.dev())
}

fn load(root: &Path, cgroup: &Path, traced: &Traced) -> Result<Ebpf, String> {
    if let Some(why) = forbidden() {
        return Err(why);
    }
    let path = root.join(BTF_PATH);
    let data = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let types = KernelTypes::parse(data).map_err(|error| error.to_string())?;
    let (mut layout, missing) = layout::find(&types);
    let btf = hooks(&types)?;
    drop(types);
    let missing = |family| {
        let mut missing = missing.iter();
        missing.find_map(|(of, reason)| (*of == family).then_some(&reason.why))
    };
    if let Some(why) = missing(Family::Trace) {
        return Err(why.clone());
    }
    allow_locked_memory();
    set_scope(root, cgroup, &mut layout)?;
    let mut ebpf = EbpfLoader::new()
        .btf(None)
        .override_global("LAYOUT", &layout, true)
        .override_global("TRACED", traced, true)
        .load(OBJECT)
        .map_err(|error| chain(&error))?;
    let mut programs = vec![("traced_bio_queue", "block_bio_queue")];
    if layout.write_back_uncharged != 0 {
        if let Some(why) = missing(Family::WriteBack) {
            tracing::warn!("trace: what kernel threads write back is nobody's: {why}");
        } else {
            programs.insert(0, ("writeback_dirty_folio", "writeback_dirty_folio"));
        }
    }
    for (program, tracepoint) in programs {
        attach(&mut ebpf, &btf, program, tracepoint).map_err(|why| format!("{program}: {why}"))?;
    }
    Ok(ebpf)
}

fn set_scope(root: &Path, cgroup: &Path, layout: &mut Layout) -> Result<(), String> {
    let (_, scope, _) = find_scope(root, cgroup, layout)?;
    (layout.scope_id, layout.scope_level) = (scope.id, scope.level);
    let own_cgroups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    if layout::has_v1_write_back(&own_cgroups) {
        layout.write_back_uncharged = 1;
    }
    Ok(())
}

impl Extent {
    fn whole(length: u64) -> Self {
        Self {
            logical: 0,
            physical: 0,
            length,
            unwritten: false,
            shared: false,
        }
    }
}

/// Puts the runs of a device into the extents of files.
struct Placer {
    /// By their beginning.
    runs: Vec<(Run, Seen)>,
    /// Bytes of the longest run.
    longest: u64,
    placed: Vec<bool>,
    files: Vec<TracedFile>,
    touches: HashMap<TouchKey, TouchSeen>,
    lost: u64,
}

type TouchKey = (u32, u64, u32, bool);

struct TouchSeen {
    seen: Seen,
    /// The last run that was counted: it may reach an extent through two pieces.
    run: usize,
}

struct Placed {
    files: Vec<TracedFile>,
    touches: Vec<Touch>,
    elsewhere: u64,
    lost: u64,
}

impl Placer {
    fn new(runs: HashMap<Run, Seen>) -> Self {
        let mut runs: Vec<(Run, Seen)> = runs.into_iter().collect();
        runs.sort_unstable_by_key(|(run, _)| *run);
        Self {
            longest: runs
                .iter()
                .map(|(run, _)| run.end() - run.begin())
                .max()
                .unwrap_or(0),
            placed: vec![false; runs.len()],
            runs,
            files: Vec::new(),
            touches: HashMap::new(),
            lost: 0,
        }
    }

    /// Takes up a file if one of the runs lies in it.
    fn file(&mut self, path: Vec<u8>, length: u64, pieces: &[Extent]) {
        let file = self.files.len() as u32;
        let mut is_touched = false;
        for piece in pieces {
            let end = piece.physical.saturating_add(piece.length);
            let from = piece.physical.saturating_sub(self.longest);
            let first = self.runs.partition_point(|(run, _)| run.begin() < from);
            for index in first..self.runs.len() {
                let (run, seen) = self.runs[index];
                if run.begin() >= end {
                    break;
                }
                if run.end() <= piece.physical {
                    continue;
                }
                is_touched = true;
                self.placed[index] = true;
                let logical = |at: u64| at - piece.physical + piece.logical;
                let from = logical(run.begin().max(piece.physical)) / EXTENT;
                let last = (logical(run.end().min(end)) - 1) / EXTENT;
                for extent in from..=last {
                    self.touch((file, extent, run.cause, run.write), seen, index);
                }
            }
        }
        if is_touched {
            let length = Bytes(length);
            self.files.push(TracedFile { path, length });
        }
    }

    fn touch(&mut self, key: TouchKey, seen: Seen, run: usize) {
        if let Some(known) = self.touches.get_mut(&key) {
            if known.run != run {
                known.run = run;
                known.seen.count += seen.count;
                known.seen.first_ns = known.seen.first_ns.min(seen.first_ns);
            }
        } else if self.touches.len() < MAX_TOUCHES {
            self.touches.insert(key, TouchSeen { seen, run });
        } else {
            self.lost += seen.count;
        }
    }

    fn finish(self) -> Placed {
        let mut touches: Vec<(TouchKey, Seen)> = self
            .touches
            .into_iter()
            .map(|(key, touch)| (key, touch.seen))
            .collect();
        touches.sort_unstable_by_key(|(key, seen)| (seen.first_ns, *key));
        let elsewhere = self.runs.iter().zip(&self.placed);
        let elsewhere = elsewhere.filter(|(_, placed)| !**placed);
        Placed {
            elsewhere: elsewhere.map(|((_, seen), _)| seen.count).sum(),
            files: self.files,
            touches: touches
                .into_iter()
                .map(|((file, extent, cause, write), seen)| Touch {
                    file,
                    extent,
                    cause,
                    write,
                    at_ms: seen.first_ns / 1_000_000,
                    heat: seen.count,
                })
                .collect(),
            lost: self.lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(of: &[(u64, u32, u64, u64)]) -> Placer {
        let runs = of.iter().map(|&(page, pages, first_ns, count)| {
            let run = Run {
                sector: page * 8,
                sectors: pages * 8,
                cause: 0,
                write: false,
            };
            (run, Seen { first_ns, count })
        });
        Placer::new(runs.collect())
    }

    fn touched(placed: &Placed) -> Vec<(u32, u64, u64)> {
        let touches = placed.touches.iter();
        touches
            .map(|touch| (touch.file, touch.extent, touch.heat))
            .collect()
    }

    #[test]
    fn an_extent_has_the_heat_of_every_run_that_touches_it_and_the_earliest_time() {
        // Pages of 4 KiB: one run over extents 0 and 1, one in extent 1, one far off but first.
        let mut placer = runs(&[(15, 2, 20, 1), (17, 1, 10, 5), (160, 1, 5, 2)]);
        placer.file(Vec::new(), 1 << 30, &[Extent::whole(1 << 30)]);
        let placed = placer.finish();
        assert_eq!(touched(&placed), [(0, 10, 2), (0, 1, 6), (0, 0, 1)]);
        assert_eq!((placed.elsewhere, placed.lost), (0, 0));
    }

    #[test]
    fn runs_are_found_in_the_pieces_of_files() {
        let piece = |logical: u64, physical: u64, length: u64| Extent {
            logical: logical << 12,
            physical: physical << 12,
            length: length << 12,
            unwritten: false,
            shared: false,
        };
        let mut placer = runs(&[
            (95, 10, 1, 3),
            (200, 1, 2, 4),
            (300, 4, 3, 5),
            (500, 9, 4, 6),
        ]);
        placer.file(b"idle".to_vec(), 1 << 20, &[piece(0, 700, 256)]);
        // The first run touches the last pages of one piece and the first ones of the next, which follow
        // each other on the device and in the extent.
        let pieces = [piece(0, 90, 10), piece(10, 100, 6), piece(160, 200, 1)];
        placer.file(b"a".to_vec(), 1 << 20, &pieces);
        placer.file(b"b".to_vec(), 1 << 20, &[piece(16, 302, 16)]);
        let placed = placer.finish();
        assert_eq!(touched(&placed), [(0, 0, 3), (0, 10, 4), (1, 1, 5)]);
        let paths: Vec<_> = placed.files.iter().map(|file| &file.path[..]).collect();
        assert_eq!(paths, [b"a", b"b"]);
        assert_eq!(placed.elsewhere, 6);
    }
}
