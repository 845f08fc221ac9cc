//! Sealing records for the target with AES-256-GCM.
//!
//! Invariants: each sealing session has its own key, derived from the plan's key and a random salt,
//! and its nonces are record numbers, so no nonce is used twice, also after a restart. The header,
//! the plan and the direction are associated data: a record cannot be moved to another place.

use super::cipher::Cipher;
pub use super::cipher::{OpenFailed, SEAL_LEN};
use super::frame::{FrameKind, HEADER_LEN, Header};
use super::payload::{Block, Payload, data_of_segment};
use crate::model::ids::PlanId;
use crate::volume::sign::signature;
use crate::volume::{BlockSize, FleetKey};
use rand::TryRngCore;
use std::ops::DerefMut;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Bytes that tagging adds to a payload.
pub const TAG_LEN: usize = 32;

macro_rules! key {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Zeroize, ZeroizeOnDrop)]
        pub struct $name(pub [u8; 32]);

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(concat!(stringify!($name), "(…)"))
            }
        }
    };
}

key!(
    /// Key of a plan, known to the target and to whoever encrypts, never to who only transfers.
    DataKey
);
key!(
    /// Key of one admission: who may open data connections for a plan from one device to another.
    LinkKey
);

/// Random public value that makes a sealing session's key its own.
pub type Salt = [u8; 32];

/// The system's random source failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw random bytes from the kernel: {0}")]
pub struct NoRandom(rand::rand_core::OsError);

/// Random bytes from the kernel.
///
/// # Errors
/// The kernel has none to give.
pub fn random<const N: usize>() -> Result<[u8; N], NoRandom> {
    let mut bytes = [0; N];
    rand::rngs::OsRng
        .try_fill_bytes(&mut bytes)
        .map_err(NoRandom)?;
    Ok(bytes)
}

/// A record that a seal or a tag is added to.
pub trait Growing: DerefMut<Target = [u8]> + for<'a> Extend<&'a u8> {}

impl<R: DerefMut<Target = [u8]> + for<'a> Extend<&'a u8>> Growing for R {}

/// Seals and opens the records of one session.
#[derive(Debug)]
pub struct Sealer {
    cipher: Cipher,
    prefix: Vec<u8>,
}

impl Sealer {
    /// For the session with this salt.
    #[must_use]
    pub fn new(plan: &PlanId, key: &DataKey, salt: &Salt) -> Self {
        Self::towards("target", plan, key, salt)
    }

    /// For the session with this salt, which the target drew: its records go to the source.
    #[must_use]
    pub fn to_source(plan: &PlanId, key: &DataKey, salt: &Salt) -> Self {
        Self::towards("source", plan, key, salt)
    }

    fn towards(side: &str, plan: &PlanId, key: &DataKey, salt: &Salt) -> Self {
        Self {
            cipher: Cipher::aws_lc(&session_key(key, salt)),
            prefix: associated_prefix(side, plan),
        }
    }

    /// Seals the payload that follows the place for the header in `record`, and writes the header.
    /// A number must never be used for two payloads.
    pub fn seal(&self, header: &Header, record: &mut impl Growing) {
        let header = Header {
            length: header.length_for(record, SEAL_LEN),
            ..*header
        };
        record[..HEADER_LEN].copy_from_slice(&header.encode());
        let aad = self.associated(&header);
        let payload = &mut record[HEADER_LEN..];
        let tag = self.cipher.seal(nonce(header.number), &aad, payload);
        record.extend(&tag);
    }

    /// Opens a record's body in place and returns the payload at its start.
    ///
    /// # Errors
    /// [`OpenFailed`], and what is in `body` is then worthless.
    pub fn open<'b>(&self, header: &Header, body: &'b mut [u8]) -> Result<&'b [u8], OpenFailed> {
        let associated = self.associated(header);
        self.cipher.open(nonce(header.number), &associated, body)
    }

    fn associated(&self, header: &Header) -> Vec<u8> {
        let mut aad = Vec::with_capacity(self.prefix.len() + HEADER_LEN);
        aad.extend_from_slice(&self.prefix);
        aad.extend_from_slice(&header.encode());
        aad
    }
}

/// Key of the session with this salt.
fn session_key(key: &DataKey, salt: &Salt) -> Zeroizing<[u8; 32]> {
    derived("lifeboat 2026 record sealing session", &[&key.0, salt])
}

/// A key made of `parts` for one use; nothing of it stays in memory but what is returned, which is wiped when dropped.
pub(super) fn derived(context: &str, parts: &[&[u8]]) -> Zeroizing<[u8; 32]> {
    let mut hasher = Zeroizing::new(blake3::Hasher::new_derive_key(context));
    for part in parts {
        hasher.update(part);
    }
    let mut hash = hasher.finalize();
    let key = Zeroizing::new(*hash.as_bytes());
    hash.zeroize();
    key
}

/// Associated data that is the same for all records: the direction and the plan.
fn associated_prefix(side: &str, plan: &PlanId) -> Vec<u8> {
    let mut prefix = format!("lifeboat record 1 to {side} ").into_bytes();
    prefix.extend_from_slice(plan.as_str().as_bytes());
    prefix.push(0);
    prefix
}

fn nonce(number: u64) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// Tags records on one link with keyed BLAKE3: plain ones on a trusted link, and sealed ones on their
/// way through a device that cannot open them. The data of a plain segment is hashed once: its tag covers
/// everything before it, the blocks' signatures included, and these cover the data; of one with blocks that come in
/// pages the tag covers all.
#[derive(Debug)]
pub struct Tagger {
    key: LinkKey,
}

impl Tagger {
    /// For one session over one admission.
    #[must_use]
    pub fn new(link: &LinkKey, session: &[u8; 16]) -> Self {
        let key = derived("lifeboat 2026 plain record tags", &[&link.0, session]);
        Self { key: LinkKey(*key) }
    }

    /// Writes the header of `record` and appends the tag.
    pub fn tag(&self, header: &Header, record: &mut impl Growing) {
        let header = Header {
            length: header.length_for(record, TAG_LEN),
            ..*header
        };
        record[..HEADER_LEN].copy_from_slice(&header.encode());
        let tag = blake3::keyed_hash(&self.key.0, covered(&header, record));
        record.extend(tag.as_bytes());
    }

    /// Tags a sealed record for its way to or from a paired device.
    pub fn wrap(&self, header: &Header, record: &mut impl Growing) {
        let header = Header {
            kind: FrameKind::Carried,
            ..*header
        };
        self.tag(&header, record);
    }

    /// Checks a record tagged by [`Tagger::wrap`] and makes it the sealed one again.
    ///
    /// # Errors
    /// [`OpenFailed`] when the tag does not fit.
    pub fn unwrap(&self, header: &Header, record: &mut Vec<u8>) -> Result<(), OpenFailed> {
        self.check(header, record)?;
        let header = Header {
            kind: FrameKind::Sealed,
            length: header.length_for(record, 0),
            ..*header
        };
        record[..HEADER_LEN].copy_from_slice(&header.encode());
        Ok(())
    }

    /// Checks a plain record of a volume with this block size and cuts the tag off.
    ///
    /// # Errors
    /// [`OpenFailed`] when the tag or the signature of a block does not fit.
    pub fn check_plain(
        &self,
        header: &Header,
        record: &mut Vec<u8>,
        key: &FleetKey,
        block_size: BlockSize,
    ) -> Result<(), OpenFailed> {
        self.check(header, record)?;
        let payload = &record[HEADER_LEN..];
        if data_of_segment(payload).is_some() {
            let Ok(Payload::Segment(segment)) = Payload::decode(payload, block_size) else {
                return Err(OpenFailed);
            };
            let is_signed = |block: &Block<'_>| match block {
                Block::Data(expected, bytes) => signature(key, bytes) == *expected,
                _ => true,
            };
            if !segment.blocks.iter().all(is_signed) {
                return Err(OpenFailed);
            }
        }
        Ok(())
    }

    /// Checks a record, header included, and cuts the tag off.
    fn check(&self, header: &Header, record: &mut Vec<u8>) -> Result<(), OpenFailed> {
        let at = record.len().checked_sub(TAG_LEN).ok_or(OpenFailed)?;
        if at < HEADER_LEN {
            return Err(OpenFailed);
        }
        let tag: [u8; TAG_LEN] = record[at..].try_into().map_err(|_| OpenFailed)?;
        // `blake3::Hash` compares in constant time.
        if blake3::keyed_hash(&self.key.0, covered(header, &record[..at]))
            != blake3::Hash::from(tag)
        {
            return Err(OpenFailed);
        }
        record.truncate(at);
        Ok(())
    }
}

/// What the tag of a record covers.
fn covered<'r>(header: &Header, record: &'r [u8]) -> &'r [u8] {
    let data = match header.kind {
        FrameKind::Tagged => data_of_segment(&record[HEADER_LEN..]),
        _ => None,
    };
    data.map_or(record, |data| &record[..HEADER_LEN + data])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::{Epoch, VolumeId};
    use crate::transfer::payload::{DESCRIPTOR_LEN, PayloadKind, descriptor, put_segment, start};
    use proptest::prelude::*;

    fn header(number: u64) -> Header {
        Header {
            kind: FrameKind::Sealed,
            barrier: false,
            length: 0,
            volume: VolumeId(3),
            epoch: Epoch(7),
            number,
            first_block: 11,
        }
    }

    fn sealed(plan: &str, number: u64, payload: &[u8]) -> Vec<u8> {
        let sealer = Sealer::new(&PlanId::from(plan), &DataKey([1; 32]), &[2; 32]);
        let mut record = vec![0; HEADER_LEN];
        record.extend_from_slice(payload);
        sealer.seal(&header(number), &mut record);
        record
    }

    proptest! {
        #[test]
        fn a_record_is_what_the_other_engine_makes_of_header_plan_and_number(
            payload in proptest::collection::vec(any::<u8>(), 0..5000),
            number in any::<u64>(),
        ) {
            let record = sealed("plan", number, &payload);
            let key = session_key(&DataKey([1; 32]), &[2; 32]);
            let mut aad = associated_prefix("target", &PlanId::from("plan"));
            aad.extend_from_slice(&record[..HEADER_LEN]);
            let mut nonce = [0; 12];
            nonce[4..].copy_from_slice(&number.to_be_bytes());
            let mut expected = payload;
            let tag = Cipher::rust_crypto(&key).seal(nonce, &aad, &mut expected);
            expected.extend(tag);
            prop_assert_eq!(&record[HEADER_LEN..], &expected[..]);
        }

        #[test]
        fn a_record_with_any_flipped_bit_does_not_open(
            payload in proptest::collection::vec(any::<u8>(), 1..500),
            at in any::<prop::sample::Index>(),
            bit in 0..8_u8,
        ) {
            let mut record = sealed("plan", 1, &payload);
            let at = at.index(record.len());
            record[at] ^= 1 << bit;
            let opener = Sealer::new(&PlanId::from("plan"), &DataKey([1; 32]), &[2; 32]);
            let (head, body) = record.split_at_mut(HEADER_LEN);
            let opened = Header::decode((&*head).try_into().unwrap())
                .map(|header| opener.open(&header, body).is_ok());
            prop_assert!(!matches!(opened, Ok(true)));
        }
    }

    #[test]
    fn no_two_sessions_of_a_plan_and_no_two_directions_share_a_key_and_a_nonce() {
        let (plan, key) = (PlanId::from("plan"), DataKey([1; 32]));
        let salts: Vec<Salt> = (0..1000).map(|_| random().unwrap()).collect();
        let keys: std::collections::HashSet<[u8; 32]> =
            salts.iter().map(|salt| *session_key(&key, salt)).collect();
        assert_eq!(keys.len(), salts.len());
        assert!(!keys.contains(&key.0));
        let numbers = [0, 1, 255, 256, 1 << 32, u64::MAX];
        let nonces: std::collections::HashSet<[u8; 12]> = numbers.map(nonce).into();
        assert_eq!(nonces.len(), numbers.len());
        // Who is told a salt that the other side drew for the other direction gets nothing that opens.
        let mut record = vec![0; HEADER_LEN];
        record.extend_from_slice(b"secret");
        Sealer::to_source(&plan, &key, &salts[0]).seal(&header(1), &mut record);
        let header = Header::decode(record[..HEADER_LEN].try_into().unwrap()).unwrap();
        let opened = Sealer::new(&plan, &key, &salts[0]).open(&header, &mut record[HEADER_LEN..]);
        assert_eq!(opened, Err(OpenFailed));
    }

    #[test]
    fn a_record_of_another_plan_or_session_does_not_open() {
        let record = sealed("plan", 1, b"secret");
        let header = Header::decode(record[..HEADER_LEN].try_into().unwrap()).unwrap();
        let open = |plan: &str, key: u8, salt: u8| {
            let opener = Sealer::new(&PlanId::from(plan), &DataKey([key; 32]), &[salt; 32]);
            opener
                .open(&header, &mut record[HEADER_LEN..].to_vec())
                .map(<[u8]>::to_vec)
        };
        assert_eq!(open("plan", 1, 2).unwrap(), b"secret");
        assert_eq!(open("other", 1, 2), Err(OpenFailed));
        assert_eq!(open("plan", 9, 2), Err(OpenFailed));
        assert_eq!(open("plan", 1, 9), Err(OpenFailed));
    }

    /// A plain record of two blocks of one file, and what tells whether one is accepted.
    fn tagged_segment() -> (Vec<u8>, impl Fn(&Tagger, &[u8]) -> bool) {
        let (key, size) = (FleetKey([3; 32]), BlockSize::default());
        let blocks = [vec![1; 64 << 10], vec![2; 100]];
        let mut record = start(Vec::new(), PayloadKind::Segment);
        let descriptors = put_segment(&mut record, b"file", (64 << 10) + 100, 0, 2);
        for (at, block) in (descriptors..).step_by(DESCRIPTOR_LEN).zip(&blocks) {
            let named = descriptor(Block::Data(signature(&key, block), block));
            record[at..at + DESCRIPTOR_LEN].copy_from_slice(&named);
        }
        record.extend(blocks.concat());
        let is_accepted = move |tagger: &Tagger, record: &[u8]| {
            let Ok(header) = Header::decode(record[..HEADER_LEN].try_into().unwrap()) else {
                return false;
            };
            let mut record = record.to_vec();
            let checked = tagger.check_plain(&header, &mut record, &key, size);
            checked.is_ok() && record.len() == HEADER_LEN + header.length as usize - TAG_LEN
        };
        (record, is_accepted)
    }

    #[test]
    fn a_tagged_record_is_accepted_only_whole_and_in_its_session() {
        let (segment, is_accepted) = tagged_segment();
        let mut entries = start(Vec::new(), PayloadKind::Removals);
        entries.extend_from_slice(b"\x05\0plain");
        for mut record in [segment, entries] {
            let tagger = Tagger::new(&LinkKey([1; 32]), &[1; 16]);
            let header = Header {
                kind: FrameKind::Tagged,
                ..header(4)
            };
            tagger.tag(&header, &mut record);
            assert!(is_accepted(&tagger, &record));
            let other = Tagger::new(&LinkKey([1; 32]), &[2; 16]);
            assert!(!is_accepted(&other, &record));
            let (front, length) = (record.len().min(5000), record.len());
            let data = (front..length).step_by(997);
            let tail = length - length.min(200)..length;
            for at in (0..front).chain(data).chain(tail) {
                let mut bad = record.clone();
                bad[at] ^= 1;
                assert!(!is_accepted(&tagger, &bad), "byte {at}");
            }
            for cut in [1, 32, 33] {
                assert!(!is_accepted(&tagger, &record[..length - cut]));
            }
        }
    }

    #[test]
    fn a_carried_record_is_unwrapped_only_as_it_was_wrapped() {
        let tagger = Tagger::new(&LinkKey([1; 32]), &[1; 16]);
        let mut record = sealed("plan", 4, b"secret");
        let whole = record.clone();
        tagger.wrap(&header(4), &mut record);
        let header = Header::decode(record[..HEADER_LEN].try_into().unwrap()).unwrap();
        let mut good = record.clone();
        tagger.unwrap(&header, &mut good).unwrap();
        assert_eq!(good, whole);
        for at in 0..record.len() {
            let mut bad = record.clone();
            bad[at] ^= 1;
            assert_eq!(
                tagger.unwrap(&header, &mut bad),
                Err(OpenFailed),
                "byte {at}"
            );
        }
        assert_eq!(tagger.unwrap(&header, &mut vec![0; 5]), Err(OpenFailed));
    }
}
