//! Pairing end to end, and every way in which a token must not work.

use super::{Fleet, TestDevice, configuration, loopback};
use crate::fleet::agent::{PairedState, TokenRefused};
use crate::fleet::enrol::join;
use crate::fleet::now;
use crate::fleet::pairing::{
    AuthoriseRequest, LetIn, Notice, PairError, PairingRequest, pair, release,
};
use crate::fleet::registry::ActionCost;
use crate::fleet::secret::Secret;
use crate::fleet::server::{ControlServer, PeerIdentity};
use crate::fleet::token::{Claims, SealedToken, TokenError, TokenNonce, open, seal};
use crate::model::action::Action;
use crate::model::fleet::{DutyOutcome, PeerAddress, Role, TwinNeeds};
use crate::model::ids::{PlanId, VolumeId};
use crate::model::units::{Bytes, UnixMillis};
use axum::Json;
use axum::routing::post;
use proptest::prelude::*;
use serde_json::json;
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

fn request(plan: &str) -> PairingRequest {
    PairingRequest {
        plan: plan.into(),
        role: Role::Paired,
        actions: [Action::Encrypt, Action::Transfer].into_iter().collect(),
        quantity: Bytes(1 << 30),
        volumes: vec![VolumeId(0), VolumeId(1)],
        twins: TwinNeeds::default(),
        exclude: Vec::new(),
        configuration: configuration(),
    }
}

async fn fleet_of_three() -> (Fleet, TestDevice, TestDevice, TestDevice) {
    let fleet = Fleet::start().await;
    let (s, p, t) = (
        fleet.device("s").await,
        fleet.device("p").await,
        fleet.device("t").await,
    );
    for device in [&s, &p, &t] {
        device.beat(&fleet, Vec::new()).await;
    }
    (fleet, s, p, t)
}

#[tokio::test]
async fn a_pairing_goes_from_request_to_authorisation_and_back() {
    let (fleet, s, p, t) = fleet_of_three().await;
    let mut wanted = request("plan-1");
    wanted.exclude = vec!["t".into()];
    let pairing = pair(&s.client, &fleet.duplicator, &wanted).await.unwrap();
    assert_eq!(pairing.peer, p.address);
    assert_eq!(pairing.peer_fingerprint, p.identity.fingerprint());
    assert_eq!(pairing.actions, wanted.actions);
    assert_eq!(pairing.explanation.len(), 3, "{:?}", pairing.explanation);

    let plan = PlanId::from("plan-1");
    let allowed = p.state.authorised(&plan, &"s".into()).unwrap();
    assert_eq!(
        (allowed.actions, allowed.volumes),
        (wanted.actions, wanted.volumes)
    );
    assert!(p.state.authorised(&plan, &"t".into()).is_none());
    assert!(p.state.authorised(&"plan-2".into(), &"s".into()).is_none());
    assert!(t.state.authorised(&plan, &"s".into()).is_none());

    let cost = ActionCost {
        action: Action::Encrypt,
        bytes: Bytes(1 << 30),
        core_nanos: 1 << 30,
    };
    for _ in 0..2 {
        let ended = release(
            &s.client,
            &fleet.duplicator,
            &pairing.id,
            DutyOutcome::Done,
            vec![cost],
        );
        assert_eq!(ended.await.unwrap().outcome, Some(DutyOutcome::Done));
    }
    assert!(
        p.state.authorised(&plan, &"s".into()).is_none(),
        "an ended pairing allows nothing"
    );
}

#[tokio::test]
async fn a_target_is_chosen_by_what_the_twins_need() {
    let (fleet, s, _p, _t) = fleet_of_three().await;
    let mut wanted = request("plan-1");
    wanted.role = Role::Target;
    wanted.actions = Default::default();
    wanted.twins.ports = [8080].into();
    wanted.twins.ipv4 = true;
    let pairing = pair(&s.client, &fleet.duplicator, &wanted).await.unwrap();
    assert_eq!(pairing.role, Role::Target);
    wanted.plan = "plan-2".into();
    wanted.twins.ports = [22].into();
    let error = pair(&s.client, &fleet.duplicator, &wanted)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("port 22 is taken"), "{error}");
}

#[tokio::test]
async fn a_source_without_heartbeat_is_asked_for_its_configuration() {
    let fleet = Fleet::start().await;
    let (s, p) = (fleet.device("s").await, fleet.device("p").await);
    p.beat(&fleet, Vec::new()).await;
    let ask = json!({ "plan": "plan-1", "role": "paired", "actions": ["encrypt"], "quantity": 1,
        "volumes": [], "twins": TwinNeeds::default(), "exclude": [], "configuration": null });
    let answer: serde_json::Value = s
        .client
        .post(&fleet.duplicator, "/v1/pairings/request", &ask)
        .await
        .unwrap();
    assert_eq!(answer["answer"], "configuration-needed");
    let pairing = pair(&s.client, &fleet.duplicator, &request("plan-1"))
        .await
        .unwrap();
    assert_eq!(pairing.peer.device, "p".into());
}

#[tokio::test]
async fn a_device_that_does_not_answer_is_passed_over_and_the_explanation_says_so() {
    let (fleet, s, mut p, _t) = fleet_of_three().await;
    p.stop.take();
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    let pairing = pair(&s.client, &fleet.duplicator, &request("plan-1"))
        .await
        .unwrap();
    assert_eq!(pairing.peer.device, "t".into());
    let gone = pairing
        .explanation
        .iter()
        .find(|one| one.device == "p".into())
        .unwrap();
    assert!(
        !gone.accepted && gone.reasons[0].contains("could not be notified"),
        "{gone}"
    );
}

#[tokio::test]
async fn a_device_whose_token_lies_is_given_back_and_another_one_taken() {
    let (fleet, s, p, _t) = fleet_of_three().await;
    // In p's place somebody with p's certificate answers, but without the pairing's secret.
    drop(p.stop);
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    let server = ControlServer::bind(&p.identity, p.address.addr)
        .await
        .unwrap();
    let liar = axum::Router::new()
        .route("/v1/pairings", post(async || Json(())))
        .route("/v1/pairings/end", post(async || Json(())))
        .route(
            "/v1/tokens/issue",
            post(async || {
                let notice = claims("pr-0", "plan-1");
                Json(seal(&Secret::random(), &notice).unwrap())
            }),
        );
    tokio::spawn(server.serve(liar, Default::default()));
    let pairing = pair(&s.client, &fleet.duplicator, &request("plan-1"))
        .await
        .unwrap();
    assert_eq!(pairing.peer.device, "t".into());
    let liar = pairing
        .explanation
        .iter()
        .find(|one| one.device == "p".into())
        .unwrap();
    assert!(liar.reasons[0].contains("another secret"), "{liar}");
}

#[tokio::test]
async fn a_lent_device_whose_clock_is_behind_is_paired_with() {
    let (fleet, s, p, _t) = fleet_of_three().await;
    // In p's place answers one whose tokens are over by the clock of everybody else.
    drop(p.stop);
    let server = loop {
        match ControlServer::bind(&p.identity, p.address.addr).await {
            Ok(server) => break server,
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    };
    let known: Arc<Mutex<Option<Notice>>> = Arc::default();
    let issued = known.clone();
    let behind = axum::Router::new()
        .route(
            "/v1/pairings",
            post(async move |Json(notice): Json<Notice>| {
                *known.lock().unwrap() = Some(notice);
                Json(())
            }),
        )
        .route(
            "/v1/tokens/issue",
            post(async move || {
                let notice = issued.lock().unwrap().clone().unwrap();
                let expires = UnixMillis(now().0 - 60 * 60_000);
                let claims = Claims {
                    expires,
                    ..notice.claims()
                };
                Json(seal(&notice.secret, &claims).unwrap())
            }),
        )
        .route("/v1/authorise", post(async || Json(())));
    tokio::spawn(server.serve(behind, Default::default()));
    let mut wanted = request("plan-1");
    wanted.exclude = vec!["t".into()];
    let pairing = pair(&s.client, &fleet.duplicator, &wanted).await.unwrap();
    assert_eq!(pairing.peer.device, "p".into());
}

#[test]
fn a_pairing_takes_the_place_of_an_earlier_one_of_its_plan_whose_end_was_not_heard() {
    let (_dir, state, [first, second], source) = lent();
    let allow = |plan: &str, pairing: &str| {
        let token = state.issue(&pairing.into(), &source).unwrap();
        state.authorise(&ask(plan, token), &source, now()).unwrap();
    };
    allow("plan-1", "pr-1");
    allow("plan-2", "pr-2");
    // Announced again it stays as it is.
    state.announce(second).unwrap();
    let anew = Notice {
        pairing: "pr-3".into(),
        volumes: vec![VolumeId(8)],
        ..first
    };
    state.announce(anew).unwrap();
    assert!(state.authorised(&"plan-1".into(), &"s".into()).is_none());
    assert!(state.authorised(&"plan-2".into(), &"s".into()).is_some());
    allow("plan-1", "pr-3");
    let allowed = state.authorised(&"plan-1".into(), &"s".into()).unwrap();
    assert_eq!(allowed.volumes, [VolumeId(8)]);
}

#[tokio::test]
async fn nobody_fits_is_said_candidate_by_candidate() {
    let (fleet, s, _p, _t) = fleet_of_three().await;
    let mut wanted = request("plan-1");
    wanted.quantity = Bytes(1 << 50);
    match pair(&s.client, &fleet.duplicator, &wanted).await {
        Err(PairError::NobodyFits { explanation, .. }) => {
            assert_eq!(explanation.len(), 3);
            let said: Vec<String> = explanation.iter().map(ToString::to_string).collect();
            assert!(
                said.iter()
                    .any(|one| one.contains("s: no (it is the source)")),
                "{said:?}"
            );
            assert!(
                said.iter()
                    .any(|one| one.contains("storage: 70.0 GiB free")),
                "{said:?}"
            );
        }
        other => panic!("expected nobody, got {other:?}"),
    }
}

fn claims(pairing: &str, plan: &str) -> Claims {
    Claims {
        pairing: pairing.into(),
        plan: plan.into(),
        source: "s".into(),
        device: "p".into(),
        role: Role::Paired,
        actions: [Action::Encrypt].into_iter().collect(),
        volumes: vec![VolumeId(7)],
        expires: UnixMillis(now().0 + 60_000),
        nonce: TokenNonce::random(),
    }
}

/// The state of p with two pairings of s announced, and s as a peer.
fn lent() -> (TempDir, PairedState, [Notice; 2], PeerIdentity) {
    let dir = TempDir::new().unwrap();
    let state = PairedState::open(dir.path(), "p".into()).unwrap();
    let source = PeerIdentity {
        device: "s".into(),
        is_duplicator: false,
        certificate_fingerprint: crate::fleet::identity::Fingerprint::of(b"s"),
    };
    let notice = |pairing: &str, plan: &str| Notice {
        pairing: pairing.into(),
        plan: plan.into(),
        role: Role::Paired,
        source: "s".into(),
        device: "p".into(),
        actions: [Action::Encrypt].into_iter().collect(),
        volumes: vec![VolumeId(7)],
        quantity: Bytes(1),
        expires: UnixMillis(now().0 + 3_600_000),
        peer: PeerAddress {
            device: "s".into(),
            addr: loopback(),
        },
        peer_fingerprint: source.certificate_fingerprint,
        secret: Secret::random(),
    };
    let notices = [notice("pr-1", "plan-1"), notice("pr-2", "plan-2")];
    for notice in &notices {
        state.announce(notice.clone()).unwrap();
    }
    (dir, state, notices, source)
}

fn ask(plan: &str, token: SealedToken) -> AuthoriseRequest {
    AuthoriseRequest {
        plan: plan.into(),
        actions: [Action::Encrypt].into_iter().collect(),
        token,
    }
}

#[test]
fn a_token_is_accepted_once_also_after_a_restart() {
    let (dir, state, _, source) = lent();
    let used = state.issue(&"pr-1".into(), &source).unwrap();
    let unused = state.issue(&"pr-1".into(), &source).unwrap();
    state
        .authorise(&ask("plan-1", used.clone()), &source, now())
        .unwrap();
    let replayed = state.authorise(&ask("plan-1", used.clone()), &source, now());
    assert!(
        matches!(replayed, Err(TokenRefused::Replayed)),
        "{replayed:?}"
    );
    drop(state);
    let state = PairedState::open(dir.path(), "p".into()).unwrap();
    let replayed = state.authorise(&ask("plan-1", used), &source, now());
    assert!(
        matches!(replayed, Err(TokenRefused::Replayed)),
        "{replayed:?}"
    );
    assert!(
        state.authorised(&"plan-1".into(), &"s".into()).is_some(),
        "a consent outlives a restart"
    );
    state
        .authorise(&ask("plan-1", unused), &source, now())
        .unwrap();
}

#[test]
fn each_wrong_token_is_refused_in_its_own_words() {
    let (_dir, state, [first, _], source) = lent();
    let issue = || state.issue(&"pr-1".into(), &source).unwrap();
    let code = |ask: &AuthoriseRequest, peer: &PeerIdentity, at: UnixMillis| {
        state.authorise(ask, peer, at).unwrap_err().code()
    };
    let later = UnixMillis(now().0 + 6 * 60_000);
    assert_eq!(code(&ask("plan-1", issue()), &source, later), "expired");
    assert_eq!(code(&ask("plan-2", issue()), &source, now()), "other-plan");

    let mut more = ask("plan-1", issue());
    more.actions = [Action::Encrypt, Action::Serve].into_iter().collect();
    assert_eq!(code(&more, &source, now()), "other-actions");

    let other = PeerIdentity {
        device: "x".into(),
        ..source.clone()
    };
    assert_eq!(code(&ask("plan-1", issue()), &other, now()), "other-peer");
    let other = PeerIdentity {
        certificate_fingerprint: crate::fleet::identity::Fingerprint::of(b"new"),
        ..source.clone()
    };
    assert_eq!(code(&ask("plan-1", issue()), &other, now()), "other-peer");

    // The token of one pairing shown as another's: its secret is another.
    let mut moved = issue();
    moved.pairing = "pr-2".into();
    assert_eq!(code(&ask("plan-2", moved), &source, now()), "wrong-secret");
    let mut unknown = issue();
    unknown.pairing = "pr-3".into();
    assert_eq!(
        code(&ask("plan-1", unknown), &source, now()),
        "pairing-unknown"
    );
    // Made by the source, who knows the secret as well.
    let forged = seal(&first.secret, &first.claims()).unwrap();
    assert_eq!(
        code(&ask("plan-1", forged), &source, now()),
        "not-issued-here"
    );
    assert!(state.authorised(&"plan-1".into(), &"s".into()).is_none());
    assert!(state.authorised(&"plan-2".into(), &"s".into()).is_none());

    assert!(
        state.issue(&"pr-1".into(), &other).is_err(),
        "tokens are issued to the source only"
    );
    state.end(&"pr-1".into()).unwrap();
    let end = state.issue(&"pr-1".into(), &source);
    assert!(
        matches!(end, Err(TokenRefused::PairingUnknown(_))),
        "{end:?}"
    );
}

#[test]
fn a_pairing_counts_for_the_certificate_that_it_is_with() {
    let (_dir, state, _, source) = lent();
    let replaced = PeerIdentity {
        certificate_fingerprint: crate::fleet::identity::Fingerprint::of(b"old"),
        ..source.clone()
    };
    let check = |plan: &str, peer: &PeerIdentity| {
        let checked = state.check_certificate(&plan.into(), peer);
        checked.map_err(|error| error.code())
    };
    assert_eq!(check("plan-1", &source), Ok(()));
    assert_eq!(check("plan-1", &replaced), Err("other-peer"));
    assert_eq!(check("plan-9", &replaced), Ok(()), "it is no pairing's");
}

#[tokio::test]
async fn a_replaced_certificate_is_told_no_secret_and_let_in_only_where_it_was_before() {
    let (fleet, s, p, _t) = fleet_of_three().await;
    let duplicator = &fleet.duplicator;
    let old = PeerIdentity {
        device: "p".into(),
        is_duplicator: false,
        certificate_fingerprint: p.identity.fingerprint(),
    };
    let let_in = LetIn::default();
    let refuses = async |plan: &str, peer: &PeerIdentity| {
        let plan = plan.into();
        let_in.refuses(&s.client, duplicator, &plan, peer).await
    };
    assert!(!refuses("plan-1", &old).await);
    // Enrolled anew, while the agent with the old one still runs.
    let dir = TempDir::new().unwrap();
    let minute = std::time::Duration::from_secs(60);
    let token = fleet.token(Some("p"), minute).await;
    let new = join(dir.path(), &token, "p".into(), p.address.addr)
        .await
        .unwrap();
    assert!(!refuses("plan-1", &old).await, "nobody is asked again");
    assert!(refuses("plan-2", &old).await);
    assert!(refuses("plan-2", &old).await);
    let_in.forget(&"plan-1".into());
    assert!(refuses("plan-1", &old).await);
    let new = PeerIdentity {
        certificate_fingerprint: new.fingerprint(),
        ..old
    };
    assert!(!refuses("plan-2", &new).await);

    let mut wanted = request("plan-1");
    wanted.exclude = vec!["t".into()];
    let error = pair(&s.client, duplicator, &wanted).await.unwrap_err();
    let said = error.to_string();
    assert!(said.contains("could not be notified"), "{said}");
    assert!(said.contains("another certificate"), "{said}");
    drop(fleet);
    let (nobody, plan) = (&p.address, "plan-3".into());
    let refused = let_in.refuses(&s.client, nobody, &plan, &new).await;
    assert!(!refused, "it cannot be asked there");
}

#[test]
fn a_notice_for_another_device_is_not_entered() {
    let (_dir, state, [mut notice, _], _) = lent();
    notice.device = "q".into();
    assert!(state.announce(notice).is_err());
}

#[test]
fn every_field_of_a_token_is_compared() {
    let expected = claims("pr-1", "plan-1");
    let now = now();
    assert_eq!(expected.check(&expected, now), Ok(()));
    let changes: [fn(&mut Claims); 8] = [
        |c| c.pairing = "pr-2".into(),
        |c| c.plan = "plan-2".into(),
        |c| c.source = "x".into(),
        |c| c.device = "x".into(),
        |c| c.role = Role::Target,
        |c| c.actions = [Action::Serve].into_iter().collect(),
        |c| c.volumes.clear(),
        |c| c.expires.0 += 1,
    ];
    for change in changes {
        let mut other = expected.clone();
        change(&mut other);
        let refused = other.check(&expected, now);
        assert!(
            matches!(refused, Err(TokenError::Differs { .. })),
            "{other:?}: {refused:?}"
        );
    }
    assert_eq!(
        expected.check(&expected, expected.expires),
        Err(TokenError::Expired)
    );
}

proptest! {
    #[test]
    fn no_altered_token_opens(place in 0usize..4096, flip in 1u8..) {
        let secret = Secret::from_bytes([7; 32]);
        let token = seal(&secret, &claims("pr-1", "plan-1")).unwrap();
        let mut json = serde_json::to_value(&token).unwrap();
        prop_assert!(open(&secret, &token).is_ok());
        // Flip bits of one byte of one of the token's binary fields.
        let fields = ["key_id", "nonce", "sealed"];
        let field = fields[place % 3];
        let mut bytes = hex::decode(json[field].as_str().unwrap()).unwrap();
        let at = place / 3 % bytes.len();
        bytes[at] ^= flip;
        json[field] = hex::encode(bytes).into();
        let altered: SealedToken = serde_json::from_value(json).unwrap();
        prop_assert!(matches!(
            open(&secret, &altered),
            Err(TokenError::Altered | TokenError::WrongSecret)
        ));
    }

    #[test]
    fn only_the_pairings_secret_opens_a_token(other: [u8; 32]) {
        let token = seal(&Secret::from_bytes([7; 32]), &claims("pr-1", "plan-1")).unwrap();
        prop_assume!(other != [7; 32]);
        prop_assert_eq!(open(&Secret::from_bytes(other), &token), Err(TokenError::WrongSecret));
    }
}
