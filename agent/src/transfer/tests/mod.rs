//! The data plane over loopback: real files, real sockets, each path, both engines.

mod anew;
mod damaged;
mod dedup;
mod disks;
mod extents;
mod faults;
mod holds;
mod one;
mod pages;
mod paths;

use super::*;
use crate::model::ids::{Epoch, PlanId, VolumeId};
use crate::model::units::Bytes;
use crate::model::volume::{VolumeKind, VolumeSpec};
use crate::volume::{BlockMap, FleetKey, TreeState};
use std::ffi::OsStr;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

pub(super) const FLEET: [u8; 32] = [5; 32];
pub(super) const DATA: [u8; 32] = [6; 32];
pub(super) const TO_TARGET: [u8; 32] = [7; 32];
pub(super) const TO_RELAY: [u8; 32] = [8; 32];

pub(super) fn options(engine: EngineChoice) -> Options {
    Options {
        engine,
        patience: Duration::from_secs(2),
        retries: 4,
        backoff: Duration::from_millis(20),
        device_nodes: true,
        longest_write: Duration::ZERO,
        ..Options::default()
    }
}

pub(super) fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// A source directory, a target directory, and the servers between them.
pub(super) struct Bench {
    _dir: tempfile::TempDir,
    pub(super) source: PathBuf,
    pub(super) target: PathBuf,
    pub(super) spool: PathBuf,
    pub(super) server: DataServer,
    pub(super) relay: DataServer,
    pub(super) plan: PlanId,
    pub(super) engine: EngineChoice,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Way {
    Direct,
    ViaSpool,
    SealReturn,
    SealForward,
}

pub(super) const WAYS: [Way; 4] = [
    Way::Direct,
    Way::ViaSpool,
    Way::SealReturn,
    Way::SealForward,
];

/// Each path with each engine.
pub(super) fn every() -> impl Iterator<Item = (Way, EngineChoice)> {
    let engines = [EngineChoice::Threads, EngineChoice::Auto];
    WAYS.into_iter()
        .flat_map(move |way| engines.map(|engine| (way, engine)))
}

/// A directory on the disk under test; `/tmp` may be a tmpfs without attributes.
pub(super) fn disk_dir() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/../target").unwrap()
}

impl Bench {
    pub(super) fn new(engine: EngineChoice) -> Self {
        let dir = disk_dir();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        let map = Arc::new(BlockMap::open(&dir.path().join("map")).unwrap());
        let bench = Self {
            target: dir.path().join("target"),
            spool: dir.path().join("spool"),
            _dir: dir,
            source,
            server: DataServer::bind(loopback(), options(engine), Some(map)).unwrap(),
            relay: DataServer::bind(loopback(), options(engine), None).unwrap(),
            plan: PlanId::from("plan-1"),
            engine,
        };
        bench.admit_target(&bench.target);
        bench
    }

    pub(super) fn admit_target(&self, destination: &Path) {
        self.admit(destination, false);
    }

    /// Admits a volume, perhaps of one piece.
    pub(super) fn admit(&self, destination: &Path, one: bool) {
        self.server.admit_receive(ReceivePlan {
            plan: self.plan.clone(),
            link_key: LinkKey(TO_TARGET),
            data_key: DataKey(DATA),
            fleet_key: FleetKey(FLEET),
            volumes: vec![ReceiveVolume {
                id: VolumeId(1),
                name: "data".to_owned(),
                destination: destination.to_owned(),
                one,
            }],
        });
    }

    pub(super) fn path(&self, way: Way) -> DataPath {
        self.path_to(way, self.server.addr(), self.relay.addr())
    }

    /// The path with the target reached at `target` and the paired device at `relay`.
    pub(super) fn path_to(&self, way: Way, target: SocketAddr, relay: SocketAddr) -> DataPath {
        let target = Hop {
            addr: target,
            link_key: LinkKey(TO_TARGET),
        };
        let paired = Hop {
            addr: relay,
            link_key: LinkKey(TO_RELAY),
        };
        let data_key = DataKey(DATA);
        self.relay.admit_relay(RelayPlan {
            plan: self.plan.clone(),
            link_key: LinkKey(TO_RELAY),
            seal_key: matches!(way, Way::SealReturn | Way::SealForward).then(|| data_key.clone()),
            fleet_key: FleetKey(FLEET),
            forward: (way != Way::SealReturn).then(|| target.clone()),
            spool: self.spool.clone(),
        });
        match way {
            Way::Direct => DataPath::Direct { target, data_key },
            Way::ViaSpool => DataPath::ViaSpool {
                relay: paired,
                data_key,
            },
            Way::SealReturn => DataPath::SealReturn {
                sealer: paired,
                target,
            },
            Way::SealForward => DataPath::SealForward { relay: paired },
        }
    }

    pub(super) fn sender(&self, path: DataPath) -> Sender {
        Sender::new(
            self.plan.clone(),
            path,
            FleetKey(FLEET),
            options(self.engine),
        )
    }

    pub(super) fn volume(&self) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId(1),
            name: "data".to_owned(),
            kind: VolumeKind::Named("data".to_owned()),
            source_path: self.source.clone(),
            containers: Vec::new(),
            size: Bytes(0),
            holes: Bytes(0),
            entries: 0,
            device_nodes: 0,
            unreadable: 0,
            changes: Default::default(),
            unused: Default::default(),
        }
    }

    pub(super) fn send(
        &self,
        sender: &mut Sender,
        epoch: u64,
        previous: Option<&TreeState>,
    ) -> Result<(TreeState, EpochReport), SendError> {
        sender.send_epoch(
            &self.volume(),
            Epoch(epoch),
            false,
            previous,
            &Arc::default(),
        )
    }

    /// Fails unless an independent program finds source and target equal.
    pub(super) fn assert_equal(&self) {
        assert_same_tree(&self.source, &self.target);
    }
}

pub(super) fn assert_same_tree(source: &Path, target: &Path) {
    let slash = |path: &Path| {
        let mut text = path.as_os_str().to_owned();
        text.push("/");
        text
    };
    for (from, to) in [(source, target), (target, source)] {
        let output = Command::new("rsync")
            .args(["-aHAXS", "--checksum", "--dry-run", "--itemize-changes"])
            // Times to the nanosecond.
            .args(["--modify-window=-1", "--delete"])
            .args([slash(from), slash(to)])
            .output()
            .expect("rsync, which `cargo xtask setup` installs, compares copies");
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.is_empty(), "rsync finds differences:\n{text}");
    }
    let key = FleetKey([1; 32]);
    let (a, _) = crate::volume::scan(source, &key, crate::volume::BlockSize::default()).unwrap();
    let (b, _) = crate::volume::scan(target, &key, crate::volume::BlockSize::default()).unwrap();
    for (a, b) in a.iter().zip(b.iter()) {
        assert!(a.same(&b), "{a:?}\ndiffers from\n{b:?}");
    }
    assert_eq!(a.root, b.root);
}

pub(super) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Bytes that no two blocks share.
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

/// Sizes at which something changes: nothing, one byte, around a block, around a whole record.
pub(super) const INTERESTING_SIZES: [usize; 12] = [
    0,
    1,
    4095,
    4096,
    65_535,
    65_536,
    65_537,
    (1 << 20) - 1,
    1 << 20,
    (1 << 20) + 1,
    3 << 20,
    (5 << 20) + 12_345,
];

/// A tree with everything a tree can carry.
pub(super) fn make_everything(root: &Path) {
    for (index, size) in INTERESTING_SIZES.into_iter().enumerate() {
        fs::write(root.join(format!("size-{size}")), noise(index as u64, size)).unwrap();
    }
    fs::create_dir_all(root.join("deep/er/and/deeper")).unwrap();
    fs::create_dir(root.join("deep.with-dot-sorts-before-slash")).unwrap();
    fs::write(root.join("deep/er/and/deeper/leaf"), b"leaf").unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    let odd = OsStr::from_bytes(b"caf\xe9 \xff\n'\"*");
    fs::write(root.join(odd), b"odd name").unwrap();
    std::os::unix::fs::symlink("deep/er", root.join("link")).unwrap();
    std::os::unix::fs::symlink("/nowhere/at all", root.join("dangling")).unwrap();
    fs::hard_link(root.join("size-65537"), root.join("hard-1")).unwrap();
    fs::hard_link(root.join("size-65537"), root.join("deep/hard-2")).unwrap();
    fs::hard_link(
        root.join(format!("size-{}", 3 << 20)),
        root.join("hard-large"),
    )
    .unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    sparse.write_all_at(b"island", 20 << 20).unwrap();
    let tail = fs::File::create(root.join("sparse-tail")).unwrap();
    tail.write_all_at(b"head", 0).unwrap();
    tail.set_len(9 << 20).unwrap();
    fs::write(root.join("zeros"), vec![0; 200_000]).unwrap();
    nix::unistd::mkfifo(
        &root.join("fifo"),
        nix::sys::stat::Mode::from_bits_truncate(0o640),
    )
    .unwrap();
    for (first, further) in [
        ("link", "deep/link-2"),
        ("dangling", "a-dangling"),
        ("fifo", "fifo-2"),
    ] {
        fs::hard_link(root.join(first), root.join(further)).unwrap();
    }
    let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    xattr::set(root.join("size-1"), "user.note", b"\x00binary\xff").unwrap();
    xattr::set(root.join("empty"), "user.on-directory", b"d").unwrap();
    let mode = |name: &str, bits: u32| {
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(bits)).unwrap();
    };
    mode("size-4095", 0o4755);
    mode("size-4096", 0o000);
    mode("empty", 0o1777);
    run("setfacl", &["-m", "u:65534:r,g:12:rw", "size-0"], root);
    run("setfacl", &["-d", "-m", "u:65534:rx", "deep"], root);
    fs::write(root.join("deep/inherits-acl"), b"acl").unwrap();
    if is_root() {
        std::os::unix::fs::lchown(root.join("link"), Some(12), Some(34)).unwrap();
        std::os::unix::fs::chown(root.join("size-65535"), Some(1234), Some(4321)).unwrap();
        run("setcap", &["cap_net_raw+ep", "size-1"], root);
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o660);
        let device = nix::sys::stat::makedev(1, 3);
        let kind = nix::sys::stat::SFlag::S_IFCHR;
        nix::sys::stat::mknod(&root.join("null"), kind, mode, device).unwrap();
        let kind = nix::sys::stat::SFlag::S_IFBLK;
        nix::sys::stat::mknod(&root.join("loop"), kind, mode, device).unwrap();
        fs::hard_link(root.join("null"), root.join("deep/null-2")).unwrap();
        fs::hard_link(root.join("loop"), root.join("deep/loop-2")).unwrap();
        xattr::set(root.join("dangling"), "trusted.on-symlink", b"s").unwrap();
    } else {
        println!("not root: no devices, foreign owners, capabilities or trusted attributes tested");
    }
    let old = std::time::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    for name in ["size-4095", "empty", "deep/er"] {
        fs::File::open(root.join(name))
            .unwrap()
            .set_modified(old)
            .unwrap();
    }
}

fn run(program: &str, args: &[&str], dir: &Path) {
    match Command::new(program).args(args).current_dir(dir).status() {
        Ok(status) => assert!(status.success(), "{program} {args:?}: {status}"),
        Err(error) => println!("{program} does not run here ({error}): not tested"),
    }
}
