//! Moves a directory between two addresses with the agent's own data plane, without a fleet: what
//! `cargo xtask bench transfer` measures.
//!
//! ```text
//! MOVE_KEY=secret move_directory receive 10.0.0.2:7000 /into
//! MOVE_KEY=secret move_directory send 10.0.0.2:7000 /from [io-uring|threads]
//! ```
//! Both ends derive every key from `MOVE_KEY`. The receiver serves until it is killed; the sender
//! prints its report as one line of JSON.

use lifeboat::model::ids::{Epoch, PlanId, VolumeId};
use lifeboat::model::units::Bytes;
use lifeboat::model::volume::{VolumeKind, VolumeSpec};
use lifeboat::transfer::{
    DataKey, DataPath, DataServer, EngineChoice, Hop, LinkKey, Options, ReceivePlan, ReceiveVolume,
    Sender,
};
use lifeboat::volume::FleetKey;
use std::error::Error;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let secret =
        std::env::var("MOVE_KEY").map_err(|_| "set MOVE_KEY to the same text at both ends")?;
    let key = |purpose: &str| {
        blake3::derive_key(
            &format!("move_directory example {purpose}"),
            secret.as_bytes(),
        )
    };
    match arguments[..] {
        ["receive", addr, into] => receive(addr.parse()?, Path::new(into), key),
        ["send", addr, from] => send(addr.parse()?, Path::new(from), EngineChoice::Auto, key),
        ["send", addr, from, "threads"] => {
            send(addr.parse()?, Path::new(from), EngineChoice::Threads, key)
        }
        ["send", addr, from, "io-uring"] => {
            send(addr.parse()?, Path::new(from), EngineChoice::IoUring, key)
        }
        _ => Err("use: receive ADDR DIRECTORY | send ADDR DIRECTORY [io-uring|threads]".into()),
    }
}

fn plan() -> PlanId {
    PlanId::from("move-directory")
}

fn receive(addr: SocketAddr, into: &Path, key: impl Fn(&str) -> [u8; 32]) -> Outcome {
    let options = Options {
        engine: match std::env::var("MOVE_ENGINE").as_deref() {
            Ok("threads") => EngineChoice::Threads,
            _ => EngineChoice::Auto,
        },
        ..Options::default()
    };
    let server = DataServer::bind(addr, options)?;
    server.admit_receive(ReceivePlan {
        plan: plan(),
        link_key: LinkKey(key("link")),
        data_key: DataKey(key("data")),
        fleet_key: FleetKey(key("fleet")),
        volumes: vec![ReceiveVolume {
            id: VolumeId(0),
            name: "directory".to_owned(),
            destination: into.to_owned(),
        }],
    });
    println!("{}", server.addr());
    loop {
        std::thread::park();
    }
}

fn send(
    addr: SocketAddr,
    from: &Path,
    engine: EngineChoice,
    key: impl Fn(&str) -> [u8; 32],
) -> Outcome {
    let path = DataPath::Direct {
        target: Hop {
            addr,
            link_key: LinkKey(key("link")),
        },
        data_key: DataKey(key("data")),
    };
    let options = Options {
        engine,
        ..Options::default()
    };
    let volume = VolumeSpec {
        id: VolumeId(0),
        name: "directory".to_owned(),
        kind: VolumeKind::Bind,
        source_path: PathBuf::from(from),
        containers: Vec::new(),
        size: Bytes(0),
        entries: 0,
    };
    let mut sender = Sender::new(plan(), path, FleetKey(key("fleet")), options);
    let (_, report) =
        sender.send_epoch(&volume, Epoch(1), false, None, &std::sync::Arc::default())?;
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}
