//! Moves a directory or a block device between addresses with the agent's own data plane, without a fleet: what
//! `cargo xtask bench transfer` measures and `cargo xtask soak transfer` kills.
//!
//! ```text
//! MOVE_KEY=secret move_directory receive 10.0.0.2:7000 /into /map [one]
//! MOVE_KEY=secret move_directory relay WAY 10.0.0.3:7000 /spool 10.0.0.2:7000
//! MOVE_KEY=secret move_directory send [WAY] 10.0.0.2:7000 /from [10.0.0.3:7000]
//! move_directory measure
//! ```
//! `WAY` is `direct` (without it, too), `spool`, `seal-return` or `seal-forward`; all but the first need a relay. All ends derive
//! every key from `MOVE_KEY`; `MOVE_ENGINE` chooses `io-uring` or `threads`. Receiver and relay serve until they
//! are killed; the receiver, whose block map is in `/map`, prints how far it is as lines of JSON, and with `one` it
//! makes one file `/into` of a block device. The sender prints its report as one, and sends what changed since for
//! each line that it is given; of a block device that is what the kernel noted. `MOVE_SIZE` tells it the bytes of
//! the volume, as a plan would, when they are more than small blocks are for, or lie in large files, of which the kernel
//! then notes what is written. `measure` prints what one core hashes and
//! seals in a second.

use lifeboat::model::ids::{Epoch, PlanId, VolumeId};
use lifeboat::model::units::Bytes;
use lifeboat::model::volume::{ChangesBy, VolumeKind, VolumeSpec};
use lifeboat::telemetry::dirty::Watch;
use lifeboat::transfer::below::{Below, is_written_in_place};
use lifeboat::transfer::frame::{FrameKind, Header};
use lifeboat::transfer::seal::Sealer;
use lifeboat::transfer::{
    DataKey, DataPath, DataServer, EngineChoice, Hop, LinkKey, Options, ReceivePlan, ReceiveVolume,
    RelayPlan, Sender,
};
use lifeboat::volume::{BlockMap, FleetKey, TreeState, sign};
use std::error::Error;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> Outcome {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["receive", addr, into, map] => {
            receive(addr.parse()?, Path::new(into), Path::new(map), false)
        }
        ["receive", addr, into, map, "one"] => {
            receive(addr.parse()?, Path::new(into), Path::new(map), true)
        }
        ["measure"] => measure(),
        ["relay", way, addr, spool, target] => {
            relay(way, addr.parse()?, Path::new(spool), target.parse()?)
        }
        ["send", target, from] => send("direct", target.parse()?, Path::new(from), None),
        ["send", way, target, from] => send(way, target.parse()?, Path::new(from), None),
        ["send", way, target, from, relay] => {
            send(way, target.parse()?, Path::new(from), Some(relay.parse()?))
        }
        _ => Err(
            "use: receive ADDR DIRECTORY MAP [one] | relay WAY ADDR SPOOL TARGET | send [WAY] TARGET SOURCE [RELAY] | measure"
                .into(),
        ),
    }
}

fn plan() -> PlanId {
    PlanId::from("move-directory")
}

fn key(purpose: &str) -> Result<[u8; 32], &'static str> {
    let secret =
        std::env::var("MOVE_KEY").map_err(|_| "set MOVE_KEY to the same text at all ends")?;
    let context = format!("move_directory example {purpose}");
    Ok(blake3::derive_key(&context, secret.as_bytes()))
}

fn options() -> Options {
    Options {
        engine: match std::env::var("MOVE_ENGINE").as_deref() {
            Ok("threads") => EngineChoice::Threads,
            Ok("io-uring") => EngineChoice::IoUring,
            _ => EngineChoice::Auto,
        },
        ..Options::default()
    }
}

fn target_at(addr: SocketAddr) -> Result<Hop, &'static str> {
    let link_key = LinkKey(key("link")?);
    Ok(Hop { addr, link_key })
}

fn receive(addr: SocketAddr, into: &Path, map: &Path, one: bool) -> Outcome {
    let map = Arc::new(BlockMap::open(map)?);
    let server = DataServer::bind(addr, options(), Some(map))?;
    server.admit_receive(ReceivePlan {
        plan: plan(),
        link_key: LinkKey(key("link")?),
        data_key: DataKey(key("data")?),
        fleet_key: FleetKey(key("fleet")?),
        volumes: vec![ReceiveVolume {
            id: VolumeId(0),
            name: "directory".to_owned(),
            destination: into.to_owned(),
            one,
        }],
    });
    println!("{}", server.addr());
    let mut last = String::new();
    loop {
        let progress = server.progress(&plan()).unwrap_or_default();
        let line = serde_json::to_string(&progress.first())?;
        if line != last {
            println!("{line}");
            last = line;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn relay(way: &str, addr: SocketAddr, spool: &Path, target: SocketAddr) -> Outcome {
    let server = DataServer::bind(addr, options(), None)?;
    let target = target_at(target)?;
    server.admit_relay(RelayPlan {
        plan: plan(),
        link_key: LinkKey(key("relay")?),
        seal_key: way
            .starts_with("seal")
            .then(|| key("data").map(DataKey))
            .transpose()?,
        fleet_key: FleetKey(key("fleet")?),
        forward: (way != "seal-return").then_some(target),
        spool: spool.to_owned(),
    });
    println!("{}", server.addr());
    loop {
        std::thread::park();
    }
}

fn send(way: &str, target: SocketAddr, from: &Path, relay: Option<SocketAddr>) -> Outcome {
    let target = target_at(target)?;
    let data_key = DataKey(key("data")?);
    let link_key = LinkKey(key("relay")?);
    let relay = relay.map(|addr| Hop { addr, link_key });
    let path = match (way, relay) {
        ("direct", None) => DataPath::Direct { target, data_key },
        ("spool", Some(relay)) => DataPath::ViaSpool { relay, data_key },
        ("seal-return", Some(sealer)) => DataPath::SealReturn { sealer, target },
        ("seal-forward", Some(relay)) => DataPath::SealForward { relay },
        _ => return Err(format!("{way} is no way, or lacks or has a relay too many").into()),
    };
    let is_device = fs::metadata(from)?.file_type().is_block_device();
    let size = std::env::var("MOVE_SIZE").map_or(Ok(0), |bytes| bytes.parse())?;
    let device = fs::metadata(from)?.dev();
    let mut below = (!is_device && size > 0 && is_written_in_place(device))
        .then(|| Below::watch(device))
        .transpose()?;
    let (kind, changes) = match &below {
        _ if is_device => (VolumeKind::Device, ChangesBy::DirtyExtents),
        Some(_) => (VolumeKind::Bind, ChangesBy::WrittenExtents),
        None => (VolumeKind::Bind, ChangesBy::ChangeTimes),
    };
    let volume = VolumeSpec {
        id: VolumeId(0),
        name: "directory".to_owned(),
        kind,
        source_path: PathBuf::from(from),
        containers: Vec::new(),
        size: Bytes(size),
        holes: Bytes(0),
        entries: 0,
        device_nodes: 0,
        unreadable: 0,
        changes,
        unused: Default::default(),
    };
    let mut watch = is_device
        .then(|| Watch::start(Path::new("/"), from))
        .transpose()?;
    let mut sender = Sender::new(plan(), path, FleetKey(key("fleet")?), options());
    let mut state: Option<TreeState> = None;
    for epoch in 1.. {
        if let (Some(watch), Some(state)) = (&mut watch, &mut state) {
            File::open(from)?.sync_all()?;
            state.changed = Some(watch.swap().ranges);
        }
        let written = below.as_mut().and_then(|below| below.take(volume.id, from));
        if let Some(state) = &mut state {
            state.written = written;
        }
        let progress = Arc::default();
        let (sent, report) =
            sender.send_epoch(&volume, Epoch(epoch), false, state.as_ref(), &progress)?;
        state = Some(sent);
        let mut report = serde_json::to_value(&report)?;
        report["peak_memory_kib"] = peak_memory_kib().into();
        println!("{report}");
        if std::io::stdin().read_line(&mut String::new())? == 0 {
            break;
        }
    }
    Ok(())
}

/// Highest resident memory of this process so far.
fn peak_memory_kib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Bytes that one core hashes and seals in a second, in records of a megabyte.
fn measure() -> Outcome {
    let mut record = vec![1; 1 << 20];
    let key = FleetKey([1; 32]);
    let blake3 = speed(record.len(), |_| {
        for block in record.chunks(64 << 10) {
            std::hint::black_box(sign::signature(&key, block));
        }
    });
    let sealer = Sealer::new(&plan(), &DataKey([2; 32]), &[3; 32]);
    let seal = speed(record.len(), |number| {
        record.truncate(1 << 20);
        let header = Header {
            kind: FrameKind::Sealed,
            barrier: false,
            length: 0,
            volume: VolumeId(0),
            epoch: Epoch(1),
            number,
            first_block: 0,
        };
        sealer.seal(&header, &mut record);
    });
    println!("{}", serde_json::json!({ "blake3": blake3, "seal": seal }));
    Ok(())
}

fn speed(bytes: usize, mut work: impl FnMut(u64)) -> f64 {
    let start = Instant::now();
    let mut rounds = 0;
    while start.elapsed() < Duration::from_secs(1) {
        work(rounds);
        rounds += 1;
    }
    (rounds * bytes as u64) as f64 / start.elapsed().as_secs_f64()
}
