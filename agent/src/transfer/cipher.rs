//! The seam of AES-256-GCM: two engines that give the same bytes.
//!
//! Invariants: each opens what the other sealed; what was changed opens in neither. Non-goals: choosing
//! nonces (`seal` counts them, tokens draw them) and keeping keys longer than the engine does.

use aes_gcm::Aes256Gcm;
use aes_gcm::aead::{AeadInOut, KeyInit};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// Bytes that sealing adds.
pub const SEAL_LEN: usize = 16;

/// What is sealed did not open: changed on the way, in another place, or sealed with another key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the record does not open: it was changed on the way or sealed with another key")]
pub struct OpenFailed;

/// One key in one of the engines.
pub enum Cipher {
    /// The fastest maintained one, for bulk data: AWS-LC.
    AwsLc(LessSafeKey),
    /// The `aes-gcm` crate: plain Rust, for what is small, and the reference for the other one.
    RustCrypto(Box<Aes256Gcm>),
}

impl std::fmt::Debug for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::AwsLc(_) => "Cipher::AwsLc(…)",
            Self::RustCrypto(_) => "Cipher::RustCrypto(…)",
        })
    }
}

impl Cipher {
    /// `key` in the engine for bulk data.
    #[must_use]
    pub fn aws_lc(key: &[u8; 32]) -> Self {
        let unbound =
            UnboundKey::new(&AES_256_GCM, key).expect("a 32-byte key is what AES-256-GCM takes");
        Self::AwsLc(LessSafeKey::new(unbound))
    }

    /// `key` in the engine of plain Rust.
    #[must_use]
    pub fn rust_crypto(key: &[u8; 32]) -> Self {
        Self::RustCrypto(Box::new(Aes256Gcm::new(key.into())))
    }

    /// Seals `payload` in place and returns what authenticates it and `associated`. A nonce must never be
    /// used for two payloads under one key.
    #[must_use]
    pub fn seal(&self, nonce: [u8; 12], associated: &[u8], payload: &mut [u8]) -> [u8; SEAL_LEN] {
        const SMALL: &str = "AES-GCM refuses only payloads of some 64 GiB; records are capped";
        let mut tag = [0; SEAL_LEN];
        match self {
            Self::AwsLc(key) => {
                let nonce = Nonce::assume_unique_for_key(nonce);
                let made = key.seal_in_place_separate_tag(nonce, Aad::from(associated), payload);
                tag.copy_from_slice(made.expect(SMALL).as_ref());
            }
            Self::RustCrypto(key) => {
                let made = key.encrypt_inout_detached(&nonce.into(), associated, payload.into());
                tag.copy_from_slice(&made.expect(SMALL));
            }
        }
        tag
    }

    /// Opens in place what [`Self::seal`] made, followed by what it returned, and returns the payload.
    ///
    /// # Errors
    /// [`OpenFailed`], and what is in `sealed` is then worthless.
    pub fn open<'b>(
        &self,
        nonce: [u8; 12],
        associated: &[u8],
        sealed: &'b mut [u8],
    ) -> Result<&'b [u8], OpenFailed> {
        match self {
            Self::AwsLc(key) => {
                let nonce = Nonce::assume_unique_for_key(nonce);
                let opened = key.open_in_place(nonce, Aad::from(associated), sealed);
                opened.map(|payload| &*payload).map_err(|_| OpenFailed)
            }
            Self::RustCrypto(key) => {
                let (payload, tag) = sealed.split_last_chunk_mut().ok_or(OpenFailed)?;
                let tag: [u8; SEAL_LEN] = *tag;
                key.decrypt_inout_detached(
                    &nonce.into(),
                    associated,
                    (&mut *payload).into(),
                    &tag.into(),
                )
                .map_err(|_| OpenFailed)?;
                Ok(payload)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::BODY_CAP;
    use super::*;
    use proptest::prelude::*;

    const NONCE: [u8; 12] = [9; 12];

    fn engines(key: &[u8; 32]) -> [Cipher; 2] {
        [Cipher::aws_lc(key), Cipher::rust_crypto(key)]
    }

    fn sealed(cipher: &Cipher, nonce: [u8; 12], associated: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut sealed = payload.to_vec();
        let tag = cipher.seal(nonce, associated, &mut sealed);
        sealed.extend(tag);
        sealed
    }

    /// Both engines seal the same bytes, and each opens what the other sealed.
    fn agree(key: &[u8; 32], nonce: [u8; 12], associated: &[u8], payload: &[u8]) {
        let [one, other] = engines(key);
        let bytes = sealed(&one, nonce, associated, payload);
        assert_eq!(bytes.len(), payload.len() + SEAL_LEN);
        assert!(bytes == sealed(&other, nonce, associated, payload));
        for engine in [one, other] {
            let mut bytes = bytes.clone();
            assert!(engine.open(nonce, associated, &mut bytes).unwrap() == payload);
        }
    }

    proptest! {
        #[test]
        fn both_engines_seal_the_same_bytes_and_open_each_others(
            key in any::<[u8; 32]>(),
            nonce in any::<[u8; 12]>(),
            associated in proptest::collection::vec(any::<u8>(), 0..100),
            payload in proptest::collection::vec(any::<u8>(), 0..5000),
        ) {
            agree(&key, nonce, &associated, &payload);
        }

        #[test]
        fn neither_engine_opens_what_was_changed_or_belongs_elsewhere(
            payload in proptest::collection::vec(any::<u8>(), 0..500),
            at in any::<prop::sample::Index>(),
            bit in 0..8_u8,
            cut in 1..=SEAL_LEN,
        ) {
            for engine in engines(&[7; 32]) {
                let good = sealed(&engine, NONCE, b"here ", &payload);
                let mut flipped = good.clone();
                flipped[at.index(good.len())] ^= 1 << bit;
                let mut short = good.clone();
                short.truncate(good.len() - cut);
                for (nonce, associated, mut bad) in [
                    (NONCE, b"here ", flipped),
                    (NONCE, b"here ", short),
                    (NONCE, b"there", good.clone()),
                    ([8; 12], b"here ", good),
                    (NONCE, b"here ", Vec::new()),
                ] {
                    prop_assert_eq!(engine.open(nonce, associated, &mut bad), Err(OpenFailed));
                }
            }
            for other in engines(&[6; 32]) {
                let mut elsewhere = sealed(&engines(&[7; 32])[0], NONCE, b"here ", &payload);
                prop_assert_eq!(other.open(NONCE, b"here ", &mut elsewhere), Err(OpenFailed));
            }
        }
    }

    #[test]
    fn both_engines_agree_on_the_least_and_the_largest() {
        let byte = |index: usize| u8::try_from(index % 251).unwrap();
        let largest: Vec<u8> = (0..BODY_CAP - SEAL_LEN).map(byte).collect();
        // Around the 16 bytes of a block of AES and the stretches that both engines work on at once.
        for length in (0..=130).chain([255, 256, 257, 4096, 65_536, largest.len()]) {
            agree(&[1; 32], NONCE, b"header", &largest[..length]);
            agree(&[1; 32], [u8::MAX; 12], b"", &largest[..length]);
        }
    }

    /// Case 16 of the GCM specification (McGrew and Viega, 2005).
    #[test]
    fn both_engines_seal_as_the_specification_has_it() {
        let bytes = |text: &str| hex::decode(text).unwrap();
        let key = "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308";
        let payload = bytes(
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
        );
        let expected = bytes(
            "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f66276fc6ece0f4e1768cddf8853bb2d551b",
        );
        let nonce = bytes("cafebabefacedbaddecaf888").try_into().unwrap();
        let associated = bytes("feedfacedeadbeeffeedfacedeadbeefabaddad2");
        for engine in engines(&bytes(key).try_into().unwrap()) {
            assert_eq!(sealed(&engine, nonce, &associated, &payload), expected);
        }
    }
}
