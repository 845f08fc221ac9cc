//! The fleet's certificate authority, and the making of a fleet.
//!
//! Invariants: the CA's key never leaves the duplicator's directory; a certificate's name and usages are
//! decided here, only the key comes from the request.
//! Non-goals: renewal and revocation lists. Certificates last ten years, because a device whose
//! certificate ran out could not be evacuated; the registry answers only to the certificate it saw last.

use super::files::{private_dir, secret_json, write_private};
use super::identity::{
    DUPLICATOR, Enrolled, Fingerprint, Identity, IdentityError, dns_name, request,
};
use super::secret::Secret;
use crate::model::fleet::PeerAddress;
use crate::model::ids::DeviceId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519,
};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use zeroize::Zeroizing;

const DAY: Duration = Duration::from_secs(24 * 3600);

#[derive(Serialize, Deserialize)]
struct StoredCa {
    certificate: String,
    key: String,
}

/// The fleet's certificate authority; lives with the duplicator only.
pub struct Ca {
    /// Its certificate, PEM.
    pub certificate: String,
    fingerprint: Fingerprint,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn path(dir: &Path) -> PathBuf {
        dir.join("ca.json")
    }

    /// Loads the CA in `dir`.
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
        let damaged = |reason: String| IdentityError::Damaged {
            path: path.clone(),
            reason,
        };
        let stored: StoredCa =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        Self::from_stored(stored).map_err(|error| damaged(error.to_string()))
    }

    fn from_stored(stored: StoredCa) -> Result<Self, rcgen::Error> {
        let key = KeyPair::from_pem(&Zeroizing::new(stored.key))?;
        Ok(Self {
            fingerprint: Fingerprint::of_pem(&stored.certificate)
                .map_err(|_| rcgen::Error::CouldNotParseCertificate)?,
            issuer: Issuer::from_ca_cert_pem(&stored.certificate, key)?,
            certificate: stored.certificate,
        })
    }

    /// Fingerprint of the CA's certificate.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Issues a certificate (PEM) for `device` over the key in `csr` (PEM). Only the key is taken from
    /// the request: name and usages are decided here.
    ///
    /// # Errors
    /// [`IdentityError::Certificate`] when the request is not a sound one.
    pub fn issue(&self, csr: &str, device: &DeviceId) -> Result<String, IdentityError> {
        let issued = (|| {
            let mut request = CertificateSigningRequestParams::from_pem(csr)?;
            request.params = leaf(device)?;
            Ok(request.signed_by(&self.issuer)?.pem())
        })();
        issued.map_err(|error| IdentityError::Certificate {
            device: device.clone(),
            error,
        })
    }
}

fn validity(params: &mut CertificateParams) {
    // A day back: the clocks of the hosts that need this most are the least trustworthy.
    params.not_before = (SystemTime::now() - DAY).into();
    params.not_after = (SystemTime::now() + 3650 * DAY).into();
}

fn leaf(device: &DeviceId) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(vec![dns_name(device)])?;
    params
        .distinguished_name
        .push(DnType::CommonName, device.as_str());
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    validity(&mut params);
    Ok(params)
}

fn make_ca() -> Result<StoredCa, rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ED25519)?;
    let mut params = CertificateParams::default();
    // Two fleets must not have one name: a stranger's certificate would then be told as a broken
    // signature instead of an unknown issuer.
    let name = format!("lifeboat fleet CA {:08x}", rand::random::<u32>());
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(&mut params);
    Ok(StoredCa {
        certificate: params.self_signed(&key)?.pem(),
        key: key.serialize_pem(),
    })
}

/// Makes a fleet in `dir`: CA, fleet key and the duplicator's identity, reachable at `advertise`.
///
/// # Errors
/// [`IdentityError::Present`] when there is one; else as the parts.
pub fn init(dir: &Path, advertise: SocketAddr) -> Result<Identity, IdentityError> {
    let device = DeviceId::from(DUPLICATOR);
    let file = |path: PathBuf| move |error| IdentityError::File { path, error };
    private_dir(dir).map_err(file(dir.to_owned()))?;
    Identity::check_absent(dir)?;
    let certificate = |error| IdentityError::Certificate {
        device: DeviceId::from(DUPLICATOR),
        error,
    };
    let stored = make_ca().map_err(certificate)?;
    let text = secret_json(&stored).map_err(|error| IdentityError::Damaged {
        path: Ca::path(dir),
        reason: error.to_string(),
    })?;
    write_private(&Ca::path(dir), &text).map_err(file(Ca::path(dir)))?;
    let ca = Ca::from_stored(stored).map_err(certificate)?;
    let (key, csr) = request(&device)?;
    let enrolled = Enrolled {
        certificate: ca.issue(&csr, &device)?,
        key,
        ca: ca.certificate,
        fleet_key: Secret::random(),
        advertise,
        duplicator: PeerAddress {
            device: device.clone(),
            addr: advertise,
        },
        device,
    };
    Identity::store(dir, enrolled)
}
