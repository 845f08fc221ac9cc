//! The way to each peer device, measured on connections that the agent has anyway (tcp(7), TCP_INFO).
//!
//! Invariant: what was measured counts for a minute and is absent afterwards; nothing is sent to measure.
//! One process is one agent, so what it measured is kept once for the process.

use super::host::HostReading;
use crate::model::metric::Per;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A dozen heartbeats.
const COUNTS: Duration = Duration::from_secs(60);
/// Enough for a minute of heartbeats and of a data link that is measured each second.
const MOST: usize = 128;
/// More peers than this do not happen; a bound all the same.
const MOST_PEERS: usize = 1_000;

const METRICS: [&str; 4] = [
    "peer.latency",
    "peer.jitter",
    "peer.loss",
    "peer.bandwidth_delay_product",
];

static LINKS: Mutex<BTreeMap<IpAddr, Link>> = Mutex::new(BTreeMap::new());

/// What is known of the way to one address.
#[derive(Default)]
struct Link {
    /// The device there, once a control call has proven it.
    device: Option<String>,
    measured: VecDeque<(Instant, Info)>,
}

/// What the kernel knows of a connection (include/uapi/linux/tcp.h, `struct tcp_info`).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Info {
    round_trip_us: u32,
    deviation_us: u32,
    least_round_trip_us: u32,
    /// Bytes a second; none while the sender had nothing to send, which says nothing of the link.
    delivery_rate: Option<u64>,
    sent: u32,
    sent_again: u32,
    waits: Waits,
}

/// What a connection had sent when it was measured last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    segments: u32,
    again: u32,
}

/// For how long a connection has waited, in microseconds since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Waits {
    /// For the peer to confirm what was sent.
    pub busy_us: u64,
    /// Of that, because the peer had no room for more.
    pub refused_us: u64,
}

/// Measures the way to `peer` on a connection of the agent to it. `device` is who is proven to be there.
/// What it lost counts since `before`, which is nothing the first time and then what this left there. Returns what it
/// waits for, where the kernel tells.
pub fn measure(
    peer: IpAddr,
    device: Option<&str>,
    socket: BorrowedFd,
    before: &mut Sent,
) -> Option<Waits> {
    let info = info(socket).ok()?.since(before);
    let mut links = LINKS.lock().unwrap_or_else(PoisonError::into_inner);
    if links.len() >= MOST_PEERS {
        let now = Instant::now();
        links.retain(|_, link| {
            link.measured
                .back()
                .is_some_and(|(at, _)| now - *at < COUNTS)
        });
    }
    links
        .entry(peer)
        .or_default()
        .take(Instant::now(), device, info);
    Some(info.waits)
}

/// Adds what was measured within the last minute.
pub(super) fn read(reading: &mut HostReading) {
    let links = LINKS.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    // A device that is reached at several addresses is as good as the worst way to it.
    let mut worst: BTreeMap<(&str, String), f64> = BTreeMap::new();
    for (address, link) in links.iter() {
        let name = link.device.clone().unwrap_or_else(|| address.to_string());
        for (metric, value) in METRICS.into_iter().zip(link.values(now)) {
            if let Some(value) = value {
                let worst = worst.entry((metric, name.clone())).or_insert(value);
                *worst = worst.max(value);
            }
        }
    }
    for ((metric, name), value) in worst {
        reading.of(metric, Per::Peer, &name, value);
    }
    for metric in &METRICS[..3] {
        reading.device_from_parts(metric, f64::max);
    }
    if reading.values_of(METRICS[0]).next().is_some() {
        let why = "no peer was sent enough within the last minute to fill the link";
        reading.absent(&METRICS[3..], why);
    }
    let why = "this agent spoke with no peer within the last minute";
    reading.absent(&METRICS, why);
}

impl Link {
    fn take(&mut self, now: Instant, device: Option<&str>, info: Info) {
        if let Some(device) = device {
            self.device = Some(device.to_owned());
        }
        self.measured.push_back((now, info));
        while self.measured.len() > MOST
            || self
                .measured
                .front()
                .is_some_and(|(at, _)| now - *at > COUNTS)
        {
            self.measured.pop_front();
        }
    }

    /// The values of [`METRICS`], in their units.
    fn values(&self, now: Instant) -> [Option<f64>; 4] {
        let recent: Vec<&Info> = self
            .measured
            .iter()
            .filter(|(at, _)| now.saturating_duration_since(*at) <= COUNTS)
            .map(|(_, info)| info)
            .collect();
        let latest = recent.last();
        let sent: f64 = recent.iter().map(|info| f64::from(info.sent)).sum();
        let again: f64 = recent.iter().map(|info| f64::from(info.sent_again)).sum();
        let least = recent
            .iter()
            .map(|info| info.least_round_trip_us)
            .filter(|&us| us > 0)
            .min();
        let fastest = recent.iter().filter_map(|info| info.delivery_rate).max();
        [
            latest.map(|info| f64::from(info.round_trip_us) * 1e3),
            latest.map(|info| f64::from(info.deviation_us) * 1e3),
            (sent > 0.0).then(|| (100.0 * again / sent).min(100.0)),
            fastest
                .zip(least)
                .map(|(rate, us)| rate as f64 * f64::from(us) / 1e6),
        ]
    }
}

const LENGTH: usize = 184;

fn info(socket: BorrowedFd) -> io::Result<Info> {
    let mut bytes = [0_u8; LENGTH];
    let mut length = LENGTH as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into the buffer, which is as long.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            bytes.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    if (length as usize) < LENGTH {
        return Err(io::ErrorKind::Unsupported.into()); // before Linux 4.10
    }
    Ok(Info::decode(&bytes))
}

impl Info {
    /// With what was sent since `before`; the kernel's counts are 32 bits of their own.
    fn since(self, before: &mut Sent) -> Self {
        let (segments, again) = (self.sent, self.sent_again);
        let before = std::mem::replace(before, Sent { segments, again });
        Self {
            sent: segments.wrapping_sub(before.segments),
            sent_again: again.wrapping_sub(before.again),
            ..self
        }
    }

    fn decode(bytes: &[u8; LENGTH]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(word)
        };
        let long = |at: usize| {
            let mut long = [0; 8];
            long.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(long)
        };
        // The lowest bit of the eighth byte: the sender, not the link, was the limit.
        let link_was_the_limit = bytes[7] & 1 == 0;
        let rate = long(160);
        Self {
            round_trip_us: word(68),
            deviation_us: word(72),
            least_round_trip_us: word(148),
            delivery_rate: (link_was_the_limit && rate > 0).then_some(rate),
            sent: word(156),
            sent_again: word(100),
            waits: Waits {
                busy_us: long(168),
                refused_us: long(176),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn a_real_connection_tells_its_round_trip_and_nothing_lost() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let mut client = TcpStream::connect(address).expect("connected");
        let (mut server, _) = listener.accept().expect("accepted");
        for _ in 0..10 {
            client.write_all(b"ping").expect("sent");
            server.read_exact(&mut [0; 4]).expect("received");
            server.write_all(b"pong").expect("sent");
            client.read_exact(&mut [0; 4]).expect("received");
        }
        let info = info(client.as_fd()).expect("TCP_INFO");
        assert!((1..1_000_000).contains(&info.round_trip_us), "{info:?}");
        assert!(
            info.least_round_trip_us <= info.round_trip_us * 2,
            "{info:?}"
        );
        assert_eq!((info.sent, info.sent_again), (10, 0), "{info:?}");
    }

    #[test]
    fn a_long_link_lost_what_it_lost_since_it_was_measured_last() {
        let start = Instant::now();
        let (mut link, mut before) = (Link::default(), Sent::default());
        for (seconds, sent, sent_again) in [(0, 1_000, 500), (100, 1_100, 500), (101, 1_200, 502)] {
            let info = Info {
                sent,
                sent_again,
                ..Info::default()
            };
            let now = start + Duration::from_secs(seconds);
            link.take(now, None, info.since(&mut before));
        }
        let [_, _, loss, _] = link.values(start + Duration::from_secs(102));
        assert_eq!(loss, Some(1.0), "2 of 200");
    }

    #[test]
    fn loss_is_over_the_last_minute_and_old_measurements_are_absent() {
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let measured = |round_trip_us, sent, sent_again, delivery_rate| Info {
            round_trip_us,
            deviation_us: 50,
            least_round_trip_us: 200,
            delivery_rate,
            sent,
            sent_again,
            waits: Waits::default(),
        };
        let mut link = Link::default();
        link.take(later(0), None, measured(900, 100, 100, None));
        link.take(later(70), Some("b"), measured(300, 30, 3, None));
        link.take(later(71), None, measured(400, 70, 2, Some(1_000_000)));
        assert_eq!(link.device.as_deref(), Some("b"));
        let values = link.values(later(72));
        assert_eq!(
            values,
            [Some(400_000.0), Some(50_000.0), Some(5.0), Some(200.0)]
        );
        assert_eq!(link.values(later(200)), [None; 4]);
    }
}
