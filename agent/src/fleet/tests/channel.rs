//! The control channel: who gets through, and what the others are told.

use super::{Fleet, TestDevice, loopback};
use crate::fleet::agent::heartbeat_loop;
use crate::fleet::client::{CallError, CallFailure, ControlClient};
use crate::fleet::duplicator::DeviceStatus;
use crate::fleet::enrol::join;
use crate::fleet::identity::{Identity, VerifyError, sign, verify, verify_member};
use crate::fleet::registry::Heartbeat;
use crate::fleet::server::{CONNECTIONS_EACH, PeerIdentity};
use crate::fleet::tls;
use crate::model::fleet::PeerAddress;
use axum::http::{Method, StatusCode};
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

/// The identity of a device of `theirs` that trusts the CA of `ours`: only the other side can refuse it.
fn impostor(theirs: &TestDevice, ours: &TestDevice) -> Identity {
    let read = |device: &TestDevice| -> Value {
        serde_json::from_slice(&std::fs::read(Identity::path(device.dir.path())).unwrap()).unwrap()
    };
    let mut mixed = read(theirs);
    mixed["ca"] = read(ours)["ca"].take();
    let dir = TempDir::new().unwrap();
    std::fs::write(Identity::path(dir.path()), mixed.to_string()).unwrap();
    Identity::load(dir.path()).unwrap()
}

#[tokio::test]
async fn a_server_of_another_fleet_is_refused_as_wrong_ca() {
    let (ours, theirs) = (Fleet::start().await, Fleet::start().await);
    let (a, b) = (ours.device("a").await, theirs.device("b").await);
    let error = a
        .client
        .get::<Value>(&b.address, "/v1/x")
        .await
        .unwrap_err();
    assert!(matches!(error.failure, CallFailure::WrongCa(_)), "{error}");
    assert!(!error.can_retry());
    let text = error.to_string();
    assert!(
        text.contains(&b.address.to_string()) && text.contains("/v1/x"),
        "{text}"
    );
}

#[tokio::test]
async fn a_client_of_another_fleet_is_refused_by_duplicator_and_device() {
    let (ours, theirs) = (Fleet::start().await, Fleet::start().await);
    let (a, b) = (ours.device("a").await, theirs.device("a").await);
    let client = ControlClient::new(&impostor(&b, &a)).unwrap();
    for to in [&ours.duplicator, &a.address] {
        let error = client.get::<Value>(to, "/v1/devices").await.unwrap_err();
        assert!(
            matches!(
                error.failure,
                CallFailure::Unwelcome(AlertDescription::UnknownCA)
            ),
            "{to}: {error}"
        );
    }
}

#[tokio::test]
async fn a_client_without_certificate_can_call_nothing_but_join() {
    let fleet = Fleet::start().await;
    let device = fleet.device("a").await;
    let stranger =
        ControlClient::enrolling(crate::fleet::identity::Fingerprint::of(fleet.identity.ca()))
            .unwrap();
    for path in [
        "/v1/devices",
        "/v1/heartbeat",
        "/v1/pairings/request",
        "/v1/pairings/release",
    ] {
        let error = stranger
            .post::<_, Value>(&fleet.duplicator, path, &json!({}))
            .await
            .unwrap_err();
        assert!(
            matches!(
                &error.failure,
                CallFailure::Answered {
                    status: StatusCode::UNAUTHORIZED,
                    ..
                }
            ),
            "{error}"
        );
    }
    let error = stranger
        .post::<_, Value>(&fleet.duplicator, "/v1/join", &json!({}))
        .await
        .unwrap_err();
    assert!(
        matches!(
            &error.failure,
            CallFailure::Answered {
                status: StatusCode::UNPROCESSABLE_ENTITY,
                ..
            }
        ),
        "{error}"
    );
    // To an agent it does not even speak HTTP. (Its pin makes it refuse a device's name first, so it
    // goes by a client that would trust anything under the CA.)
    let mut roots = RootCertStore::empty();
    roots.add(fleet.identity.ca().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(device.address.addr).await.unwrap();
    let mut stream = TlsConnector::from(Arc::new(config))
        .connect(ServerName::try_from("a.lifeboat").unwrap(), stream)
        .await
        .unwrap();
    let error = tokio::io::AsyncReadExt::read(&mut stream, &mut [0; 1])
        .await
        .unwrap_err();
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let fleet = Fleet::start().await;
    let mut roots = RootCertStore::empty();
    roots.add(fleet.identity.ca().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(fleet.duplicator.addr).await.unwrap();
    let error = TlsConnector::from(Arc::new(config))
        .connect(ServerName::try_from("duplicator.lifeboat").unwrap(), stream)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("ProtocolVersion"), "{error}");
}

#[tokio::test]
async fn a_device_that_answers_at_anothers_address_is_not_taken_for_it() {
    let fleet = Fleet::start().await;
    let (a, b) = (fleet.device("a").await, fleet.device("b").await);
    let moved = PeerAddress {
        device: "c".into(),
        addr: b.address.addr,
    };
    let error = a.client.get::<Value>(&moved, "/").await.unwrap_err();
    assert!(
        matches!(error.failure, CallFailure::WrongDevice(_)),
        "{error}"
    );
    let pinned = a.client.expecting(a.identity.fingerprint());
    let error = pinned.get::<Value>(&b.address, "/").await.unwrap_err();
    assert!(
        matches!(error.failure, CallFailure::OtherCertificate),
        "{error}"
    );
}

#[tokio::test]
async fn peers_that_stay_silent_do_not_hold_up_others() {
    let fleet = Fleet::start().await;
    let device = fleet.device("a").await;
    let mut silent = Vec::new();
    // Several times as many as there are places.
    for _ in 0..200 {
        silent.push(TcpStream::connect(fleet.duplicator.addr).await.unwrap());
    }
    let begun = Instant::now();
    let devices: Vec<Value> = device
        .client
        .get(&fleet.duplicator, "/v1/devices")
        .await
        .unwrap();
    assert_eq!(devices.len(), 1);
    // The silent ones are given 5 s; nobody waits for them.
    assert!(
        begun.elapsed() < Duration::from_secs(4),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn a_member_that_takes_all_its_places_leaves_those_of_others() {
    let fleet = Fleet::start().await;
    let (greedy, other) = (fleet.device("a").await, fleet.device("b").await);
    let connector = TlsConnector::from(tls::client(&greedy.identity).unwrap());
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_EACH {
        let stream = TcpStream::connect(fleet.duplicator.addr).await.unwrap();
        let name = tls::server_name(&fleet.duplicator.device).unwrap();
        let mut stream = connector.connect(name, stream).await.unwrap();
        // Heard, so that it has its place.
        let hello = b"POST /v1/none HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\nexpect: 100-continue\r\n\r\n";
        stream.write_all(hello).await.unwrap();
        let mut said = [0; 12];
        stream.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"HTTP/1.1 100");
        held.push(stream);
    }
    let devices = |device: &TestDevice| {
        let (client, duplicator) = (device.client.clone(), fleet.duplicator.clone());
        async move { client.get::<Value>(&duplicator, "/v1/devices").await }
    };
    let error = devices(&greedy).await.unwrap_err();
    assert!(error.is_away() && error.can_retry(), "{error}");
    assert!(devices(&other).await.is_ok());
    drop(held.pop());
    let again = async { while devices(&greedy).await.is_err() {} };
    tokio::time::timeout(Duration::from_secs(20), again)
        .await
        .unwrap();
}

#[test]
fn a_request_that_did_not_come_in_time_may_be_sent_again() {
    let answered = |status| CallError {
        to: PeerAddress {
            device: "b".into(),
            addr: loopback(),
        },
        method: Method::POST,
        path: "/v1/x".to_owned(),
        failure: CallFailure::Answered {
            status,
            error: String::new(),
            code: None,
        },
    };
    assert!(answered(StatusCode::REQUEST_TIMEOUT).can_retry());
    assert!(!answered(StatusCode::REQUEST_TIMEOUT).is_refusal());
    assert!(answered(StatusCode::PAYLOAD_TOO_LARGE).is_refusal());
}

#[tokio::test]
async fn nobody_there_may_be_tried_again_and_an_error_is_told_in_the_servers_words() {
    let fleet = Fleet::start().await;
    let device = fleet.device("a").await;
    let nobody = PeerAddress {
        device: "b".into(),
        addr: loopback(),
    };
    let error = device.client.get::<Value>(&nobody, "/").await.unwrap_err();
    assert!(
        matches!(error.failure, CallFailure::Connect(_)) && error.can_retry(),
        "{error}"
    );
    let error = device
        .client
        .post::<_, Value>(
            &fleet.duplicator,
            "/v1/pairings/release",
            &json!({ "pairing": "pr-0", "outcome": "done", "costs": [] }),
        )
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some("pairing-unknown"), "{error}");
    assert!(
        error.to_string().contains("there is no pairing pr-0"),
        "{error}"
    );
    assert!(!error.can_retry());
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused() {
    let fleet = Fleet::start().await;
    let device = fleet.device("a").await;
    let much = "x".repeat(crate::fleet::server::BODY_LIMIT + 1);
    let error = device
        .client
        .post::<_, Value>(&fleet.duplicator, "/v1/heartbeat", &much)
        .await
        .unwrap_err();
    // The server may close before it read all of it: then the connection broke.
    assert!(
        matches!(
            &error.failure,
            CallFailure::Answered {
                status: StatusCode::PAYLOAD_TOO_LARGE,
                ..
            } | CallFailure::Broken(_)
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_replaced_certificate_is_not_heard_any_more() {
    let fleet = Fleet::start().await;
    let old = fleet.device("a").await;
    let dir = TempDir::new().unwrap();
    let token = fleet.token(Some("a"), Duration::from_secs(60)).await;
    let new = join(dir.path(), &token, "a".into(), loopback())
        .await
        .unwrap();
    let error = old
        .client
        .get::<Value>(&fleet.duplicator, "/v1/devices")
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some("certificate-replaced"), "{error}");
    let new = ControlClient::new(&new).unwrap();
    let devices: Value = new.get(&fleet.duplicator, "/v1/devices").await.unwrap();
    assert_eq!(devices[0]["id"], "a");
}

#[tokio::test]
async fn only_the_duplicators_certificate_makes_a_duplicator() {
    let fleet = Fleet::start().await;
    let (a, b) = (fleet.device("a").await, fleet.device("b").await);
    let error = a
        .client
        .post::<_, ()>(&b.address, "/v1/pairings/end", "pr-0")
        .await
        .unwrap_err();
    assert!(error.to_string().contains("only the duplicator"), "{error}");
    let duplicator = ControlClient::new(&fleet.identity).unwrap();
    let () = duplicator
        .post(&b.address, "/v1/pairings/end", "pr-0")
        .await
        .unwrap();
    let peer = PeerIdentity {
        device: "a".into(),
        is_duplicator: false,
        certificate_fingerprint: a.identity.fingerprint(),
    };
    assert!(peer.require_duplicator().is_err());
}

#[tokio::test]
async fn a_signature_counts_for_its_bytes_its_certificate_and_this_fleet_only() {
    let (ours, theirs) = (Fleet::start().await, Fleet::start().await);
    let (a, b, foreign) = (
        ours.device("a").await.identity,
        ours.device("b").await.identity,
        theirs.device("a").await.identity,
    );
    let signature = sign(&a, b"release").unwrap();
    assert_eq!(
        verify(a.certificate(), b"release", &signature).unwrap(),
        "a".into()
    );
    assert_eq!(
        verify_member(&b, a.certificate(), b"release", &signature).unwrap(),
        "a".into()
    );
    for (certificate, bytes) in [
        (a.certificate(), &b"other"[..]),
        (b.certificate(), b"release"),
    ] {
        assert!(matches!(
            verify(certificate, bytes, &signature),
            Err(VerifyError::Signature { .. })
        ));
    }
    let signature = sign(&foreign, b"release").unwrap();
    assert!(matches!(
        verify_member(&b, foreign.certificate(), b"release", &signature),
        Err(VerifyError::WrongCa { .. })
    ));
    assert!(tls::check_member(&b, a.certificate()).is_ok());
    assert!(matches!(
        verify(b"no certificate", b"", b""),
        Err(VerifyError::Certificate(_))
    ));
}

#[tokio::test]
async fn heartbeats_make_a_device_live_and_stop_when_told() {
    let fleet = Fleet::start().await;
    let device = fleet.device("a").await;
    let stop = CancellationToken::new();
    let sample = || async {
        Heartbeat {
            address: loopback(),
            version: "0".to_owned(),
            uptime_seconds: 1,
            configuration: super::configuration(),
            utilisation: super::utilisation(),
            plans: Vec::new(),
            compared: Default::default(),
        }
    };
    let beating = tokio::spawn(heartbeat_loop(
        device.client.clone(),
        fleet.duplicator.clone(),
        sample,
        |_| {},
        Default::default(),
        stop.clone(),
    ));
    let live = async {
        loop {
            let devices: Vec<DeviceStatus> = device
                .client
                .get(&fleet.duplicator, "/v1/devices")
                .await
                .unwrap();
            if devices[0].live {
                return devices;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let devices = tokio::time::timeout(Duration::from_secs(5), live)
        .await
        .unwrap();
    assert_eq!(
        devices[0].device.configuration,
        Some(super::configuration())
    );
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(1), beating)
        .await
        .unwrap()
        .unwrap();
}
