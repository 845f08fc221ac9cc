//! Who a device is: its key, its certificate by the fleet's CA, and the fleet key.
//!
//! Invariants: one file (`identity.json`, 0600) holds all of it, so that it is whole or not there; keys
//! are Ed25519 (rustls with aws-lc-rs and rcgen agree on it, and it also signs releases); a certificate
//! names exactly one device as the DNS name `<device>.lifeboat`.
//! Non-goals: the CA (`ca`), how a device gets here (`enrol`).

use super::files::{secret_json, write_private};
use super::secret::Secret;
use crate::model::fleet::PeerAddress;
use crate::model::ids::DeviceId;
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519, SigningKey};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use zeroize::Zeroizing;

/// The duplicator's device id; no other device may have it.
pub const DUPLICATOR: &str = "duplicator";

const SUFFIX: &str = ".lifeboat";

/// SHA-256 of a certificate's DER bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(#[serde(with = "hex::serde")] pub [u8; 32]);

impl Fingerprint {
    /// Fingerprint of a certificate.
    #[must_use]
    pub fn of(certificate_der: &[u8]) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate_der);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }

    pub(super) fn of_pem(pem: &str) -> Result<Self, String> {
        parse_pem(pem).map(|der| Self::of(&der))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// An identity could not be made, stored or loaded.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// No identity in this directory.
    #[error(
        "{path}: no identity here; enrol this device with `lifeboat fleet join`, or make a fleet with `lifeboat fleet init`"
    )]
    Absent {
        /// File looked for.
        path: PathBuf,
    },
    /// There is one already.
    #[error(
        "{path}: there is an identity already ({device}); choose another directory, or remove the file to enrol anew"
    )]
    Present {
        /// File found.
        path: PathBuf,
        /// Whose it is.
        device: DeviceId,
    },
    /// Reading or writing failed.
    #[error("{path}: {error}")]
    File {
        /// File.
        path: PathBuf,
        /// Cause.
        error: std::io::Error,
    },
    /// The file's content is not an identity.
    #[error("{path}: damaged ({reason}); restore it from a backup or enrol anew")]
    Damaged {
        /// File.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The id cannot be a name in a certificate.
    #[error(
        "device id `{0}` cannot be used: it must be 1 to 63 of a-z, 0-9 and `-`, not start or end with `-`, and not be `duplicator`"
    )]
    Id(DeviceId),
    /// Making a key, request or certificate failed.
    #[error("cannot make a certificate for {device}: {error}")]
    Certificate {
        /// For whom.
        device: DeviceId,
        /// Cause.
        error: rcgen::Error,
    },
}

/// Checks that `device` may be enrolled under this id.
///
/// # Errors
/// [`IdentityError::Id`] when it is not a DNS label or is the duplicator's.
pub fn check_id(device: &DeviceId) -> Result<(), IdentityError> {
    let id = device.as_str();
    let label = (1..=63).contains(&id.len())
        && !id.starts_with('-')
        && !id.ends_with('-')
        && id
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if label && id != DUPLICATOR {
        Ok(())
    } else {
        Err(IdentityError::Id(device.clone()))
    }
}

#[derive(Serialize, Deserialize)]
struct Stored {
    device: DeviceId,
    advertise: SocketAddr,
    duplicator: PeerAddress,
    certificate: String,
    key: String,
    ca: String,
    fleet_key: Secret,
}

/// A device's identity. Not `Clone`: share it in an `Arc`.
pub struct Identity {
    device: DeviceId,
    advertise: SocketAddr,
    duplicator: PeerAddress,
    certificate: CertificateDer<'static>,
    ca: CertificateDer<'static>,
    key: KeyPair,
    fleet_key: Secret,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.device)
    }
}

impl Identity {
    /// The file that holds an identity in `dir`.
    #[must_use]
    pub fn path(dir: &Path) -> PathBuf {
        dir.join("identity.json")
    }

    /// Loads the identity in `dir`.
    ///
    /// # Errors
    /// [`IdentityError::Absent`], [`IdentityError::File`] or [`IdentityError::Damaged`].
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let path = Self::path(dir);
        let text = match std::fs::read(&path) {
            Ok(text) => Zeroizing::new(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(IdentityError::Absent { path });
            }
            Err(error) => return Err(IdentityError::File { path, error }),
        };
        let stored: Stored =
            serde_json::from_slice(&text).map_err(|error| IdentityError::Damaged {
                path: path.clone(),
                reason: error.to_string(),
            })?;
        Self::from_stored(stored).map_err(|reason| IdentityError::Damaged { path, reason })
    }

    fn from_stored(stored: Stored) -> Result<Self, String> {
        let certificate = parse_pem(&stored.certificate)?;
        let named = device_of(&certificate).map_err(|error| error.to_string())?;
        if named != stored.device {
            return Err(format!(
                "the certificate is {named}'s, the file says {}",
                stored.device
            ));
        }
        Ok(Self {
            certificate,
            ca: parse_pem(&stored.ca)?,
            key: KeyPair::from_pem(&Zeroizing::new(stored.key))
                .map_err(|error| error.to_string())?,
            device: stored.device,
            advertise: stored.advertise,
            duplicator: stored.duplicator,
            fleet_key: stored.fleet_key,
        })
    }

    /// Refuses a directory that holds an identity already.
    ///
    /// # Errors
    /// [`IdentityError::Present`], or the error of looking.
    pub fn check_absent(dir: &Path) -> Result<(), IdentityError> {
        match Self::load(dir) {
            Err(IdentityError::Absent { .. }) => Ok(()),
            Ok(identity) => Err(IdentityError::Present {
                path: Self::path(dir),
                device: identity.device,
            }),
            Err(error) => Err(error),
        }
    }

    /// Stores what enrolment yielded in `dir` and loads it.
    ///
    /// # Errors
    /// [`IdentityError::File`], or [`IdentityError::Damaged`] when the parts do not belong together.
    pub(super) fn store(dir: &Path, enrolled: Enrolled) -> Result<Self, IdentityError> {
        let path = Self::path(dir);
        let stored = Stored {
            device: enrolled.device,
            advertise: enrolled.advertise,
            duplicator: enrolled.duplicator,
            certificate: enrolled.certificate,
            key: enrolled.key.serialize_pem(),
            ca: enrolled.ca,
            fleet_key: enrolled.fleet_key,
        };
        let text = secret_json(&stored).map_err(|error| IdentityError::Damaged {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        let identity = Self::from_stored(stored).map_err(|reason| IdentityError::Damaged {
            path: path.clone(),
            reason,
        })?;
        write_private(&path, &text).map_err(|error| IdentityError::File { path, error })?;
        Ok(identity)
    }

    /// This device's id.
    #[must_use]
    pub fn device(&self) -> &DeviceId {
        &self.device
    }

    /// Where others reach this device's control channel.
    #[must_use]
    pub fn advertise(&self) -> SocketAddr {
        self.advertise
    }

    /// The duplicator this device enrolled with.
    #[must_use]
    pub fn duplicator(&self) -> &PeerAddress {
        &self.duplicator
    }

    /// The key of all block signatures in this fleet.
    #[must_use]
    pub fn fleet_key(&self) -> &[u8; 32] {
        self.fleet_key.bytes()
    }

    /// This device's certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The CA's certificate.
    #[must_use]
    pub fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// Fingerprint of this device's certificate.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    pub(super) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()))
    }
}

/// What enrolment yields, before it is stored.
pub(super) struct Enrolled {
    pub(super) device: DeviceId,
    pub(super) advertise: SocketAddr,
    pub(super) duplicator: PeerAddress,
    pub(super) certificate: String,
    pub(super) key: KeyPair,
    pub(super) ca: String,
    pub(super) fleet_key: Secret,
}

/// Signs `bytes` with the device's key (Ed25519, RFC 8032).
///
/// # Errors
/// [`IdentityError::Certificate`] when the key cannot sign.
pub fn sign(identity: &Identity, bytes: &[u8]) -> Result<Vec<u8>, IdentityError> {
    identity
        .key
        .sign(bytes)
        .map_err(|error| IdentityError::Certificate {
            device: identity.device.clone(),
            error,
        })
}

/// A signature or certificate was refused.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Not a certificate of this fleet's form.
    #[error("not a lifeboat certificate: {0}")]
    Certificate(String),
    /// The certificate does not chain to this fleet's CA.
    #[error("the certificate of {device} is not from this fleet's CA: {error}")]
    WrongCa {
        /// Who it names.
        device: DeviceId,
        /// Cause.
        error: rustls::Error,
    },
    /// The bytes are not what this certificate's key signed.
    #[error("the signature does not belong to these bytes and the certificate of {device}")]
    Signature {
        /// Whose certificate.
        device: DeviceId,
    },
}

/// Checks that the key of `certificate` (DER) signed `bytes`; returns whose certificate it is. Does not
/// ask who issued it: see [`verify_member`].
///
/// # Errors
/// [`VerifyError::Certificate`] or [`VerifyError::Signature`].
pub fn verify(certificate: &[u8], bytes: &[u8], signature: &[u8]) -> Result<DeviceId, VerifyError> {
    let device = device_of(certificate)?;
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|error| VerifyError::Certificate(error.to_string()))?;
    let key = aws_lc_rs::signature::UnparsedPublicKey::new(
        &aws_lc_rs::signature::ED25519,
        parsed.public_key().subject_public_key.data.as_ref(),
    );
    key.verify(bytes, signature)
        .map_err(|_| VerifyError::Signature {
            device: device.clone(),
        })?;
    Ok(device)
}

/// As [`verify`], and the certificate must be from this fleet's CA.
///
/// # Errors
/// Those of [`verify`], and [`VerifyError::WrongCa`].
pub fn verify_member(
    identity: &Identity,
    certificate: &[u8],
    bytes: &[u8],
    signature: &[u8],
) -> Result<DeviceId, VerifyError> {
    let device = verify(certificate, bytes, signature)?;
    super::tls::check_member(identity, certificate).map_err(|error| VerifyError::WrongCa {
        device: device.clone(),
        error,
    })?;
    Ok(device)
}

/// The device that a certificate names.
///
/// # Errors
/// [`VerifyError::Certificate`] when it does not name exactly one `<device>.lifeboat`.
pub fn device_of(certificate: &[u8]) -> Result<DeviceId, VerifyError> {
    let bad = |reason: &str| VerifyError::Certificate(reason.to_owned());
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|error| bad(&error.to_string()))?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|error| bad(&error.to_string()))?
        .ok_or_else(|| bad("it has no subject alternative name"))?;
    let [GeneralName::DNSName(name)] = names.value.general_names[..] else {
        return Err(bad("it does not have exactly one DNS name"));
    };
    name.strip_suffix(SUFFIX)
        .map(DeviceId::from)
        .ok_or_else(|| bad(&format!("its name `{name}` does not end in {SUFFIX}")))
}

/// The DNS name a device's certificate carries.
#[must_use]
pub fn dns_name(device: &DeviceId) -> String {
    format!("{device}{SUFFIX}")
}

pub(super) fn parse_pem(pem: &str) -> Result<CertificateDer<'static>, String> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| error.to_string())
}

/// A fresh key and a request for a certificate over it (PKCS #10, PEM).
///
/// # Errors
/// [`IdentityError::Id`] or [`IdentityError::Certificate`].
pub fn request(device: &DeviceId) -> Result<(KeyPair, String), IdentityError> {
    let certificate = |error| IdentityError::Certificate {
        device: device.clone(),
        error,
    };
    let key = KeyPair::generate_for(&PKCS_ED25519).map_err(certificate)?;
    let params = CertificateParams::new(vec![dns_name(device)]).map_err(certificate)?;
    let csr = params
        .serialize_request(&key)
        .and_then(|request| request.pem())
        .map_err(certificate)?;
    Ok((key, csr))
}
