//! A second link between two lab hosts, with a round trip and a rate: packets go through two TUN devices and
//! this process, which holds each of them back. It stands in for netem, which not every kernel has.
//!
//! Invariant: a packet that finds the queue full is dropped, as a router would. Non-goals: jitter, reordering.

use std::collections::VecDeque;
use std::fs::File;
use std::net::Ipv4Addr;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};
use tun_rs::{DeviceBuilder, SyncDevice};

use super::host::Host;

/// Packets as large as on a network of servers, so that this process is not the limit.
const MTU: u16 = 9_000;

/// Packets that may be on the way in one direction.
const QUEUED: usize = 8_192;

/// The link; packets flow as long as this process lives, and the devices end with the hosts.
pub(crate) struct FarLink {
    /// Bytes a second in each direction.
    pub(crate) rate: f64,
    /// Address of the second host on it.
    pub(crate) there: Ipv4Addr,
}

impl FarLink {
    /// Links `a` and `b`.
    ///
    /// # Errors
    /// The kernel has no TUN devices.
    pub(crate) fn between(a: &Host, b: &Host, round_trip: Duration, rate: f64) -> Result<Self> {
        let (here, there) = (Ipv4Addr::new(10, 78, 0, 1), Ipv4Addr::new(10, 78, 0, 2));
        let (a, b) = (Arc::new(device(a, here)?), Arc::new(device(b, there)?));
        carry(a.clone(), b.clone(), round_trip / 2, rate);
        carry(b, a, round_trip / 2, rate);
        Ok(Self { rate, there })
    }
}

/// A TUN device in the network namespace of a host.
fn device(host: &Host, address: Ipv4Addr) -> Result<SyncDevice> {
    let namespace = File::open(format!("/proc/{}/ns/net", host.pid))?;
    let make = move || -> Result<SyncDevice> {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        let device = DeviceBuilder::new()
            .name("far0")
            .ipv4(address, 24, None)
            .mtu(MTU);
        device
            .build_sync()
            .context("cannot make a TUN device; does the kernel have CONFIG_TUN?")
    };
    // Of a thread of its own: it stays in that namespace.
    let made = thread::spawn(make).join();
    made.map_err(|_| anyhow!("the thread that makes a TUN device panicked"))?
}

/// Packets with the time at which they arrive.
type Queue = (SyncSender<(Instant, Vec<u8>)>, Receiver<(Instant, Vec<u8>)>);

fn carry(from: Arc<SyncDevice>, to: Arc<SyncDevice>, delay: Duration, rate: f64) {
    let (queue, queued): Queue = sync_channel(QUEUED);
    // Packets are not allocated one by one, or that would be the limit.
    let spare = Arc::new(Mutex::new(VecDeque::<Vec<u8>>::new()));
    let back = spare.clone();
    thread::spawn(move || {
        let mut free = Instant::now();
        loop {
            let taken = spare
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front();
            let mut packet = taken.unwrap_or_default();
            packet.resize(usize::from(MTU), 0);
            let Ok(length) = from.recv(&mut packet) else {
                return;
            };
            packet.truncate(length);
            free = free.max(Instant::now()) + Duration::from_secs_f64(length as f64 / rate);
            let _ = queue.try_send((free + delay, packet));
        }
    });
    thread::spawn(move || {
        for (at, packet) in queued {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if to.send(&packet).is_err() {
                return;
            }
            back.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push_back(packet);
        }
    });
}
