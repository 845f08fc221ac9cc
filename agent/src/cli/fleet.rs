//! `lifeboat fleet init|invite|join|devices`.

use super::{Failure, Outcome};
use crate::fleet::ca::{Ca, init};
use crate::fleet::client::{CallError, CallFailure, ControlClient};
use crate::fleet::duplicator::DeviceStatus;
use crate::fleet::enrol::{JoinError, JoinToken, invite, join};
use crate::fleet::identity::Identity;
use crate::fleet::now;
use crate::fleet::sqlite::SqliteRegistry;
use crate::health::span;
use crate::model::ids::DeviceId;
use crate::model::units::human_duration;
use anyhow::Context;
use serde_json::json;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Make a fleet, and enrol devices in it.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make a fleet: its CA, its key and the duplicator's identity.
    Init {
        /// The duplicator's state directory.
        #[arg(long)]
        dir: PathBuf,
        /// IPv4 address and port at which devices will reach the duplicator.
        #[arg(long, value_parser = reachable)]
        advertise: SocketAddr,
    },
    /// Print a join token, good for one device, once. Runs on the duplicator.
    Invite {
        /// The duplicator's state directory.
        #[arg(long)]
        dir: PathBuf,
        /// Only for this device; needed to enrol a device anew.
        #[arg(long = "for")]
        device: Option<String>,
        /// How long it may be used.
        #[arg(long, default_value = "1h", value_parser = span)]
        expires: Duration,
    },
    /// Enrol this host. The join token is read from standard input, or from a file.
    Join {
        /// The agent's state directory.
        #[arg(long)]
        dir: PathBuf,
        /// The id this device shall have: a-z, 0-9 and `-`.
        #[arg(long)]
        device: String,
        /// IPv4 address and port at which others will reach this device's agent.
        #[arg(long, value_parser = reachable)]
        advertise: SocketAddr,
        /// File that holds the join token.
        #[arg(long)]
        token_file: Option<PathBuf>,
    },
    /// List the fleet's devices.
    Devices {
        /// State directory of this device, or of the duplicator.
        #[arg(long, default_value = "/var/lib/lifeboat")]
        dir: PathBuf,
    },
}

/// An address that others can be told; agents and duplicators listen on IPv4.
fn reachable(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.is_ipv4() && !address.ip().is_unspecified() && address.port() != 0 => {
            Ok(address)
        }
        _ => Err("must be this host's IPv4 address and a port, as others reach it, such as 192.0.2.10:7440".into()),
    }
}

/// Runs it.
///
/// # Errors
/// What failed, with the next step.
pub fn execute(args: Args, json: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match args.command {
            Command::Init { dir, advertise } => init_fleet(&dir, advertise, json),
            Command::Invite {
                dir,
                device,
                expires,
            } => invite_device(&dir, device.map(DeviceId), expires, json).await,
            Command::Join {
                dir,
                device,
                advertise,
                token_file,
            } => {
                join_fleet(
                    &dir,
                    DeviceId(device),
                    advertise,
                    token_file.as_deref(),
                    json,
                )
                .await
            }
            Command::Devices { dir } => devices(&dir, json).await,
        }
    })
}

fn init_fleet(dir: &Path, advertise: SocketAddr, json: bool) -> Outcome {
    init(dir, advertise)?;
    let ca = Ca::load(dir)?.fingerprint();
    if json {
        println!(
            "{}",
            json!({ "dir": dir, "advertise": advertise, "ca": ca })
        );
    } else {
        println!("Fleet made in {}; its CA is {ca}.", dir.display());
        println!(
            "Next: `lifeboat duplicator --config F` with `state: {}`, then `lifeboat fleet invite --dir {0}` for each device.",
            dir.display()
        );
    }
    Ok(())
}

async fn invite_device(
    dir: &Path,
    device: Option<DeviceId>,
    expires: Duration,
    json: bool,
) -> Outcome {
    // Before the registry, which would make a file wherever it is asked to.
    Ca::load(dir)?;
    let registry = SqliteRegistry::open(&SqliteRegistry::path(dir))?;
    let now = now();
    let token = invite(dir, &registry, device.clone(), expires, now).await?;
    if json {
        let expires_ms = u128::from(now.0) + expires.as_millis();
        println!(
            "{}",
            json!({ "token": token.to_string(), "for": device, "expires_ms": expires_ms })
        );
    } else {
        println!("{token}");
        eprintln!(
            "Good once, for {}, within {}. On the device: `lifeboat fleet join --dir DIR --device ID --advertise ADDR` and this line on its standard input.",
            device.map_or("any new device".to_owned(), |device| device.0),
            human_duration(expires)
        );
    }
    Ok(())
}

async fn join_fleet(
    dir: &Path,
    device: DeviceId,
    advertise: SocketAddr,
    token_file: Option<&Path>,
    json: bool,
) -> Outcome {
    let text = match token_file {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("token file {}", path.display()))?,
        None => {
            let mut text = String::new();
            std::io::stdin()
                .take(64 << 10)
                .read_to_string(&mut text)
                .context("standard input, where the join token is expected")?;
            text
        }
    };
    let token: JoinToken = text.parse()?;
    let identity = match join(dir, &token, device, advertise).await {
        Ok(identity) => identity,
        Err(JoinError::Call(error)) => return Err(unreachable_or_failed(error)),
        Err(error) => return Err(error.into()),
    };
    if json {
        println!(
            "{}",
            json!({ "device": identity.device(), "advertise": advertise,
                "duplicator": identity.duplicator(), "certificate": identity.fingerprint() })
        );
    } else {
        println!(
            "{} is enrolled; its identity is {}. Next: `lifeboat agent --config F`.",
            identity.device(),
            Identity::path(dir).display()
        );
    }
    Ok(())
}

async fn devices(dir: &Path, json: bool) -> Outcome {
    let identity = Identity::load(dir)?;
    let client = ControlClient::new(&identity)?;
    let statuses: Vec<DeviceStatus> = client
        .get(identity.duplicator(), "/v1/devices")
        .await
        .map_err(unreachable_or_failed)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&statuses)?);
    } else {
        print!("{}", table(&statuses));
    }
    Ok(())
}

fn unreachable_or_failed(error: CallError) -> Failure {
    match error.failure {
        CallFailure::Connect(_)
        | CallFailure::ConnectTimeout(_)
        | CallFailure::RequestTimeout(_)
        | CallFailure::Broken(_) => Failure::Unreachable(error.into()),
        _ => Failure::Failed(error.into()),
    }
}

fn table(statuses: &[DeviceStatus]) -> String {
    let mut rows = vec![
        [
            "DEVICE", "STATE", "SEEN", "VERDICT", "CORES", "MEMORY", "CPU", "MEM", "DISK", "FREE",
            "LENT", "TRUST", "ADDRESS", "KERNEL",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for status in statuses {
        let device = &status.device;
        let state = match (status.live, status.seen_ms_ago) {
            (true, _) => "live",
            (false, Some(_)) => "silent",
            (false, None) => "enrolled",
        };
        let seen = status.seen_ms_ago.map_or("never".to_owned(), |ms| {
            format!("{} ago", human_duration(Duration::from_millis(ms)))
        });
        let configuration = device.configuration.as_ref();
        let utilisation = device.utilisation.as_ref();
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        rows.push(vec![
            device.id.to_string(),
            state.to_owned(),
            seen,
            or_dash(utilisation.map(|now| now.verdict.to_string())),
            or_dash(configuration.map(|has| has.cores.to_string())),
            or_dash(configuration.map(|has| has.memory.to_string())),
            or_dash(utilisation.map(|now| format!("{:.0}%", now.cpu_percent))),
            or_dash(utilisation.map(|now| format!("{:.0}%", now.memory_percent))),
            or_dash(utilisation.map(|now| format!("{:.0}%", now.disk_percent))),
            or_dash(utilisation.map(|now| now.storage_free.to_string())),
            device.lent.to_string(),
            device.trust.to_string(),
            device.address.to_string(),
            or_dash(configuration.map(|has| has.kernel.clone())),
        ]);
    }
    let mut widths = vec![0; rows[0].len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let line: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}
