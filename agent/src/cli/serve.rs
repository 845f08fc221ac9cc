//! `lifeboat serve`: volumes of a plan on its target, before their data is there.

use super::daemon::ask;
use super::{Context, Failure, Outcome};
use crate::migration::access::{How, ServeRequest, Served};
use crate::model::ids::PlanId;
use crate::model::units::Bytes;
use crate::serve::NbdAddress;
use anyhow::Context as _;
use std::path::PathBuf;
use std::time::Duration;

/// Serves a volume of a plan on its target before its data is there; without arguments lists what is served.
///
/// What is read is fetched from the source then and there; the rest comes behind. The source owns the volume
/// until the switch: what is written here stays in this copy, which ends with the plan.
#[derive(clap::Args)]
pub struct Arguments {
    /// Plan, as `lifeboat status` on the source names it.
    #[arg(requires = "volume")]
    plan: Option<String>,
    /// Volume, as `lifeboat plan` names it.
    volume: Option<String>,
    #[command(flatten)]
    way: Way,
    /// Nobody may write.
    #[arg(long, requires = "volume")]
    read_only: bool,
    /// A recorded access trace (`lifeboat record --trace`): what it found hottest is fetched first.
    #[arg(long, value_name = "FILE", requires = "volume")]
    trace: Option<PathBuf>,
    /// Seconds for which a read of what is not here waits for the source before it fails.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    patience: u64,
    /// Fetch only what is read.
    #[arg(long, requires = "volume")]
    no_fill: bool,
}

#[derive(clap::Args)]
#[group(required = false, multiple = false)]
struct Way {
    /// As NBD exports, one for each file: `unix:/PATH` or a loopback address (`127.0.0.1:10809`).
    #[arg(long, value_name = "ADDRESS", requires = "volume")]
    nbd: Option<NbdAddress>,
    /// As files and directories, mounted at this empty directory.
    #[arg(long, value_name = "DIRECTORY", requires = "volume")]
    mount: Option<PathBuf>,
    /// As a block device (/dev/ublkbN), the only file of the volume or this one.
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, requires = "volume")]
    ublk: Option<Option<String>>,
    /// Stop serving it, and remove the copy with what was written to it.
    #[arg(long, requires = "volume")]
    end: bool,
}

/// Serves, ends or lists.
pub fn run(arguments: &Arguments, context: &Context) -> Outcome {
    let (Some(plan), Some(volume)) = (&arguments.plan, &arguments.volume) else {
        let served = list(context)?;
        return print(&served, context);
    };
    let plan = PlanId(plan.clone());
    if !plan.is_plain() {
        return Err(Failure::Failed(anyhow::anyhow!(
            "`{plan}` is no plan id; `lifeboat status` on the source lists them"
        )));
    }
    if arguments.way.end {
        let served = list(context)?;
        let known = served
            .iter()
            .find(|served| served.plan == plan && served.name == *volume)
            .with_context(|| {
                format!(
                    "volume {volume} of plan {plan} is not served; `lifeboat serve` lists what is"
                )
            })?;
        let path = format!("/v1/plans/{plan}/volumes/{}/end", known.volume);
        let () = ask(&context.socket, async |agent| {
            agent.post(&path, &()).await.map_err(Failure::of)
        })?;
        if context.json {
            println!("{}", serde_json::json!({ "ended": volume }));
        } else {
            println!("volume {volume} is not served any more; the copy is removed");
        }
        return Ok(());
    }
    let how = match &arguments.way {
        Way {
            nbd: Some(address), ..
        } => How::Nbd(address.clone()),
        // The agent mounts it, and has another working directory.
        Way {
            mount: Some(directory),
            ..
        } => How::Mount(std::path::absolute(directory)?),
        Way {
            ublk: Some(file), ..
        } => How::Ublk(file.clone()),
        _ => {
            eprintln!("error: say how: --mount DIRECTORY, --nbd ADDRESS, --ublk[=FILE], or --end");
            return Err(Failure::Told(2));
        }
    };
    let request = ServeRequest {
        volume: volume.clone(),
        how,
        read_only: arguments.read_only,
        patience: Duration::from_secs(arguments.patience),
        trace: match &arguments.trace {
            // The agent reads it, and has another working directory.
            Some(path) => Some(std::path::absolute(path)?),
            None => None,
        },
        fill: !arguments.no_fill,
    };
    let path = format!("/v1/plans/{plan}/serve");
    let served: Served = ask(&context.socket, async |agent| {
        agent.post(&path, &request).await.map_err(Failure::of)
    })?;
    print(&[served], context)
}

fn list(context: &Context) -> Result<Vec<Served>, Failure> {
    ask(&context.socket, async |agent| {
        agent.get("/v1/served").await.map_err(Failure::of)
    })
}

fn print(served: &[Served], context: &Context) -> Outcome {
    if context.json {
        println!("{}", serde_json::to_string_pretty(served)?);
        return Ok(());
    }
    if served.is_empty() {
        println!("nothing is served");
    }
    for one in served {
        let figures = &one.figures;
        println!(
            "{} of plan {}: {}{}, {} of {} not here yet{}; fetched {} blocks on demand, {} ahead",
            one.name,
            one.plan,
            one.at,
            if one.read_only { ", read-only" } else { "" },
            Bytes(figures.absent),
            Bytes(figures.bytes),
            if figures.detached {
                " (whole; the source is let go of)"
            } else {
                ""
            },
            figures.on_demand,
            figures.ahead,
        );
        if figures.from_paired > 0 {
            println!(
                "  {} from the paired device, {} from the source itself",
                Bytes(figures.from_paired),
                Bytes(figures.from_source)
            );
        }
        if figures.refused > 0 {
            println!(
                "  {} blocks did not come: gone on the source since, or unreadable there",
                figures.refused
            );
        }
    }
    Ok(())
}
