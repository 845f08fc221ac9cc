//! What a lab host runs when it is to misbehave: calls with somebody's identity files, connections that say
//! nothing, and a wire that flips bits.

use std::collections::VecDeque;
use std::env;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, Result, bail};
use lifeboat::fleet::client::ControlClient;
use lifeboat::fleet::identity::Identity;
use lifeboat::model::fleet::PeerAddress;
use lifeboat::model::ids::DeviceId;
use serde_json::Value;

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["call", directory, device, address, path, body] => {
            call(directory, device, address, path, body)
        }
        ["idle", count, address] => idle(count, address),
        ["wire", listen, to, flips @ ..] => wire(listen, to, flips),
        _ => bail!(
            "adversary call IDENTITY-DIR DEVICE ADDRESS PATH BODY | idle COUNT ADDRESS | wire LISTEN TO FLIP…"
        ),
    }
}

/// One call on the control channel under the identity in `directory`; prints the answer.
fn call(directory: &str, device: &str, address: &str, path: &str, body: &str) -> Result<()> {
    let identity = Identity::load(Path::new(directory))?;
    let peer = PeerAddress {
        device: DeviceId::from(device),
        addr: address.parse()?,
    };
    let body: Value = serde_json::from_str(body)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let client = ControlClient::new(&identity)?;
    let answer: Value = runtime.block_on(client.post(&peer, path, &body))?;
    println!("{answer}");
    Ok(())
}

/// Connections that never say a word, until this process ends.
fn idle(count: &str, address: &str) -> Result<()> {
    let open = (0..count.parse()?)
        .map(|_| TcpStream::connect(address))
        .collect::<io::Result<Vec<_>>>()?;
    println!("{} connections are open", open.len());
    loop {
        thread::park();
    }
}

/// One bit to flip, `WAY:FRAME:BYTE`: `up` is towards the listener, frames count from the end of the
/// greeting (`greeting` is that itself), and a byte beyond the frame's end is counted round.
#[derive(Debug, Clone)]
struct Flip {
    up: bool,
    frame: Option<u64>,
    byte: usize,
}

impl FromStr for Flip {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let mut next = || {
            parts
                .next()
                .with_context(|| format!("{text:?}: WAY:FRAME:BYTE"))
        };
        Ok(Self {
            up: next()? == "up",
            frame: match next()? {
                "greeting" => None,
                number => Some(number.parse()?),
            },
            byte: next()?.parse()?,
        })
    }
}

/// Flips not done yet: a connection does the first of them, and only that.
type Flips = Arc<Mutex<VecDeque<Flip>>>;

/// Carries connections from `listen` to `to`.
fn wire(listen: &str, to: &str, flips: &[&str]) -> Result<()> {
    let flips: VecDeque<Flip> = flips
        .iter()
        .map(|flip| flip.parse())
        .collect::<Result<_>>()?;
    let flips: Flips = Arc::new(Mutex::new(flips));
    for near in TcpListener::bind(listen)?.incoming() {
        let near = near?;
        let Ok(far) = TcpStream::connect(to) else {
            continue;
        };
        let spoilt = Arc::new(AtomicBool::new(false));
        for up in [true, false] {
            let (mut from, mut into) = (near.try_clone()?, far.try_clone()?);
            if !up {
                std::mem::swap(&mut from, &mut into);
            }
            let (flips, spoilt) = (flips.clone(), spoilt.clone());
            thread::spawn(move || {
                let spoil = |number, frame: &mut [u8]| flip((up, number), frame, &flips, &spoilt);
                let _ = carry(up, &mut from, &mut into, spoil);
                // Either end is gone: so is the connection.
                let _ = from.shutdown(Shutdown::Both);
                let _ = into.shutdown(Shutdown::Both);
            });
        }
    }
    Ok(())
}

/// Carries one direction of one connection; `spoil` sees every frame.
fn carry(
    up: bool,
    from: &mut TcpStream,
    into: &mut TcpStream,
    spoil: impl Fn(Option<u64>, &mut [u8]),
) -> io::Result<()> {
    let mut greeting = vec![0; if up { 9 } else { 40 }];
    from.read_exact(&mut greeting)?;
    if !up {
        into.write_all(&greeting)?;
        greeting.clear();
    }
    // The caller's answer tells the length of the plan's name; the listener's verdict has a fixed length.
    let start = greeting.len();
    let rest = if up {
        usize::from(greeting[8]) + 64
    } else {
        33
    };
    greeting.resize(start + rest, 0);
    from.read_exact(&mut greeting[start..])?;
    spoil(None, &mut greeting);
    into.write_all(&greeting)?;
    for number in 0.. {
        let mut frame = vec![0; 36];
        from.read_exact(&mut frame)?;
        let length = u32::from_le_bytes([frame[4], frame[5], frame[6], frame[7]]);
        frame.resize(36 + length as usize, 0);
        from.read_exact(&mut frame[36..])?;
        spoil(Some(number), &mut frame);
        into.write_all(&frame)?;
    }
    Ok(())
}

/// Flips a bit of this frame if that is the next flip and its connection had none yet.
fn flip(place: (bool, Option<u64>), frame: &mut [u8], flips: &Flips, spoilt: &AtomicBool) {
    let mut flips = flips.lock().unwrap_or_else(PoisonError::into_inner);
    let here = |flip: &Flip| (flip.up, flip.frame) == place;
    if spoilt.load(Ordering::Relaxed) || !flips.front().is_some_and(here) {
        return;
    }
    let Some(next) = flips.pop_front() else {
        return;
    };
    spoilt.store(true, Ordering::Relaxed);
    let byte = next.byte % frame.len();
    frame[byte] ^= 1;
    println!("flipped byte {byte} of {} in {next:?}", frame.len());
}
