//! Who is lent: a pure choice among devices, explained candidate by candidate.
//!
//! Rule (DESIGN §6): live and not degraded → matching or similar configuration → enough free capacity
//! for these actions on this quantity → most trusted → least loaded; ties by id, so that the same input
//! always gives the same answer.
//! Invariant: if each choice is booked before the next one, no device is lent beyond its capacity.

use crate::model::action::{Action, Actions};
use crate::model::fleet::{
    CandidateExplanation, Configuration, Device, DeviceVerdict, Role, TwinNeeds, Utilisation,
};
use crate::model::ids::DeviceId;
use crate::model::units::{Bytes, UnixMillis};
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// What a device is needed for.
#[derive(Clone, Debug)]
pub struct Need {
    /// Who needs it.
    pub source: DeviceId,
    /// What the source is made of.
    pub configuration: Configuration,
    /// As what.
    pub role: Role,
    /// Delegated actions; empty for a target.
    pub actions: Actions,
    /// Data expected.
    pub quantity: Bytes,
    /// For a target: what the twins need.
    pub twins: TwinNeeds,
    /// Devices that must not be chosen, with the reason.
    pub exclude: BTreeMap<DeviceId, String>,
}

/// The limits a choice keeps.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// A device whose last heartbeat is older is not live.
    pub live_within: Duration,
    /// A migration should be over by then: a device's capacity is the CPU time it has free until then.
    pub horizon: Duration,
    /// Pairings a device may have at a time.
    pub max_pairings: u32,
}

/// What an action has cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Data.
    pub bytes: u64,
    /// CPU time, nanoseconds of one core.
    pub core_nanos: u64,
}

/// What is taken of a device: by one pairing, or by all that are open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// CPU time, nanoseconds of one core.
    pub core_nanos: u64,
    /// Room for data.
    pub storage: Bytes,
}

/// A device as the choice sees it.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The device; its `lent` counts the open pairings.
    pub device: Device,
    /// What its open pairings take.
    pub taken: Demand,
    /// What each action has cost on it, over all completed duties.
    pub history: BTreeMap<Action, Cost>,
}

/// The storm guard's answer to a device that wants to evacuate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub enum Admission {
    /// It may.
    Admitted,
    /// It may not now.
    Full {
        /// Devices that evacuate.
        evacuating: Vec<DeviceId>,
        /// How many may.
        most: usize,
        /// How many devices are live.
        live: usize,
    },
}

impl fmt::Display for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Admitted => f.write_str("admitted"),
            Self::Full {
                evacuating,
                most,
                live,
            } => {
                let names: Vec<&str> = evacuating.iter().map(DeviceId::as_str).collect();
                write!(
                    f,
                    "storm guard: {most} of {live} live devices may evacuate at a time, and {} {}",
                    names.join(", "),
                    if names.len() == 1 { "does" } else { "do" }
                )
            }
        }
    }
}

/// The storm guard: whether one more device may evacuate beside `evacuating`, when at most `max_percent` of
/// `live` devices may. One always may, or no small fleet could help itself.
#[must_use]
pub fn admit(max_percent: f64, live: usize, evacuating: Vec<DeviceId>) -> Admission {
    let most = ((live as f64 * max_percent / 100.0).floor() as usize).max(1);
    if evacuating.len() < most {
        return Admission::Admitted;
    }
    Admission::Full {
        evacuating,
        most,
        live,
    }
}

/// The outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Who is lent, and what that takes; none if nobody fits.
    pub chosen: Option<(DeviceId, Demand)>,
    /// Candidate by candidate, the chosen one first, then by id.
    pub explanation: Vec<CandidateExplanation>,
}

/// CPU time per byte assumed for an action that no device of this kind has done yet, in thousandths of
/// a nanosecond of one core. About twice what AES-256-GCM at 2.3 GB/s with BLAKE3 at 9 GB/s, and one
/// copy through a socket, were measured to take; too high is the safe side.
fn assumed_milli_nanos_per_byte(action: Action) -> u64 {
    match action {
        Action::Encrypt => 1_100,
        Action::Transfer => 800,
        Action::Serve => 2_000,
    }
}

/// How a candidate's configuration compares with the source's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Likeness {
    Similar,
    Matching,
}

fn likeness(source: &Configuration, other: &Configuration) -> Result<Likeness, String> {
    if source.architecture != other.architecture {
        return Err(format!(
            "configuration: architecture {}, the source has {}",
            other.architecture, source.architecture
        ));
    }
    // More is as good; less than half is another kind of machine.
    if other.cores.saturating_mul(2) < source.cores {
        return Err(format!(
            "configuration: {} cores, less than half of the source's {}",
            other.cores, source.cores
        ));
    }
    if other.memory.0.saturating_mul(2) < source.memory.0 {
        return Err(format!(
            "configuration: {} of memory, less than half of the source's {}",
            other.memory, source.memory
        ));
    }
    // Memory that firmware or a kernel of another build keeps for itself is no difference: 5 %.
    let same_memory = source.memory.0.abs_diff(other.memory.0) <= source.memory.0 / 20;
    let same = source.cores == other.cores
        && same_memory
        && source.storage == other.storage
        && source.nics.len() == other.nics.len()
        && source.kernel == other.kernel;
    Ok(if same {
        Likeness::Matching
    } else {
        Likeness::Similar
    })
}

/// Expected CPU time per byte of `action` on `candidate`, in thousandths of a nanosecond, and where the
/// figure comes from: its own history, that of similar devices, or the assumption.
fn cost_per_byte(
    action: Action,
    candidate: &Candidate,
    candidates: &[Candidate],
) -> (u64, &'static str) {
    let per_byte = |cost: Cost| {
        (cost.bytes > 0).then(|| {
            let milli = u128::from(cost.core_nanos) * 1000 / u128::from(cost.bytes);
            u64::try_from(milli).unwrap_or(u64::MAX)
        })
    };
    let own = candidate.history.get(&action).copied().and_then(per_byte);
    if let Some(own) = own {
        return (own, "its own history");
    }
    let Some(configuration) = &candidate.device.configuration else {
        return (assumed_milli_nanos_per_byte(action), "assumption");
    };
    let mut of_similar = Cost::default();
    for other in candidates {
        let similar = other
            .device
            .configuration
            .as_ref()
            .is_some_and(|other| likeness(configuration, other).is_ok());
        if let (true, Some(cost)) = (similar, other.history.get(&action)) {
            of_similar.bytes = of_similar.bytes.saturating_add(cost.bytes);
            of_similar.core_nanos = of_similar.core_nanos.saturating_add(cost.core_nanos);
        }
    }
    match per_byte(of_similar) {
        Some(cost) => (cost, "history of similar devices"),
        None => (assumed_milli_nanos_per_byte(action), "assumption"),
    }
}

fn demand(need: &Need, candidate: &Candidate, candidates: &[Candidate]) -> (Demand, String) {
    let mut core_nanos: u128 = 0;
    let mut basis = Vec::new();
    for action in &need.actions.0 {
        let (milli_nanos, from) = cost_per_byte(*action, candidate, candidates);
        core_nanos += u128::from(need.quantity.0) * u128::from(milli_nanos) / 1000;
        basis.push(format!(
            "{action} {}.{:03} ns/B by {from}",
            milli_nanos / 1000,
            milli_nanos % 1000
        ));
    }
    // A target keeps the data; a paired device that transfers spools it, and one that serves has a copy.
    let spools = need.role == Role::Target || need.actions.contains(Action::Transfer);
    let copies = u64::from(spools) + u64::from(need.actions.contains(Action::Serve));
    let demand = Demand {
        core_nanos: u64::try_from(core_nanos).unwrap_or(u64::MAX),
        storage: Bytes(need.quantity.0.saturating_mul(copies)),
    };
    (demand, basis.join(", "))
}

/// The CPU time a device has free until the horizon. What its open pairings burn now is in its
/// utilisation too: counted twice, on the safe side.
fn free_core_nanos(configuration: &Configuration, now: &Utilisation, rules: &Rules) -> u64 {
    let idle = (100.0 - now.cpu_percent).clamp(0.0, 100.0) / 100.0;
    let idle = if idle.is_nan() { 0.0 } else { idle };
    (f64::from(configuration.cores) * rules.horizon.as_secs_f64() * 1e9 * idle) as u64
}

struct Fit {
    demand: Demand,
    likeness: Likeness,
    load: u32,
    reasons: Vec<String>,
}

fn consider(
    need: &Need,
    candidate: &Candidate,
    candidates: &[Candidate],
    rules: &Rules,
    now: UnixMillis,
) -> Result<Fit, Vec<String>> {
    let device = &candidate.device;
    if device.id == need.source {
        return Err(vec!["it is the source".to_owned()]);
    }
    if let Some(reason) = need.exclude.get(&device.id) {
        return Err(vec![reason.clone()]);
    }
    let (Some(configuration), Some(utilisation), Some(seen)) =
        (&device.configuration, &device.utilisation, device.last_seen)
    else {
        return Err(vec!["no heartbeat yet".to_owned()]);
    };
    if now.since(seen) > rules.live_within {
        return Err(vec![format!(
            "not live: last heartbeat {} ago",
            crate::model::units::human_duration(now.since(seen))
        )]);
    }
    if utilisation.verdict == DeviceVerdict::Degraded {
        return Err(vec!["degraded".to_owned()]);
    }
    let likeness = likeness(&need.configuration, configuration).map_err(|reason| vec![reason])?;
    let (demand, basis) = demand(need, candidate, candidates);

    let mut against = Vec::new();
    if device.lent >= rules.max_pairings {
        against.push(format!(
            "lent {} times already, the most it may be",
            device.lent
        ));
    }
    let free = free_core_nanos(configuration, utilisation, rules);
    let wanted = candidate.taken.core_nanos.saturating_add(demand.core_nanos);
    if demand.core_nanos > 0 && wanted > free {
        against.push(format!(
            "CPU: {:.1} core seconds free, {:.1} lent, {:.1} needed ({basis})",
            free as f64 / 1e9,
            candidate.taken.core_nanos as f64 / 1e9,
            demand.core_nanos as f64 / 1e9,
        ));
    }
    let room = candidate.taken.storage.0.saturating_add(demand.storage.0);
    if demand.storage.0 > 0 && room > utilisation.storage_free.0 {
        against.push(format!(
            "storage: {} free, {} lent, {} needed",
            utilisation.storage_free, candidate.taken.storage, demand.storage
        ));
    }
    if need.role == Role::Target {
        against.extend(unfit_for_twins(&need.twins, utilisation));
    }
    if !against.is_empty() {
        return Err(against);
    }

    let load = utilisation.cpu_percent.clamp(0.0, 100.0) as u32 + 100 * device.lent;
    let mut reasons = vec![match likeness {
        Likeness::Matching => "matching configuration".to_owned(),
        Likeness::Similar => "similar configuration".to_owned(),
    }];
    if demand.core_nanos > 0 {
        reasons.push(format!(
            "{:.1} of {:.1} free core seconds needed ({basis})",
            demand.core_nanos as f64 / 1e9,
            free.saturating_sub(candidate.taken.core_nanos) as f64 / 1e9,
        ));
    }
    if demand.storage.0 > 0 {
        reasons.push(format!(
            "{} of {} free storage needed",
            demand.storage, utilisation.storage_free
        ));
    }
    reasons.push(format!("trust {}", device.trust));
    reasons.push(format!(
        "load {:.0} % CPU, lent {} times",
        utilisation.cpu_percent, device.lent
    ));
    Ok(Fit {
        demand,
        likeness,
        load,
        reasons,
    })
}

fn unfit_for_twins(twins: &TwinNeeds, target: &Utilisation) -> Vec<String> {
    let mut against: Vec<String> = twins
        .ports
        .intersection(&target.ports_taken)
        .map(|port| format!("port {port} is taken"))
        .collect();
    if twins.ipv4 && !target.ipv4 {
        against.push("no IPv4 address".to_owned());
    }
    if twins.ipv6 && !target.ipv6 {
        against.push("no IPv6 address".to_owned());
    }
    if twins.memory.0 > target.memory_free.0 {
        against.push(format!(
            "memory: {} free, {} needed",
            target.memory_free, twins.memory
        ));
    }
    against
}

/// Chooses.
#[must_use]
pub fn choose(need: &Need, candidates: &[Candidate], rules: &Rules, now: UnixMillis) -> Choice {
    let mut fits = Vec::new();
    let mut refused = Vec::new();
    for candidate in candidates {
        match consider(need, candidate, candidates, rules, now) {
            Ok(fit) => fits.push((candidate, fit)),
            Err(reasons) => refused.push(CandidateExplanation {
                device: candidate.device.id.clone(),
                accepted: false,
                reasons,
            }),
        }
    }
    fits.sort_by_key(|(candidate, fit)| {
        (
            Reverse(fit.likeness),
            Reverse(candidate.device.trust.level()),
            fit.load,
            candidate.device.id.clone(),
        )
    });
    refused.sort_by(|a, b| a.device.cmp(&b.device));
    let chosen = fits
        .first()
        .map(|(candidate, fit)| (candidate.device.id.clone(), fit.demand));
    let mut explanation: Vec<CandidateExplanation> = fits
        .into_iter()
        .map(|(candidate, fit)| CandidateExplanation {
            device: candidate.device.id.clone(),
            accepted: true,
            reasons: fit.reasons,
        })
        .collect();
    explanation.extend(refused);
    Choice {
        chosen,
        explanation,
    }
}
