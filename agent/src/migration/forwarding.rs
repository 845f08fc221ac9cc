//! Published ports of what left: carried on to the twins until what left comes back.
//!
//! Invariants: what is forwarded follows from the journals and from no clock. A plan that brings containers here names,
//! as it takes over, the plans with which they had left; until it is dismissed, their ports are not forwarded. They are
//! let go of before its source hears of that, which forwards to here only then, and taken again only when that source,
//! which forwards nothing of it any more, dismisses it: no two devices ever forward to each other. Non-goal: carrying
//! (`serve`).

use super::active::locked;
use super::delegator::{Delegator, plan_ids, plan_of};
use super::events::{Forwarding, SourceEvent, TargetEvent};
use super::journal::{self, Entry, JournalError, plan_directory};
use super::target::Target;
use crate::model::fleet::PeerAddress;
use crate::model::ids::{DeviceId, PlanId};
use crate::model::plan::Plan;
use crate::serve::Forwarder;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Between two tries for a port that somebody else holds.
const RETRY: Duration = Duration::from_secs(5);
/// Longest wait for a port that is just being taken, in looks at it.
const LOOKS: u32 = 10;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

/// Plans with which containers had left, and which of their ports end with the containers' return.
pub type Back = BTreeMap<PlanId, BTreeSet<SocketAddr>>;

/// The ports that this device forwards.
#[derive(Default)]
pub struct Forwards(Mutex<Ports>);

#[derive(Default)]
struct Ports {
    /// Ports of plans that left.
    left: BTreeMap<(PlanId, SocketAddr), Left>,
    /// What came back, by the plan with which it did.
    back: BTreeMap<PlanId, Back>,
}

struct Left {
    device: DeviceId,
    to: SocketAddr,
    carrier: Option<Carrier>,
}

/// A port that is forwarded, or will be as soon as whoever holds it lets go.
struct Carrier {
    listens: Arc<AtomicBool>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Carrier {
    fn start(listen: SocketAddr, to: SocketAddr) -> Self {
        let (listens, stop) = (Arc::new(AtomicBool::new(false)), CancellationToken::new());
        let task = tokio::spawn(carry(listen, to, listens.clone(), stop.clone()));
        Self {
            listens,
            stop,
            task,
        }
    }

    /// Lets go of the port, which is free when this returns.
    async fn end(self) {
        self.stop.cancel();
        // It cannot panic, and nobody aborts it.
        let _ = self.task.await;
    }
}

async fn carry(
    listen: SocketAddr,
    to: SocketAddr,
    listens: Arc<AtomicBool>,
    stop: CancellationToken,
) {
    let mut said = false;
    loop {
        match stop.run_until_cancelled(Forwarder::start(listen, to)).await {
            None => return,
            Some(Ok(forwarder)) => {
                listens.store(true, Ordering::Release);
                stop.cancelled().await;
                return forwarder.stop().await;
            }
            Some(Err(error)) if !said => tracing::error!("not forwarded yet: {error}"),
            Some(Err(_)) => {}
        }
        said = true;
        if stop
            .run_until_cancelled(tokio::time::sleep(RETRY))
            .await
            .is_none()
        {
            return;
        }
    }
}

impl Ports {
    /// Starts what is to be forwarded; what is not any more, for the caller to end.
    fn settle(&mut self) -> Vec<Carrier> {
        let mut over = Vec::new();
        for ((plan, listen), left) in &mut self.left {
            let ports = |back: &Back| back.get(plan).is_some_and(|ports| ports.contains(listen));
            if self.back.values().any(ports) {
                over.extend(left.carrier.take());
            } else if left.carrier.is_none() {
                left.carrier = Some(Carrier::start(*listen, left.to));
            }
        }
        over
    }

    /// With which plan, and to which device, what meets this address is forwarded; the one that is not `but`, if there
    /// are more.
    fn holder(&self, address: SocketAddr, but: &DeviceId) -> (Option<(PlanId, DeviceId)>, bool) {
        let (mut holder, mut awaited) = (None, false);
        for ((plan, listen), left) in &self.left {
            let Some(carrier) = left.carrier.as_ref().filter(|_| meets(*listen, address)) else {
                continue;
            };
            if !carrier.listens.load(Ordering::Acquire) {
                awaited = true;
            } else if holder.is_none() || &left.device != but {
                holder = Some((plan.clone(), left.device.clone()));
            }
        }
        (holder, awaited)
    }
}

impl Forwards {
    /// What earlier lives of the agent left: nothing is forwarded yet.
    #[must_use]
    pub fn load(state: &Path) -> Self {
        let mut ports = Ports::default();
        for id in plan_ids(state, "target") {
            // Also of a damaged one: what came back must not be forwarded for it. One that cannot be read is told of when
            // the agent takes up its plans.
            let entries = journal::legible(&plan_directory(state, "target", &id));
            let entries = entries.unwrap_or_default();
            ports
                .back
                .extend(came_back(&entries).map(|back| (id, back)));
        }
        Self(Mutex::new(ports))
    }

    /// Forwards ports of a plan, each as soon as it can be had.
    pub(super) async fn forward(&self, plan: &PlanId, device: &DeviceId, ports: &[Forwarding]) {
        self.change(|all| {
            for port in ports {
                let left = Left {
                    device: device.clone(),
                    to: port.to,
                    carrier: None,
                };
                all.left.entry((plan.clone(), port.listen)).or_insert(left);
            }
        })
        .await;
    }

    /// Lets go of the ports of a plan of which nothing is away any more; they are free when this returns.
    pub(super) async fn end(&self, plan: &PlanId) {
        let mut ended = BTreeMap::new();
        self.change(|all| {
            let of_plan = all.left.extract_if(.., |(left, _), _| left == plan);
            ended = of_plan.collect();
        })
        .await;
        for carrier in ended.into_values().filter_map(|left| left.carrier) {
            carrier.end().await;
        }
    }

    /// Lets go of the ports of what came back with a plan, which are free when this returns.
    pub(super) async fn let_go(&self, plan: &PlanId, back: Back) {
        self.change(|all| all.back.insert(plan.clone(), back)).await;
    }

    /// Forwards again what had come back with a plan and was given back to its source.
    pub(super) async fn take_again(&self, plan: &PlanId) {
        self.change(|all| all.back.remove(plan)).await;
    }

    async fn change<T>(&self, change: impl FnOnce(&mut Ports) -> T) {
        let over = {
            let mut ports = locked(&self.0);
            change(&mut ports);
            ports.settle()
        };
        for carrier in over {
            carrier.end().await;
        }
    }

    /// With which plan, and to which device, what holds this address is forwarded; preferably to another one than
    /// `but`.
    pub(super) async fn holder(
        &self,
        address: SocketAddr,
        but: &DeviceId,
    ) -> Option<(PlanId, DeviceId)> {
        for _ in 0..LOOKS {
            let (holder, awaited) = locked(&self.0).holder(address, but);
            if holder.is_some() || !awaited {
                return holder;
            }
            tokio::time::sleep(LOOK).await;
        }
        None
    }
}

impl Delegator {
    /// Forwards the plan's published ports; one that cannot be had is tried again in the background.
    pub(super) async fn forward(&self, plan: &Plan, target: &PeerAddress) -> Vec<Forwarding> {
        let ports = forwardings(plan, target.addr.ip());
        let forwards = &self.parts().forwards;
        forwards.forward(&plan.id, &target.device, &ports).await;
        ports
    }
}

impl Target {
    /// What comes back here with a plan.
    ///
    /// # Errors
    /// A journal cannot be read: a port that is not let go of would be forwarded in a circle.
    pub(super) fn comes_back(&self, plan: &Plan) -> Result<Back, JournalError> {
        let state = &self.parts.state;
        let mut back = Back::new();
        for id in plan_ids(state, "source") {
            let entries = journal::legible(&plan_directory(state, "source", &id))?;
            if let Some(ports) = comes_back(&entries, plan) {
                back.insert(id, ports);
            }
        }
        Ok(back)
    }
}

/// Where a plan's ports are forwarded to.
#[must_use]
fn forwardings(plan: &Plan, target: IpAddr) -> Vec<Forwarding> {
    plan.containers
        .iter()
        .flat_map(|planned| planned.container.published.iter())
        .filter(|port| !port.udp && !port.host_ip.is_loopback())
        .map(|port| Forwarding {
            listen: (port.host_ip, port.host_port).into(),
            to: (target, port.host_port).into(),
        })
        .collect()
}

/// Whether a port that is forwarded, for IPv6 for that alone, and another one cannot be listened on side by side.
fn meets(forwarded: SocketAddr, other: SocketAddr) -> bool {
    let any = forwarded.ip().is_unspecified() || other.ip().is_unspecified();
    let hears = any && !(forwarded.is_ipv6() && other.is_ipv4());
    forwarded.port() == other.port() && (hears || forwarded.ip() == other.ip())
}

/// The ports that end with the return of `plan`, of the plan of this journal, with which containers of it had left; none
/// when nothing of it had.
fn comes_back(entries: &[Entry<SourceEvent>], plan: &Plan) -> Option<BTreeSet<SocketAddr>> {
    let has = |is: fn(&SourceEvent) -> bool| entries.iter().any(|entry| is(&entry.event));
    if !has(|event| matches!(event, SourceEvent::Released { .. }))
        || has(|event| matches!(event, SourceEvent::Returned { .. }))
    {
        return None;
    }
    let left = plan_of(entries)?;
    let target = left.target.as_ref().map(|target| &target.device);
    let published = plan.containers.iter();
    let published = published.flat_map(|planned| &planned.container.published);
    let published: Vec<SocketAddr> = published
        .filter(|port| !port.udp)
        .map(|port| (port.host_ip, port.host_port).into())
        .collect();
    // By number: what is forwarded to one of its source would come from there again, whatever the address here. What is
    // forwarded elsewhere is refused when it is offered; what was taken since is the twin's, which cannot start without.
    let from_there = target == Some(&plan.source);
    let ends = |listen: &SocketAddr| {
        let mut published = published.iter();
        published.any(|port| from_there && port.port() == listen.port() || meets(*listen, *port))
    };
    let ports: BTreeSet<SocketAddr> = forwardings(&left, IpAddr::from([0, 0, 0, 0]))
        .into_iter()
        .map(|port| port.listen)
        .filter(ends)
        .collect();
    let mut names = plan.containers.iter().map(|one| &one.container.name);
    let same = names.any(|name| left.container(name).is_some());
    (same || !ports.is_empty()).then_some(ports)
}

/// What the plan of this journal brought back here; none when it has not taken over, or was dismissed since.
fn came_back(entries: &[Entry<TargetEvent>]) -> Option<Back> {
    let mut came = None;
    for entry in entries {
        match &entry.event {
            TargetEvent::Owns { back, .. } => came = Some(back.clone()),
            TargetEvent::Dismissed { .. } => came = None,
            _ => {}
        }
    }
    came
}

#[cfg(test)]
mod tests {
    use super::super::target_stage::{Stage, TWIN, owns, plan, plan_id, source};
    use super::*;
    use crate::model::container::PublishedPort;
    use crate::model::units::UnixMillis;
    use crate::model::volume::VolumeKind;
    use crate::transfer::Spent;
    use std::net::TcpListener;

    /// An address that nobody holds now.
    fn free() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    }

    fn port(listen: SocketAddr) -> [Forwarding; 1] {
        let to = "127.0.0.1:1".parse().unwrap();
        [Forwarding { listen, to }]
    }

    fn back(plan: &str, listen: SocketAddr) -> Back {
        Back::from([(plan.into(), BTreeSet::from([listen]))])
    }

    async fn held_for(forwards: &Forwards, listen: SocketAddr) -> Option<String> {
        let holder = forwards.holder(listen, &"nobody".into()).await;
        let held = TcpListener::bind(listen).is_err();
        assert_eq!(held, holder.is_some(), "{holder:?}");
        holder.map(|(plan, _)| plan.to_string())
    }

    /// A plan of the twin, which publishes these ports of any address.
    fn publishing(ports: &[u16]) -> Plan {
        let mut plan = plan(VolumeKind::Bind, "/var/x".into());
        plan.containers[0].container.published = ports
            .iter()
            .map(|port| PublishedPort {
                host_ip: IpAddr::from([0, 0, 0, 0]),
                host_port: *port,
                container_port: 80,
                udp: false,
            })
            .collect();
        plan
    }

    fn journal(events: Vec<SourceEvent>) -> Vec<Entry<SourceEvent>> {
        let at = UnixMillis(1);
        let entries = events.into_iter();
        entries.map(|event| Entry { at, event }).collect()
    }

    #[tokio::test]
    async fn a_port_is_let_go_of_while_what_left_is_back_and_taken_again_when_it_is_given_back() {
        let (listen, forwards) = (free(), Forwards::default());
        let (first, third) = (PlanId::from("p1-1"), PlanId::from("p3-3"));
        let there = PlanId::from("p2-2");
        forwards
            .forward(&first, &"target".into(), &port(listen))
            .await;
        assert_eq!(held_for(&forwards, listen).await.as_deref(), Some("p1-1"));
        forwards.let_go(&there, back("p0-0", listen)).await;
        assert_eq!(held_for(&forwards, listen).await.as_deref(), Some("p1-1"));
        forwards.let_go(&there, back("p1-1", listen)).await;
        assert_eq!(held_for(&forwards, listen).await, None);
        forwards
            .forward(&first, &"target".into(), &port(listen))
            .await;
        assert_eq!(held_for(&forwards, listen).await, None);

        // It leaves again, for another device, and comes back from there.
        forwards
            .forward(&third, &"other".into(), &port(listen))
            .await;
        assert_eq!(held_for(&forwards, listen).await.as_deref(), Some("p3-3"));
        forwards.end(&third).await;
        assert_eq!(held_for(&forwards, listen).await, None);

        forwards.take_again(&there).await;
        assert_eq!(held_for(&forwards, listen).await.as_deref(), Some("p1-1"));
        forwards.end(&first).await;
        assert_eq!(held_for(&forwards, listen).await, None);
    }

    #[tokio::test]
    async fn a_port_that_somebody_holds_is_not_taken_once_it_is_to_be_forwarded_no_more() {
        let (listen, forwards) = (free(), Forwards::default());
        let somebody = TcpListener::bind(listen).unwrap();
        let plan = PlanId::from("p1-1");
        forwards
            .forward(&plan, &"target".into(), &port(listen))
            .await;
        assert_eq!(forwards.holder(listen, &"target".into()).await, None);
        forwards.end(&plan).await;
        drop(somebody);
        assert_eq!(held_for(&forwards, listen).await, None);
    }

    #[test]
    fn ports_end_that_are_forwarded_to_where_their_containers_come_from_or_that_the_twins_themselves_need()
     {
        let TargetEvent::Owns { release, .. } = owns() else {
            panic!("it is one")
        };
        let released = SourceEvent::Released { release };
        let mut left = publishing(&[80, 443]);
        (left.id, left.source) = ("p0-0".into(), "target".into());
        left.target.as_mut().unwrap().device = source();
        let planned = |plan: &Plan| SourceEvent::Planned {
            plan: Box::new(plan.clone()),
            held: false,
        };
        let all = [planned(&left), released.clone(), SourceEvent::Completed];
        let ports = |events: &[SourceEvent], plan: &Plan| {
            let ports = comes_back(&journal(events.to_vec()), plan)?;
            let ports = ports.iter().map(SocketAddr::port);
            Some(ports.collect::<Vec<_>>())
        };
        let comes = publishing(&[443, 8080]);
        assert_eq!(ports(&all, &comes), Some(vec![443]));
        assert_eq!(ports(&all[..1], &comes), None, "it never left");
        assert_eq!(ports(&all[..2], &comes), Some(vec![443]));
        let mut again = all.to_vec();
        again.push(SourceEvent::Returned {
            epochs: BTreeMap::new(),
            changes: 0,
            given: Spent::default(),
        });
        assert_eq!(ports(&again, &comes), None, "it was given back before");
        assert_eq!(ports(&all, &publishing(&[])), Some(Vec::new()));

        let mut other = publishing(&[443]);
        other.containers[0].container.name = "other".into();
        assert_eq!(
            ports(&all, &other),
            Some(vec![443]),
            "it has its port there"
        );
        other.containers[0].container.published.clear();
        assert_eq!(ports(&all, &other), None);
        left.target.as_mut().unwrap().device = "third".into();
        let to_third = [planned(&left), released];
        assert_eq!(
            ports(&to_third, &comes),
            Some(vec![443]),
            "nobody else gets it"
        );
        let mut beside = publishing(&[443]);
        beside.containers[0].container.published[0].host_ip = IpAddr::from([127, 0, 0, 9]);
        left.containers[0].container.published[1].host_ip = IpAddr::from([127, 0, 0, 8]);
        let there = [planned(&left), to_third[1].clone()];
        assert_eq!(ports(&there, &beside), Some(Vec::new()));
        assert_eq!(ports(&to_third, &publishing(&[])), Some(Vec::new()));
    }

    #[test]
    fn the_journals_alone_tell_a_next_life_what_to_forward_wherever_the_last_one_died() {
        let (stage, listen) = (Stage::new(), free());
        let TargetEvent::Owns { release, owns, .. } = owns() else {
            panic!("it is one")
        };
        let steps = [
            (stage.accepted(VolumeKind::Bind, stage.path("place")), true),
            (
                TargetEvent::Owns {
                    release: release.clone(),
                    owns,
                    back: back("p0-0", listen),
                },
                false,
            ),
            (TargetEvent::Completed, false),
            (TargetEvent::GivenBack { word: release }, false),
            (
                TargetEvent::Dismissed {
                    reason: "given back".into(),
                    left: None,
                },
                true,
            ),
        ];
        let world = tokio::runtime::Runtime::new().unwrap();
        let is_forwarded = || {
            let forwards = Forwards::load(stage.directory.path());
            world.block_on(async {
                let plan = PlanId::from("p0-0");
                forwards.forward(&plan, &source(), &port(listen)).await;
                let held = held_for(&forwards, listen).await.is_some();
                forwards.end(&plan).await;
                held
            })
        };
        assert!(is_forwarded());
        for (event, forwarded) in steps {
            let what = format!("{event:?}");
            stage.write(vec![event]);
            assert_eq!(is_forwarded(), forwarded, "{what}");
        }
        // What a disk made of it.
        let file = stage.plan_directory().join("journal.jsonl");
        let text = std::fs::read_to_string(&file).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        std::fs::write(&file, format!("garbage\n{}\n", lines[1])).unwrap();
        assert!(!is_forwarded());
        std::fs::write(&file, lines[1]).unwrap();
        assert!(is_forwarded(), "it was torn before anybody heard of it");
    }

    #[test]
    fn a_port_that_is_forwarded_to_where_its_container_comes_from_counts_as_free_and_no_other() {
        let mut stage = Stage::new();
        stage.docker.up(&stage.world);
        let life = stage.live();
        let (listen, target) = (free(), life.target.clone());
        let mut comes = publishing(&[listen.port()]);
        life.runtime.block_on(async {
            let runtime = &target.parts.runtimes.all()[0];
            let check = async |plan: &Plan| {
                let checked = target.check_names(plan, runtime).await;
                checked.map_err(|error| error.to_string())
            };
            let somebody = TcpListener::bind(listen).unwrap();
            assert!(check(&comes).await.unwrap_err().contains("free it"));
            drop(somebody);
            check(&comes).await.unwrap();
            let forwards = &target.parts.forwards;
            forwards
                .forward(&"p0-0".into(), &source(), &port(listen))
                .await;
            check(&comes).await.unwrap();
            comes.source = "third".into();
            let error = check(&comes).await.unwrap_err();
            assert!(error.contains("forwarded from here to source"), "{error}");
        });
        life.kill();
    }

    #[test]
    fn what_earlier_lives_forwarded_is_forwarded_when_the_agent_has_taken_up_its_plans() {
        let owned = SourceEvent::SourceStopped {
            containers: vec![TWIN.into()],
        };
        for last in [SourceEvent::Completed, owned] {
            let stage = Stage::new();
            let port = free().port();
            stage.release(|left| {
                left.containers = publishing(&[port]).containers;
                left.target.as_mut().unwrap().address = "127.0.0.2:1".into();
            });
            let id = PlanId::from("p2-2");
            let directory = plan_directory(stage.directory.path(), "source", &id);
            let (mut journal, _) = journal::Journal::open(&directory).unwrap();
            journal.append(UnixMillis(1), last).unwrap();
            let life = stage.live();
            let delegator = Arc::new(Delegator::new(life.target.parts.clone()));
            life.runtime.block_on(async {
                delegator.resume().await;
                let listen = SocketAddr::from(([0, 0, 0, 0], port));
                let left = locked(&life.target.parts.forwards.0)
                    .left
                    .contains_key(&(id, listen));
                assert!(left, "an offer would find it free");
                assert_eq!(
                    held_for(&life.target.parts.forwards, listen)
                        .await
                        .as_deref(),
                    Some("p2-2")
                );
            });
            life.kill();
        }
    }

    #[test]
    fn what_was_given_back_is_forwarded_again_once_its_source_dismisses_it() {
        let stage = Stage::with("exited");
        let listen = free();
        let mut events = stage.filling();
        let TargetEvent::Owns {
            back: named,
            release: word,
            ..
        } = &mut events[1]
        else {
            panic!("it is one")
        };
        *named = back("p0-0", listen);
        let word = word.clone();
        events.push(TargetEvent::GivenBack { word });
        stage.write(events);
        let life = stage.idle();
        let forwards = &life.target.parts.forwards;
        life.runtime.block_on(async {
            forwards
                .forward(&"p0-0".into(), &source(), &port(listen))
                .await;
            assert_eq!(held_for(forwards, listen).await, None);
            let (source, plan) = (source(), plan_id());
            let dismissed = life.target.dismiss(&source, &plan, "given back");
            dismissed.await.unwrap();
            assert_eq!(held_for(forwards, listen).await.as_deref(), Some("p0-0"));
        });
        life.kill();
    }

    #[test]
    fn a_twin_that_came_back_is_here_whatever_the_clock_says() {
        let stage = Stage::with("created");
        stage.docker.held().containers.clear();
        let mut events = stage.owned();
        let mut wrong = Back::new();
        wrong.insert("p2-2".into(), BTreeSet::new());
        if let TargetEvent::Owns { back, .. } = &mut events[1] {
            *back = wrong;
        }
        stage.write(events);
        // Its release is the younger one by a clock that was put back since.
        stage.release(|_| {});
        let life = stage.idle();
        let (plan, _) = life.target.known(&source(), &plan_id()).unwrap();
        let name = TWIN.into();
        let left = life.target.has_left(&plan, &name);
        assert_eq!(life.runtime.block_on(left), Ok(false));
        life.kill();
    }
}
