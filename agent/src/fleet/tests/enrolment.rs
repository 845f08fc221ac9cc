//! Join tokens: what they are good for, and what not.

use super::{Fleet, loopback};
use crate::fleet::ca::Ca;
use crate::fleet::client::CallFailure;
use crate::fleet::enrol::{JoinError, JoinToken, join};
use crate::fleet::identity::{Identity, IdentityError, check_id, device_of, request};
use crate::fleet::sqlite::SqliteRegistry;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

const MINUTE: Duration = Duration::from_secs(60);

async fn try_join(token: &JoinToken, id: &str) -> Result<Identity, JoinError> {
    let dir = TempDir::new().unwrap();
    let joined = join(dir.path(), token, id.into(), loopback()).await;
    let stored = Identity::path(dir.path()).exists();
    assert_eq!(
        joined.is_ok(),
        stored,
        "an identity is stored if and only if it was given"
    );
    joined
}

fn code(joined: Result<Identity, JoinError>) -> String {
    match joined {
        Err(JoinError::Call(error)) => error.code().unwrap_or("none").to_owned(),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn a_join_token_works_once() {
    let fleet = Fleet::start().await;
    let token = fleet.token(None, MINUTE).await;
    let identity = try_join(&token, "a").await.unwrap();
    assert_eq!(identity.device(), &"a".into());
    assert_eq!(identity.fleet_key(), fleet.identity.fleet_key());
    assert_eq!(code(try_join(&token, "b").await), "join-token-used");
    assert_eq!(code(try_join(&token, "a").await), "join-token-used");
}

#[tokio::test]
async fn a_join_token_expires() {
    let fleet = Fleet::start().await;
    let token = fleet.token(None, Duration::ZERO).await;
    assert_eq!(code(try_join(&token, "a").await), "join-token-expired");
}

#[tokio::test]
async fn a_join_token_for_one_device_is_of_no_use_to_another() {
    let fleet = Fleet::start().await;
    let token = fleet.token(Some("a"), MINUTE).await;
    assert_eq!(code(try_join(&token, "b").await), "join-token-for-another");
    // The attempt did not use it up.
    try_join(&token, "a").await.unwrap();
}

#[tokio::test]
async fn a_device_is_replaced_only_by_a_token_that_names_it() {
    let fleet = Fleet::start().await;
    let first = try_join(&fleet.token(None, MINUTE).await, "a")
        .await
        .unwrap();
    assert_eq!(
        code(try_join(&fleet.token(None, MINUTE).await, "a").await),
        "device-exists"
    );
    let second = try_join(&fleet.token(Some("a"), MINUTE).await, "a")
        .await
        .unwrap();
    assert_ne!(first.fingerprint(), second.fingerprint());
}

#[tokio::test]
async fn a_token_of_another_fleet_is_unknown_and_its_ca_is_not_trusted() {
    let (ours, theirs) = (Fleet::start().await, Fleet::start().await);
    let theirs = serde_json::to_value(theirs.token(None, MINUTE).await).unwrap();
    let mut ours = serde_json::to_value(ours.token(None, MINUTE).await).unwrap();
    // Their secret under our CA: refused by the duplicator.
    let our_ca = ours["ca"].clone();
    ours["secret"] = theirs["secret"].clone();
    let token = serde_json::from_value(ours.clone()).unwrap();
    assert_eq!(code(try_join(&token, "a").await), "join-token-unknown");
    // Our address under their CA: refused by the device, before it says its secret.
    ours["ca"] = theirs["ca"].clone();
    assert_ne!(ours["ca"], our_ca);
    let token = serde_json::from_value(ours).unwrap();
    match try_join(&token, "a").await {
        Err(JoinError::Call(error)) => {
            assert!(matches!(error.failure, CallFailure::WrongCa(_)), "{error}");
        }
        other => panic!("expected a wrong CA, got {other:?}"),
    }
}

#[tokio::test]
async fn a_join_token_survives_printing_and_a_damaged_one_is_told() {
    let fleet = Fleet::start().await;
    let printed = fleet.token(None, MINUTE).await.to_string();
    let read: JoinToken = format!("  {printed}\n").parse().unwrap();
    assert_eq!(read.to_string(), printed);
    for damaged in [
        &printed[1..],
        &printed[..printed.len() - 1],
        &printed[..40],
        "",
        "hello",
    ] {
        assert!(damaged.parse::<JoinToken>().is_err(), "{damaged}");
    }
}

#[tokio::test]
async fn what_is_secret_is_for_its_owner_only_and_an_identity_is_never_overwritten() {
    let fleet = Fleet::start().await;
    let device = fleet.device("a").await;
    let dir = fleet.dir.path();
    for path in [
        Identity::path(dir),
        dir.join("ca.json"),
        SqliteRegistry::path(dir),
        SqliteRegistry::path(dir).with_extension("sqlite-wal"),
        Identity::path(device.dir.path()),
    ] {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    let again = crate::fleet::ca::init(dir, loopback());
    assert!(matches!(again, Err(IdentityError::Present { .. })));
    let token = fleet.token(None, MINUTE).await;
    let again = join(device.dir.path(), &token, "b".into(), loopback()).await;
    assert!(matches!(
        again,
        Err(JoinError::Identity(IdentityError::Present { .. }))
    ));
}

#[tokio::test]
async fn the_ca_takes_nothing_but_the_key_from_a_request() {
    let fleet = Fleet::start().await;
    let ca = Ca::load(fleet.dir.path()).unwrap();
    let (_, csr) = request(&"duplicator".into()).unwrap();
    let issued = ca.issue(&csr, &"a".into()).unwrap();
    let der = crate::fleet::identity::parse_pem(&issued).unwrap();
    assert_eq!(device_of(&der).unwrap(), "a".into());
    assert!(ca.issue("no request", &"a".into()).is_err());
}

#[test]
fn device_ids_are_dns_labels_and_not_the_duplicators() {
    for good in ["a", "edge-7", "0", &"x".repeat(63)] {
        assert!(check_id(&good.into()).is_ok(), "{good}");
    }
    for bad in [
        "",
        "A",
        "a.b",
        "-a",
        "a-",
        "a b",
        "ä",
        "duplicator",
        &"x".repeat(64),
    ] {
        assert!(check_id(&bad.into()).is_err(), "{bad}");
    }
}
