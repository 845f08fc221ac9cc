//! Enrolment: an operator's one-time join token turns a new host into a device of the fleet.
//!
//! Invariants: the secret travels only inside TLS whose server proved to be under the CA that the token
//! names; the duplicator keeps a hash of it; it works once, until its expiry. The device's key never
//! leaves the device.

use super::ca::Ca;
use super::client::{CallError, ControlClient};
use super::files::private_dir;
use super::identity::{
    DUPLICATOR, Enrolled, Fingerprint, Identity, IdentityError, check_id, request,
};
use super::registry::{Invitation, Registry, RegistryError};
use super::secret::Secret;
use crate::model::fleet::PeerAddress;
use crate::model::ids::DeviceId;
use crate::model::units::UnixMillis;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

const PREFIX: &str = "lifeboat-join-";

/// What a new device needs to enrol once. Printing it (`Display`) shows the secret: that is its use.
#[derive(Serialize, Deserialize)]
pub struct JoinToken {
    address: SocketAddr,
    ca: Fingerprint,
    secret: Secret,
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let json = serde_json::to_vec(self).map_err(|_| fmt::Error)?;
        write!(f, "{PREFIX}{}", hex::encode(json))
    }
}

/// The text is not a join token.
#[derive(Debug, thiserror::Error)]
#[error(
    "this is not a join token, or not the whole of it; copy the one line that `lifeboat fleet invite` printed"
)]
pub struct BadJoinToken;

impl FromStr for JoinToken {
    type Err = BadJoinToken;
    fn from_str(text: &str) -> Result<Self, BadJoinToken> {
        let digits = text.trim().strip_prefix(PREFIX).ok_or(BadJoinToken)?;
        let json = hex::decode(digits).map_err(|_| BadJoinToken)?;
        serde_json::from_slice(&json).map_err(|_| BadJoinToken)
    }
}

/// Stored with each invitation and each attempt; separates this use of a secret from all others.
pub(super) fn secret_hash(secret: &Secret) -> [u8; 32] {
    secret.digest("lifeboat join token 2026")
}

/// An invitation could not be made.
#[derive(Debug, thiserror::Error)]
pub enum InviteError {
    /// No fleet here, or the id cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Makes a join token against the duplicator's directory `dir`, valid for `lifetime` from `now`; only
/// for `device`, if given.
///
/// # Errors
/// [`InviteError`].
pub async fn invite<R: Registry>(
    dir: &Path,
    registry: &R,
    device: Option<DeviceId>,
    lifetime: Duration,
    now: UnixMillis,
) -> Result<JoinToken, InviteError> {
    if let Some(device) = &device {
        check_id(device)?;
    }
    let identity = Identity::load(dir)?;
    let ca = Ca::load(dir)?;
    let token = JoinToken {
        address: identity.advertise(),
        ca: ca.fingerprint(),
        secret: Secret::random(),
    };
    let lifetime_ms = u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX);
    registry
        .invite(Invitation {
            secret_hash: secret_hash(&token.secret),
            device,
            expires: UnixMillis(now.0.saturating_add(lifetime_ms)),
        })
        .await?;
    Ok(token)
}

/// Device → duplicator, without a certificate yet.
#[derive(Serialize, Deserialize)]
pub(super) struct JoinRequest {
    pub(super) secret: Secret,
    pub(super) device: DeviceId,
    pub(super) advertise: SocketAddr,
    pub(super) csr: String,
}

/// Duplicator → device.
#[derive(Serialize, Deserialize)]
pub(super) struct JoinAnswer {
    pub(super) certificate: String,
    pub(super) ca: String,
    pub(super) fleet_key: Secret,
}

/// This host could not be enrolled.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The id, the key, or what is in the directory.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The duplicator cannot be reached or refuses.
    #[error("cannot enrol: {0}")]
    Call(#[from] CallError),
    /// TLS cannot be set up.
    #[error("cannot enrol: TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// Enrols this host as `device`, which others will reach at `advertise`, and stores its identity in
/// `dir`.
///
/// # Errors
/// [`JoinError`]; then nothing is stored. A token is used up by the duplicator's answer, also when that
/// answer is lost: ask for another one by name (`--for`).
pub async fn join(
    dir: &Path,
    token: &JoinToken,
    device: DeviceId,
    advertise: SocketAddr,
) -> Result<Identity, JoinError> {
    check_id(&device)?;
    private_dir(dir).map_err(|error| IdentityError::File {
        path: dir.to_owned(),
        error,
    })?;
    Identity::check_absent(dir)?;
    let (key, csr) = request(&device)?;
    let duplicator = PeerAddress {
        device: DeviceId::from(DUPLICATOR),
        addr: token.address,
    };
    let ask = JoinRequest {
        secret: token.secret.clone(),
        device: device.clone(),
        advertise,
        csr,
    };
    let answer: JoinAnswer = ControlClient::enrolling(token.ca)?
        .post(&duplicator, "/v1/join", &ask)
        .await?;
    let enrolled = Enrolled {
        device,
        advertise,
        duplicator,
        certificate: answer.certificate,
        key,
        ca: answer.ca,
        fleet_key: answer.fleet_key,
    };
    Ok(Identity::store(dir, enrolled)?)
}
