//! The pairing token: proof of the paired device to the source, and then of the source's consent.
//!
//! Invariants: sealed by AES-256-GCM under the pairing's secret, with the pairing named in the clear and
//! authenticated; it names everything it is good for, and is compared field by field.
//! Non-goals: remembering which tokens were used (`agent`).

use super::secret::Secret;
use crate::model::action::Actions;
use crate::model::fleet::Role;
use crate::model::ids::{DeviceId, PairingId, PlanId, VolumeId};
use crate::model::units::UnixMillis;
use crate::transfer::cipher::Cipher;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;

const VERSION: u8 = 1;

/// A number used once: 16 random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenNonce(#[serde(with = "hex::serde")] pub [u8; 16]);

impl TokenNonce {
    /// Fresh.
    #[must_use]
    pub fn random() -> Self {
        Self(rand::random())
    }
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Pairing.
    pub pairing: PairingId,
    /// Plan.
    pub plan: PlanId,
    /// Who may use it.
    pub source: DeviceId,
    /// Who issued it and will accept it.
    pub device: DeviceId,
    /// As what the device is lent.
    pub role: Role,
    /// Delegated actions.
    pub actions: Actions,
    /// Volumes.
    pub volumes: Vec<VolumeId>,
    /// When it must have been used.
    pub expires: UnixMillis,
    /// Makes it one of a kind.
    pub nonce: TokenNonce,
}

/// A sealed token, as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedToken {
    version: u8,
    /// The pairing whose secret opens it.
    pub pairing: PairingId,
    #[serde(with = "hex::serde")]
    key_id: [u8; 8],
    #[serde(with = "hex::serde")]
    nonce: [u8; 12],
    #[serde(with = "hex::serde")]
    sealed: Vec<u8>,
}

/// A token does not open, or says something else than was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Another format.
    #[error(
        "the token has version {0}, this is version {VERSION}; do both sides run the same release?"
    )]
    Version(u8),
    /// Sealed under another pairing's secret.
    #[error("the token was sealed with another secret than this pairing's")]
    WrongSecret,
    /// Changed on its way.
    #[error("the token was altered")]
    Altered,
    /// Good for something else.
    #[error("the token is for another {field}: it says {says}, the duplicator said {expected}")]
    Differs {
        /// Field.
        field: &'static str,
        /// In the token.
        says: String,
        /// As the duplicator said.
        expected: String,
    },
    /// Over.
    #[error("the token has expired; ask for a new one")]
    Expired,
}

fn key_id(secret: &Secret) -> [u8; 8] {
    let digest = secret.digest("lifeboat pairing token key id 2026");
    let mut id = [0; 8];
    id.copy_from_slice(&digest[..8]);
    id
}

fn associated(version: u8, pairing: &PairingId) -> Vec<u8> {
    let mut data = b"lifeboat pairing token".to_vec();
    data.push(version);
    data.extend_from_slice(pairing.as_str().as_bytes());
    data
}

/// Seals `claims` under `secret`.
///
/// # Errors
/// [`TokenError::Altered`] should the claims have no text, which none do.
pub fn seal(secret: &Secret, claims: &Claims) -> Result<SealedToken, TokenError> {
    let mut sealed = serde_json::to_vec(claims).map_err(|_| TokenError::Altered)?;
    // Random 96-bit nonces: a pairing's secret seals a handful of tokens (NIST SP 800-38D allows 2^32).
    let nonce: [u8; 12] = rand::random();
    let associated = associated(VERSION, &claims.pairing);
    let tag = Cipher::rust_crypto(secret.bytes()).seal(nonce, &associated, &mut sealed);
    sealed.extend(tag);
    Ok(SealedToken {
        version: VERSION,
        pairing: claims.pairing.clone(),
        key_id: key_id(secret),
        nonce,
        sealed,
    })
}

/// Opens a token with its pairing's secret.
///
/// # Errors
/// [`TokenError::Version`], [`TokenError::WrongSecret`] or [`TokenError::Altered`].
pub fn open(secret: &Secret, token: &SealedToken) -> Result<Claims, TokenError> {
    if token.version != VERSION {
        return Err(TokenError::Version(token.version));
    }
    if token.key_id != key_id(secret) {
        return Err(TokenError::WrongSecret);
    }
    let associated = associated(token.version, &token.pairing);
    let mut sealed = token.sealed.clone();
    let text = Cipher::rust_crypto(secret.bytes())
        .open(token.nonce, &associated, &mut sealed)
        .map_err(|_| TokenError::Altered)?;
    serde_json::from_slice(text).map_err(|_| TokenError::Altered)
}

impl Claims {
    /// As [`Self::compare`], and the expiry with `now` by the clock of who issued it.
    ///
    /// # Errors
    /// As [`Self::compare`], or [`TokenError::Expired`].
    pub fn check(&self, expected: &Self, now: UnixMillis) -> Result<(), TokenError> {
        self.compare(expected)?;
        if self.expires <= now {
            return Err(TokenError::Expired);
        }
        Ok(())
    }

    /// Compares every field with `expected` (whose nonce does not count).
    ///
    /// # Errors
    /// [`TokenError::Differs`] naming the first field that differs.
    pub fn compare(&self, expected: &Self) -> Result<(), TokenError> {
        // Taken apart, so that a field added later cannot be forgotten here.
        let Self {
            pairing,
            plan,
            source,
            device,
            role,
            actions,
            volumes,
            expires,
            nonce: _,
        } = self;
        same("pairing", pairing, &expected.pairing)?;
        same("plan", plan, &expected.plan)?;
        same("source", source, &expected.source)?;
        same("device", device, &expected.device)?;
        same("role", role, &expected.role)?;
        same("set of actions", actions, &expected.actions)?;
        same("set of volumes", volumes, &expected.volumes)?;
        if *expires > expected.expires {
            return Err(TokenError::Differs {
                field: "time",
                says: format!("until {}", expires.0),
                expected: format!("at most until {}", expected.expires.0),
            });
        }
        Ok(())
    }
}

fn same<T: PartialEq + Debug>(
    field: &'static str,
    says: &T,
    expected: &T,
) -> Result<(), TokenError> {
    if says == expected {
        return Ok(());
    }
    Err(TokenError::Differs {
        field,
        says: format!("{says:?}"),
        expected: format!("{expected:?}"),
    })
}
