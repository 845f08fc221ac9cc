//! What a plan did, told from its journal: a timeline with figures. Pure.

use super::active::Given;
use super::events::{ContainerFence, SourceEvent, VolumeRound};
use super::journal::Entry;
use crate::model::control::StoodIn;
use crate::model::ids::{DeviceId, PlanId};
use crate::model::plan::{MigrationEvent, Plan, VolumeRelease};
use crate::model::units::{Bytes, UnixMillis, human_duration, utc};
use crate::transfer::Spent;
use crate::volume::Unreadable;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// One line of the timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// When.
    pub at: UnixMillis,
    /// Since the plan was made.
    pub after: Duration,
    /// What happened, with figures.
    pub text: String,
}

/// How a plan ended, or that it has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Still before the release.
    Running,
    /// Released; the target is being brought to run the twins.
    Switching,
    /// All twins are ready.
    Completed,
    /// Rolled back.
    Aborted,
}

/// A plan's report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Plan.
    pub plan: PlanId,
    /// State.
    pub state: State,
    /// Why it was aborted.
    pub reason: Option<String>,
    /// Timeline.
    pub timeline: Vec<Moment>,
    /// Plain bytes of all changesets.
    pub changesets: Bytes,
    /// Bytes on the wire from the source.
    pub wire: Bytes,
    /// Processor time of the source's agent while it sent; of a plan that switched first, that of the threads that gave
    /// the data out, listed and proved it, since the agent was last started.
    pub source_cpu: Duration,
    /// The same for each GiB that it read; none when it read nothing.
    pub source_cpu_per_gib: Option<Duration>,
    /// Plain bytes a second over all rounds.
    pub rate: Bytes,
    /// From the first freeze until the last twin was ready.
    pub interruption: Option<Duration>,
    /// The part of the interruption in which twins were started, by the target's clock.
    pub start_up: Option<Duration>,
    /// What was released, with roots.
    pub released: Vec<VolumeRelease>,
    /// What could not be carried over: skipped entries, settings the target's runtime lacks.
    pub exceptions: Vec<String>,
    /// What the source's disk did not give up when each volume was sent last, by the volume's name.
    #[serde(default)]
    pub unreadable: BTreeMap<String, Vec<Unreadable>>,
}

/// The report of the journal's entries; none when it does not start with a plan.
#[must_use]
pub fn report(entries: &[Entry<SourceEvent>]) -> Option<Report> {
    let Entry {
        at: start,
        event: SourceEvent::Planned { plan, .. },
    } = entries.first()?
    else {
        return None;
    };
    let mut report = Report {
        plan: plan.id.clone(),
        state: State::Running,
        reason: None,
        timeline: Vec::new(),
        changesets: Bytes(0),
        wire: Bytes(0),
        source_cpu: Duration::ZERO,
        source_cpu_per_gib: None,
        rate: Bytes(0),
        interruption: None,
        start_up: None,
        released: Vec::new(),
        exceptions: Vec::new(),
        unreadable: BTreeMap::new(),
    };
    let (mut moving, mut read) = (Duration::ZERO, Bytes(0));
    // Each look at a volume tells all of it.
    let mut left_out: BTreeMap<&str, &[String]> = BTreeMap::new();
    for entry in entries {
        if let SourceEvent::Round {
            volumes, duration, ..
        }
        | SourceEvent::Final { volumes, duration } = &entry.event
        {
            moving += *duration;
            for volume in volumes {
                report.changesets += volume.changeset;
                report.wire += volume.wire;
                report.source_cpu += volume.cpu;
                read += volume.read;
                if volume.unreadable.is_empty() {
                    report.unreadable.remove(&volume.name);
                } else {
                    let lost = volume.unreadable.clone();
                    report.unreadable.insert(volume.name.clone(), lost);
                }
                left_out.insert(&volume.name, &volume.exceptions);
            }
        }
        match &entry.event {
            SourceEvent::Listed {
                exceptions, cpu, ..
            } => {
                report.source_cpu += *cpu;
                left_out.extend(exceptions.iter().map(|(name, told)| (&**name, &**told)));
            }
            SourceEvent::Whole { given, .. } | SourceEvent::Returned { given, .. } => {
                report.source_cpu += given.cpu;
                report.wire += given.wire;
                read += given.read;
            }
            SourceEvent::Released { release } => {
                report.state = State::Switching;
                if let Ok(release) =
                    serde_json::from_str::<crate::model::plan::Release>(&release.body)
                {
                    report.released = release.volumes;
                }
            }
            SourceEvent::Twins {
                twins,
                interruption,
                start_up,
            } => {
                report.interruption = Some(*interruption);
                report.start_up = Some(*start_up);
                for twin in twins {
                    report.exceptions.extend(
                        twin.not_carried
                            .iter()
                            .map(|text| format!("{}: {text}", twin.container)),
                    );
                }
            }
            SourceEvent::Completed => report.state = State::Completed,
            SourceEvent::Aborted { reason } => {
                report.state = State::Aborted;
                report.reason = Some(reason.clone());
            }
            _ => {}
        }
        let after = entry.at.since(*start);
        report
            .timeline
            .extend(tell(&entry.event).into_iter().map(|text| Moment {
                at: entry.at,
                after,
                text,
            }));
    }
    for (volume, told) in left_out {
        let told = told.iter().map(|text| format!("{volume}: {text}"));
        report.exceptions.extend(told);
    }
    report.exceptions.sort();
    report.exceptions.dedup();
    if !moving.is_zero() {
        report.rate = Bytes((report.changesets.0 as f64 / moving.as_secs_f64()) as u64);
    }
    report.source_cpu_per_gib = per_gib(report.source_cpu, read);
    Some(report)
}

/// Time for each GiB.
fn per_gib(time: Duration, bytes: Bytes) -> Option<Duration> {
    const GIB: f64 = (1_u64 << 30) as f64;
    (bytes.0 > 0).then(|| time.mul_f64(GIB / bytes.0 as f64))
}

pub(super) fn tell(event: &SourceEvent) -> Vec<String> {
    match event {
        SourceEvent::Planned { plan, .. } => tell_plan(plan),
        SourceEvent::TargetChosen { target } => {
            let mut lines = vec![format!("target {} at {}", target.device, target.address)];
            lines.extend(target.explanation.iter().map(|line| format!("  {line}")));
            lines
        }
        SourceEvent::NotPaired { reason } => {
            vec![format!("from now on nothing is delegated: {reason}")]
        }
        SourceEvent::Paired {
            paired,
            delegated,
            kept,
        } => {
            let mut lines = vec![format!(
                "paired device {} at {}: token authenticated, authorised for {delegated}",
                paired.device, paired.address
            )];
            lines.extend(paired.explanation.iter().map(|line| format!("  {line}")));
            lines.extend(kept.iter().map(|line| format!("  {line}")));
            lines
        }
        SourceEvent::ServesOn => vec![
            "the paired device carries nothing more, and answers the target with what comes behind the twins"
                .into(),
        ],
        SourceEvent::StoodIn { device, did, given } => tell_stood_in(device, *did, given),
        SourceEvent::Prepared {
            images_present,
            layers_present,
            ..
        } => vec![format!(
            "target is ready to receive; it holds {} of the images already, and {} layers of others",
            images_present.len(),
            layers_present
        )],
        SourceEvent::Round {
            round,
            volumes,
            duration,
        } => {
            let mut lines = vec![format!(
                "round {round}: {}",
                tell_volumes(volumes, *duration)
            )];
            lines.extend(volumes.iter().map(tell_volume));
            lines
        }
        SourceEvent::Chosen { choice } => vec![format!("  {}", choice.why)],
        SourceEvent::ApprovalAwaited { roles, until } => vec![format!(
            "waits until {} for approval by: {}",
            utc(*until),
            roles.join(", ")
        )],
        SourceEvent::LossFound { volumes } => vec![format!(
            "waits for an operator to accept a loss: {}",
            super::loss::tell(volumes)
        )],
        SourceEvent::Approved { approval } => {
            vec![format!("approved as {} by {}", approval.role, approval.by)]
        }
        SourceEvent::NotApproved { roles } => vec![format!(
            "not approved in time by {}: the policy says to proceed",
            roles.join(", ")
        )],
        SourceEvent::StormGuard { reason } => vec![format!("waits: {reason}")],
        SourceEvent::GoesOn { plan } => {
            let mut lines = vec!["prepared in advance, and evacuates from here".into()];
            lines.extend(tell_plan(plan));
            lines
        }
        SourceEvent::Limited { limit: None } => vec!["no longer limited".into()],
        SourceEvent::Limited { limit: Some(limit) } => vec![format!("limited to {limit}/s")],
        SourceEvent::Resumed => vec!["resumed: the agent here was started anew".into()],
        SourceEvent::GivenUp { .. } => vec!["rolling back".into()],
        SourceEvent::Fencing => vec!["restart policies off".into()],
        SourceEvent::Fenced { fences } => {
            let tell = |fence: &ContainerFence| {
                format!("  {} can no longer be started here", fence.container)
            };
            fences.iter().map(tell).collect()
        }
        SourceEvent::Pausing { .. } => vec!["pause: freezing the workload".into()],
        SourceEvent::Paused { duration } => {
            vec![format!("workload frozen in {}", human_duration(*duration))]
        }
        SourceEvent::Freezing { devices } => {
            let tell = |device: &std::path::PathBuf| {
                format!("freezing what is mounted from {}", device.display())
            };
            devices.iter().map(tell).collect()
        }
        SourceEvent::Final { volumes, duration } => {
            let mut lines = vec![format!(
                "final changeset: {}; roots agree",
                tell_volumes(volumes, *duration)
            )];
            lines.extend(volumes.iter().map(tell_volume));
            lines
        }
        SourceEvent::Listed {
            volumes,
            duration,
            cpu,
            ..
        } => {
            let mut lines = vec![format!(
                "switched first: source and target agree on the lists, in {}; CPU of this device {}; the data comes behind the twins",
                human_duration(*duration),
                human_duration(*cpu)
            )];
            lines.extend(
                volumes
                    .iter()
                    .map(|volume| format!("  {} epoch {}", volume.name, volume.epoch)),
            );
            lines
        }
        SourceEvent::Whole {
            roots,
            bytes,
            held,
            given,
        } => vec![
            format!(
                "all {bytes} are on the target, in {} volume(s), {held} of it since before the switch; roots agree",
                roots.len()
            ),
            tell_given(given),
        ],
        SourceEvent::AskedBack { reason } => vec![format!(
            "the target is asked to give everything back ({reason})"
        )],
        SourceEvent::NotGivenBack { why } => vec![format!("it is not given back: {why}")],
        SourceEvent::Returning { reason, .. } => vec![format!(
            "the target gives everything back ({reason}); its twins have ended"
        )],
        SourceEvent::Returned { changes, given, .. } => vec![
            format!(
                "{changes} change(s) of the twins are written over the data here, which this device owns again"
            ),
            tell_given(given),
        ],
        SourceEvent::Released { .. } => {
            vec!["released: signed and durable, the source owns nothing from here".into()]
        }
        SourceEvent::TargetOwns { owns } => vec![format!(
            "{} owns {} volume(s) from the next epoch",
            owns.target,
            owns.volumes.len()
        )],
        SourceEvent::SourceStopped { containers } => vec![format!(
            "source fenced: {} container(s) killed",
            containers.len()
        )],
        SourceEvent::Forwarding { ports } => ports
            .iter()
            .map(|port| format!("forwarding {} → {}", port.listen, port.to))
            .collect(),
        SourceEvent::Twins {
            twins,
            interruption,
            start_up,
        } => {
            let mut lines: Vec<String> = twins
                .iter()
                .map(|twin| match &twin.ready {
                    Some(how) => format!(
                        "twin {} ready {} after its start ({how})",
                        twin.container,
                        human_duration(twin.after)
                    ),
                    None => format!(
                        "twin {} NOT ready: {}",
                        twin.container,
                        twin.error.as_deref().unwrap_or("no reason given")
                    ),
                })
                .collect();
            lines.push(format!(
                "interruption {}, of it {} the twins' own start-up: pause {}",
                human_duration(*interruption),
                human_duration(*start_up),
                human_duration(interruption.saturating_sub(*start_up)),
            ));
            lines
        }
        SourceEvent::Completed => vec!["completed".into()],
        SourceEvent::TargetFreed { left: None } => {
            vec!["the target has removed what it had made".into()]
        }
        SourceEvent::TargetFreed { left: Some(left) } => {
            vec![format!(
                "the target could not remove all that it had made: {left}"
            )]
        }
        SourceEvent::Aborted { reason } => {
            vec![format!("aborted, the source's containers run on: {reason}")]
        }
    }
}

fn tell_plan(plan: &Plan) -> Vec<String> {
    let names: Vec<&str> = plan
        .containers
        .iter()
        .map(|planned| planned.container.name.as_str())
        .collect();
    let mut lines = vec![format!(
        "plan {} for {}: {}",
        plan.id,
        plan.source,
        names.join(", ")
    )];
    match &plan.event {
        MigrationEvent::Operator => lines.push("  an operator asked for it".into()),
        MigrationEvent::Degraded { evidence } => {
            lines.extend(evidence.iter().map(|line| format!("  degraded: {line}")));
        }
    }
    lines.extend(plan.edges.iter().map(|edge| {
        format!(
            "  {} → {}{} {}, {} connection(s){}",
            edge.child,
            edge.parent,
            edge.service(),
            format!("{:?}", edge.learnt).to_lowercase(),
            edge.connections,
            match (edge.bytes_to_parent, edge.bytes_to_child) {
                (Some(up), Some(down)) => format!(", {up} up, {down} down"),
                _ => String::new(),
            }
        )
    }));
    let steps: Vec<String> = plan
        .order
        .iter()
        .map(|step| {
            step.containers
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" + ")
        })
        .collect();
    lines.push(format!("  start order: {}", steps.join(" → ")));
    lines.push(format!("  delegated: {}", plan.delegated));
    let limit = plan.guards.limit.iter();
    lines.extend(limit.map(|limit| format!("  limited to {limit}/s")));
    lines.extend(plan.notes.iter().map(|note| format!("  note: {note}")));
    lines
}

fn tell_volumes(volumes: &[VolumeRound], duration: Duration) -> String {
    let changeset: Bytes = volumes.iter().map(|volume| volume.changeset).sum();
    let wire: Bytes = volumes.iter().map(|volume| volume.wire).sum();
    let rate = Bytes((changeset.0 as f64 / duration.as_secs_f64().max(1e-3)) as u64);
    let read: Bytes = volumes.iter().map(|volume| volume.read).sum();
    let cpu: Duration = volumes.iter().map(|volume| volume.cpu).sum();
    let each = tell_each(cpu, read);
    format!(
        "changeset {changeset}, {wire} on the wire, {} ({rate}/s); CPU of this device {}{each}",
        human_duration(duration),
        human_duration(cpu),
    )
}

fn tell_each(cpu: Duration, read: Bytes) -> String {
    per_gib(cpu, read).map_or_else(String::new, |each| {
        format!(", {} per GiB read", human_duration(each))
    })
}

fn tell_given(given: &Spent) -> String {
    format!(
        "  given out and proven here: {} on the wire; CPU of this device {}{}",
        given.wire,
        human_duration(given.cpu),
        tell_each(given.cpu, given.read),
    )
}

fn tell_stood_in(device: &DeviceId, did: Option<StoodIn>, given: &Given) -> Vec<String> {
    let did = did.map_or_else(
        || format!("paired device {device} answered the target; how much it does not say"),
        |StoodIn { answered, fetched }| {
            format!(
                "paired device {device} answered the target with {answered} and fetched {fetched} from here for that"
            )
        },
    );
    let here = format!(
        "  given out here: {} read for the paired device (CPU {}), {} for the target itself (CPU {})",
        given.paired.read,
        human_duration(given.paired.cpu),
        given.target.read,
        human_duration(given.target.cpu)
    );
    vec![did, here]
}

fn tell_volume(volume: &VolumeRound) -> String {
    let held = match volume.held_blocks {
        0 => String::new(),
        blocks => format!(", {blocks} blocks the target held already"),
    };
    let packed = match volume.packed_from {
        Bytes(0) => String::new(),
        from => format!(", {from} packed to {}", volume.packed_to),
    };
    let unused = match volume.unused {
        Bytes(0) => String::new(),
        bytes => format!(", {bytes} left out that its file system does not use"),
    };
    let lost = match volume.unreadable.iter().map(|lost| lost.length).sum() {
        0 => String::new(),
        bytes => format!(", {} NOT READ", Bytes(bytes)),
    };
    let lost = match volume
        .unreadable
        .iter()
        .filter(|lost| lost.entry.is_some())
        .count()
    {
        0 => lost,
        entries => format!("{lost}, {entries} entries or directories NOT READ"),
    };
    format!(
        "  {} epoch {}: {} of {} entries, {}{held}{packed}{unused}{lost}, root {}…",
        volume.name,
        volume.epoch,
        volume.changed_entries,
        volume.entries,
        volume.changeset,
        &volume.root.to_string()[..16],
    )
}
