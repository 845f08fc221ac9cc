//! Opening a data connection: both ends prove that they know the key of an admission.
//!
//! The listener speaks first with a challenge; the caller answers with plan, its own challenge and a
//! proof; the listener answers with its proof or a refusal. From both challenges and the key comes
//! the key of this connection's control messages. Invariant: nothing is allocated from a peer's
//! length beyond 128 bytes, and each step has a time limit.

use super::engine::Engine;
use super::seal::{LinkKey, NoRandom, random};
use crate::model::ids::PlanId;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};
use zeroize::{Zeroize, Zeroizing};

const MAGIC: &[u8; 6] = b"LIFEBT";
/// Version of everything that follows the greeting; both ends must speak the same.
const VERSION: u16 = 8;
const PLAN_CAP: usize = 128;
const ACCEPTED: u8 = 1;

/// The connection was not agreed.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The link failed.
    #[error("the connection failed during the greeting: {0}")]
    Link(#[from] io::Error),
    /// No random bytes.
    #[error(transparent)]
    Random(#[from] NoRandom),
    /// Not our protocol.
    #[error("the peer does not speak the data protocol of Lifeboat; check the address")]
    Protocol,
    /// Another version of it.
    #[error(
        "the peer speaks version {0} of the data protocol, this agent version {VERSION}; run the same version of Lifeboat on both"
    )]
    Version(u16),
    /// The listener said no.
    #[error(
        "the peer refused the data connection: it does not expect this plan or the link key differs; start the plan again"
    )]
    Refused,
    /// The listener could not prove the key.
    #[error("the peer does not know the link key of this plan: it is not the device it should be")]
    Impostor,
    /// The caller named a plan that is not admitted.
    #[error("refused: no plan `{0}` is admitted here")]
    UnknownPlan(String),
    /// The caller could not prove the key.
    #[error("refused: wrong link key for plan `{0}`")]
    WrongKey(PlanId),
}

/// What each end begins with.
fn magic() -> Vec<u8> {
    let mut magic = MAGIC.to_vec();
    magic.extend_from_slice(&VERSION.to_be_bytes());
    magic
}

fn check(magic: &[u8]) -> Result<(), HelloError> {
    match magic.strip_prefix(MAGIC) {
        Some(&[high, low]) => match u16::from_be_bytes([high, low]) {
            VERSION => Ok(()),
            other => Err(HelloError::Version(other)),
        },
        _ => Err(HelloError::Protocol),
    }
}

fn proof(key: &LinkKey, role: &str, a: &[u8; 32], b: &[u8; 32], plan: &[u8]) -> blake3::Hash {
    let mut hasher = Zeroizing::new(blake3::Hasher::new_keyed(&key.0));
    hasher
        .update(role.as_bytes())
        .update(&[0])
        .update(a)
        .update(b)
        .update(plan);
    hasher.finalize()
}

/// Key of the connection's control messages, wiped when dropped.
fn connection_key(
    key: &LinkKey,
    listener: &[u8; 32],
    caller: &[u8; 32],
    plan: &[u8],
) -> Zeroizing<[u8; 32]> {
    let mut drawn = proof(key, "connection", listener, caller, plan);
    let connection = Zeroizing::new(*drawn.as_bytes());
    drawn.zeroize();
    connection
}

/// Caller's side. Returns the connection's key.
///
/// # Errors
/// [`HelloError`].
pub fn call(
    engine: &mut dyn Engine,
    socket: BorrowedFd<'_>,
    plan: &PlanId,
    key: &LinkKey,
    patience: Duration,
) -> Result<Zeroizing<[u8; 32]>, HelloError> {
    let mut greeting = [0; 40];
    engine.receive(socket, &mut greeting, patience)?;
    let (start, challenge) = greeting.split_at(8);
    check(start)?;
    let mut theirs = [0; 32];
    theirs.copy_from_slice(challenge);
    let ours: [u8; 32] = random()?;
    let name = plan.as_str().as_bytes();
    let length = u8::try_from(name.len()).map_err(|_| HelloError::Protocol)?;
    let mut answer = magic();
    answer.push(length);
    answer.extend_from_slice(name);
    answer.extend_from_slice(&ours);
    answer.extend_from_slice(proof(key, "caller", &theirs, &ours, name).as_bytes());
    engine.send(socket, &answer, patience)?;
    let mut verdict = [0; 33];
    engine.receive(socket, &mut verdict, patience)?;
    if verdict[0] != ACCEPTED {
        return Err(HelloError::Refused);
    }
    let mut theirs_proof = [0; 32];
    theirs_proof.copy_from_slice(&verdict[1..]);
    if proof(key, "listener", &theirs, &ours, name) != blake3::Hash::from(theirs_proof) {
        return Err(HelloError::Impostor);
    }
    Ok(connection_key(key, &theirs, &ours, name))
}

/// Receives from a peer that has proven nothing yet: `limit` holds for all of it, however slowly the
/// bytes drip in.
fn receive_all_within(
    engine: &mut dyn Engine,
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    limit: Duration,
) -> io::Result<()> {
    let until = Instant::now() + limit;
    for byte in buffer.chunks_mut(1) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        engine.receive(socket, byte, left)?;
    }
    Ok(())
}

/// Listener's side. `find` gives the key of each admission of a plan and whatever else belongs to it. Returns that of
/// the one whose key the caller proves, and the connection's key.
///
/// # Errors
/// [`HelloError`]; the caller learns only that it was refused.
pub fn answer<T>(
    engine: &mut dyn Engine,
    socket: BorrowedFd<'_>,
    find: impl FnOnce(&PlanId) -> Vec<(LinkKey, T)>,
    patience: Duration,
) -> Result<(T, Zeroizing<[u8; 32]>), HelloError> {
    let ours: [u8; 32] = random()?;
    let mut greeting = magic();
    greeting.extend_from_slice(&ours);
    engine.send(socket, &greeting, patience)?;
    let mut head = [0; 9];
    receive_all_within(engine, socket, &mut head, patience)?;
    let length = usize::from(head[8]);
    check(&head[..8])?;
    if length > PLAN_CAP {
        return Err(HelloError::Protocol);
    }
    let mut rest = vec![0; length + 64];
    receive_all_within(engine, socket, &mut rest, patience)?;
    let (name, proofs) = rest.split_at(length);
    let mut theirs = [0; 32];
    theirs.copy_from_slice(&proofs[..32]);
    let mut claimed = [0; 32];
    claimed.copy_from_slice(&proofs[32..]);
    let refuse = |engine: &mut dyn Engine, why| {
        // The refusal itself may not arrive; the caller's time limit covers that.
        let _ = engine.send(socket, &[0; 33], patience);
        Err(why)
    };
    let text = String::from_utf8_lossy(name).into_owned();
    let plan = PlanId(text);
    let admissions = find(&plan);
    if admissions.is_empty() {
        return refuse(engine, HelloError::UnknownPlan(plan.0));
    }
    let claimed = blake3::Hash::from(claimed);
    let proven = |(key, _): &(LinkKey, T)| proof(key, "caller", &ours, &theirs, name) == claimed;
    let Some((key, found)) = admissions.into_iter().find(proven) else {
        return refuse(engine, HelloError::WrongKey(plan));
    };
    let mut verdict = vec![ACCEPTED];
    verdict.extend_from_slice(proof(&key, "listener", &ours, &theirs, name).as_bytes());
    engine.send(socket, &verdict, patience)?;
    Ok((found, connection_key(&key, &ours, &theirs, name)))
}
