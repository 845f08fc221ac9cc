//! The listening side of the data plane: one door for targets and paired devices.
//!
//! Invariants: a peer is served only for a plan that is admitted and whose link key it proves; slow
//! or hostile peers are cut off and never hold up others, nor take their places; the number of connections
//! is capped.

use super::Options;
use super::connection::{self, Class};
use super::engine::engine;
use super::fetch::{ProvidePlan, Provision};
use super::hello;
use super::queue::lock;
use super::receive::{ReceivePlan, ReceiveProgress, Reception};
use super::relay::{Relay, RelayPlan};
use super::seal::LinkKey;
use super::spent::Spent;
use crate::model::fleet::Role;
use crate::model::ids::{PlanId, VolumeId};
use crate::model::places::Places;
use crate::volume::BlockMap;
use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use zeroize::Zeroizing;

/// The data address cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for data on {addr}: {source}; stop what uses it, or set `fleet.data_port`")]
pub struct BindError {
    /// The address.
    pub addr: SocketAddr,
    /// Why not.
    pub source: io::Error,
}

/// Which of a plan's connections are let in: each kind has a key of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Door {
    /// Those that bring its volumes.
    Receive,
    /// Those that let this device, as paired device, do a part of the work.
    Relay,
    /// Those over which a device in this role fetches its blocks from the source.
    Provide(Role),
    /// Those over which the target fetches a volume's blocks from the paired device.
    StandIn(VolumeId),
}

/// What a plan may do here.
#[derive(Clone)]
enum Admission {
    Receive(Arc<Reception>),
    Relay(Arc<Relay>),
    Provide(Arc<Provision>),
}

impl Admission {
    fn link_key(&self) -> LinkKey {
        match self {
            Self::Receive(reception) => reception.link_key(),
            Self::Relay(relay) => relay.link_key(),
            Self::Provide(provision) => provision.link_key(),
        }
    }

    fn dismiss(&self) {
        match self {
            Self::Receive(reception) => reception.dismiss(),
            Self::Relay(relay) => relay.dismiss(),
            Self::Provide(provision) => provision.dismiss(),
        }
    }
}

struct Shared {
    options: Options,
    map: Option<Arc<BlockMap>>,
    plans: Mutex<HashMap<PlanId, HashMap<Door, Admission>>>,
    /// Connections whose peer knows the key of its plan.
    open: AtomicUsize,
    /// Connections that have not greeted yet.
    strangers: Mutex<Places<Arc<TcpStream>>>,
    over: AtomicBool,
}

/// Connections that have not greeted yet, at a time. One greets within a round trip.
const STRANGERS_CAP: usize = 64;

/// Listens for data connections until it is dropped.
pub struct DataServer {
    addr: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl DataServer {
    /// Listens on `addr`; port 0 takes any free one. Blocks in `map` are not asked for again.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub fn bind(
        addr: SocketAddr,
        options: Options,
        map: Option<Arc<BlockMap>>,
    ) -> Result<Self, BindError> {
        let failed = |source| BindError { addr, source };
        let listener = TcpListener::bind(addr).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let shared = Arc::new(Shared {
            options,
            map,
            plans: Mutex::default(),
            open: AtomicUsize::new(0),
            strangers: Mutex::new(Places::new(STRANGERS_CAP)),
            over: AtomicBool::new(false),
        });
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("lifeboat-data".to_owned())
            .spawn(move || accept(&listener, &for_thread))
            .map_err(failed)?;
        Ok(Self {
            addr: bound,
            shared,
            thread: Some(thread),
        })
    }

    /// The address it listens on.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Lets a source (or its paired device) bring a plan's volumes here. Replaces such an admission of the
    /// same plan.
    pub fn admit_receive(&self, plan: ReceivePlan) {
        let name = plan.plan.clone();
        let (options, map) = (self.shared.options.clone(), self.shared.map.clone());
        let reception = Reception::new(plan, options, map);
        self.admit(name, Door::Receive, Admission::Receive(Arc::new(reception)));
    }

    /// Lets a source use this device as its paired device for a plan. Replaces such an admission of the
    /// same plan.
    pub fn admit_relay(&self, plan: RelayPlan) {
        let name = plan.plan.clone();
        let relay = Relay::new(plan, self.shared.options.clone());
        self.admit(name, Door::Relay, Admission::Relay(Arc::new(relay)));
    }

    /// Lets a device fetch blocks of a plan's volumes from here on demand. Replaces an admission of the same plan by
    /// the same door.
    pub fn admit_provide(&self, door: Door, plan: ProvidePlan) {
        let name = plan.plan.clone();
        let provision = Provision::new(plan, self.shared.options.clone());
        self.admit(name, door, Admission::Provide(Arc::new(provision)));
    }

    fn admit(&self, plan: PlanId, door: Door, admission: Admission) {
        let old = {
            let mut plans = lock(&self.shared.plans);
            plans.entry(plan).or_default().insert(door, admission)
        };
        if let Some(old) = old {
            old.dismiss();
        }
    }

    fn admission(&self, plan: &PlanId, door: Door) -> Option<Admission> {
        lock(&self.shared.plans).get(plan)?.get(&door).cloned()
    }

    /// Whether these connections of a plan are let in.
    #[must_use]
    pub fn admits(&self, plan: &PlanId, door: Door) -> bool {
        self.admission(plan, door).is_some()
    }

    /// What giving out blocks of an admitted plan by this door has taken here; nothing for any other plan.
    #[must_use]
    pub fn spent(&self, plan: &PlanId, door: Door) -> Spent {
        match self.admission(plan, door) {
            Some(Admission::Provide(provision)) => provision.spent(),
            _ => Spent::default(),
        }
    }

    /// How far each volume of an admitted plan has come here; none for an unknown or relayed plan.
    #[must_use]
    pub fn progress(&self, plan: &PlanId) -> Option<Vec<ReceiveProgress>> {
        match self.admission(plan, Door::Receive) {
            Some(Admission::Receive(reception)) => Some(reception.progress()),
            _ => None,
        }
    }

    /// Knows nothing any more of what was received of a volume, whose place is used otherwise from here on; waits
    /// until nothing more is written there. A later epoch looks at what it finds.
    pub fn forget(&self, plan: &PlanId, volume: VolumeId) {
        if let Some(Admission::Receive(reception)) = self.admission(plan, Door::Receive) {
            reception.forget(volume);
        }
    }

    /// Ends a plan's connections and admits no more. What was received stays where it is.
    pub fn dismiss(&self, plan: &PlanId) {
        let admissions = lock(&self.shared.plans).remove(plan);
        for admission in admissions.into_iter().flat_map(HashMap::into_values) {
            admission.dismiss();
        }
    }

    /// Ends a plan's connections of one kind and admits no more of them.
    pub fn close(&self, plan: &PlanId, door: Door) {
        let admission = {
            let mut plans = lock(&self.shared.plans);
            plans.get_mut(plan).and_then(|doors| doors.remove(&door))
        };
        if let Some(admission) = admission {
            admission.dismiss();
        }
    }
}

impl Drop for DataServer {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        let plans = std::mem::take(&mut *lock(&self.shared.plans));
        for admission in plans.values().flat_map(HashMap::values) {
            admission.dismiss();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the data listener panicked; this is a bug");
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    while !shared.over.load(Ordering::Acquire) {
        // Looks at `over` between polls; a signal only means looking earlier.
        let _ = poll(
            &mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)],
            PollTimeout::from(200_u8),
        );
        match listener.accept() {
            Ok((socket, peer)) => welcome(shared, socket, peer),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!("cannot accept a data connection: {error}");
                // Out of descriptors, most likely: give others time to close theirs.
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

fn welcome(shared: &Arc<Shared>, socket: TcpStream, peer: SocketAddr) {
    let socket = Arc::new(socket);
    let (place, sent_away) = lock(&shared.strangers).take(peer.ip(), Arc::clone(&socket));
    if let Some(oldest) = sent_away {
        tracing::warn!(
            "data connection: {STRANGERS_CAP} have not greeted; the oldest is closed for {peer}"
        );
        // It may be closed already.
        let _ = oldest.shutdown(Shutdown::Both);
    }
    let for_thread = Arc::clone(shared);
    let spawned = std::thread::Builder::new()
        .name("lifeboat-peer".to_owned())
        .spawn(move || {
            if let Err(error) = serve(&for_thread, &socket, place) {
                tracing::warn!(%peer, "data connection: {error}");
            }
        });
    if let Err(error) = spawned {
        lock(&shared.strangers).leave(place);
        tracing::error!(%peer, "cannot start a thread for a data connection: {error}");
    }
}

/// A data connection could not be served.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Hello(#[from] hello::HelloError),
    #[error("cannot set up its socket: {0}")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Engine(#[from] super::engine::NoEngine),
    #[error("refused: {0} are open already")]
    Full(usize),
}

fn serve(shared: &Arc<Shared>, socket: &Arc<TcpStream>, place: u64) -> Result<(), ServeError> {
    let options = &shared.options;
    let greeted = greet(shared, socket);
    lock(&shared.strangers).leave(place);
    let (admission, key) = greeted?;
    let _open = Open::one_of(shared)?;
    let (receiver, transmitter) =
        connection::split(socket, &key, false, options.engine, options.patience)?;
    match admission {
        Admission::Receive(reception) => reception.serve(receiver, transmitter, socket),
        Admission::Relay(relay) => relay.serve(receiver, transmitter, socket),
        Admission::Provide(provision) => provision.serve(receiver, transmitter, socket),
    }
    Ok(())
}

fn greet(
    shared: &Shared,
    socket: &TcpStream,
) -> Result<(Admission, Zeroizing<[u8; 32]>), ServeError> {
    let options = &shared.options;
    socket.set_nonblocking(false)?;
    connection::tune(socket, options.patience)?;
    connection::mark(socket, Class::Background)?;
    let mut greeter = engine(options.engine)?;
    let find = |plan: &PlanId| {
        let plans = lock(&shared.plans);
        let doors = plans.get(plan).into_iter().flat_map(HashMap::values);
        let doors = doors.map(|admission| (admission.link_key(), admission.clone()));
        doors.collect()
    };
    let agreed = hello::answer(greeter.as_mut(), socket.as_fd(), find, options.patience)?;
    Ok(agreed)
}

/// One of the places for connections that greeted.
struct Open<'a>(&'a Shared);

impl<'a> Open<'a> {
    fn one_of(shared: &'a Shared) -> Result<Self, ServeError> {
        let open = Self(shared);
        let cap = shared.options.connections_cap;
        if shared.open.fetch_add(1, Ordering::AcqRel) >= cap {
            return Err(ServeError::Full(cap));
        }
        Ok(open)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
    }
}
