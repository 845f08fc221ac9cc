//! TLS 1.3 with the fleet's CA on both sides; the only place that builds rustls configurations.
//!
//! Invariants: TLS 1.3 only; the provider (aws-lc-rs) is named, never a process default; no session
//! resumption, so that every connection proves its certificate anew.

use super::identity::{DUPLICATOR, Fingerprint, Identity, dns_name};
use crate::model::ids::DeviceId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme,
};
use std::sync::{Arc, LazyLock};

static PROVIDER: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()));

fn roots(ca: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone())?;
    Ok(Arc::new(roots))
}

fn members(identity: &Identity, strangers_too: bool) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    let builder =
        WebPkiClientVerifier::builder_with_provider(roots(identity.ca())?, PROVIDER.clone());
    let builder = if strangers_too {
        builder.allow_unauthenticated()
    } else {
        builder
    };
    builder
        .build()
        .map_err(|error| Error::General(error.to_string()))
}

/// Checks that `certificate` (DER) was issued by the fleet's CA and is valid now.
pub(super) fn check_member(identity: &Identity, certificate: &[u8]) -> Result<(), Error> {
    members(identity, false)?
        .verify_client_cert(&CertificateDer::from(certificate), &[], UnixTime::now())
        .map(|_| ())
}

/// For a server: presents the device's certificate and the CA's (for enrolment's pin). Clients without
/// a certificate are let through the handshake only if `strangers_too`; those with one must have it
/// from the fleet's CA.
pub(super) fn server(identity: &Identity, strangers_too: bool) -> Result<Arc<ServerConfig>, Error> {
    let mut config = ServerConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(members(identity, strangers_too)?)
        .with_single_cert(
            vec![identity.certificate().clone(), identity.ca().clone()],
            identity.private_key(),
        )?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// For a client with an identity.
pub(super) fn client(identity: &Identity) -> Result<Arc<ClientConfig>, Error> {
    let mut config = ClientConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(identity.ca())?)
        .with_client_auth_cert(vec![identity.certificate().clone()], identity.private_key())?;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// For a device without identity: trusts the one CA with this fingerprint, and only the duplicator's
/// certificate from it.
pub(super) fn enrolling_client(pin: Fingerprint) -> Result<Arc<ClientConfig>, Error> {
    let mut config = ClientConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedCa { pin }))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// The name a client asks for and verifies.
pub(super) fn server_name(device: &DeviceId) -> Result<ServerName<'static>, Error> {
    ServerName::try_from(dns_name(device))
        .map_err(|_| Error::General(format!("`{device}` cannot be a name in a certificate")))
}

/// Takes the CA out of the presented chain, if its fingerprint is the join token's, and then verifies
/// as usual from that root.
#[derive(Debug)]
struct PinnedCa {
    pin: Fingerprint,
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ca = intermediates
            .iter()
            .find(|certificate| Fingerprint::of(certificate) == self.pin)
            .ok_or(Error::InvalidCertificate(
                rustls::CertificateError::UnknownIssuer,
            ))?;
        let verifier = WebPkiServerVerifier::builder_with_provider(
            roots(&ca.clone().into_owned())?,
            PROVIDER.clone(),
        )
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
        let name = server_name(&DeviceId::from(DUPLICATOR))?;
        verifier.verify_server_cert(end_entity, &[], &name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &PROVIDER.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER
            .signature_verification_algorithms
            .supported_schemes()
    }
}
