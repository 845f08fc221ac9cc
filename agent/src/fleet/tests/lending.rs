//! The SQLite engine: what is lent, to whom, how often.

use super::{configuration, loopback, utilisation};
use crate::fleet::allocate::{Admission, Need, Rules};
use crate::fleet::identity::Fingerprint;
use crate::fleet::registry::{
    ActionCost, Allocation, Ask, Enrolment, Heartbeat, Invitation, Registry, RegistryError,
};
use crate::fleet::sqlite::SqliteRegistry;
use crate::model::action::{Action, Actions};
use crate::model::fleet::{DutyOutcome, Role, TwinNeeds};
use crate::model::ids::PlanId;
use crate::model::units::{Bytes, UnixMillis};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);
const RULES: Rules = Rules {
    live_within: Duration::from_secs(15),
    horizon: Duration::from_secs(3600),
    max_pairings: 1000,
};

async fn enter(registry: &SqliteRegistry, id: &str, number: u8) {
    registry
        .invite(Invitation {
            secret_hash: [number; 32],
            device: None,
            expires: UnixMillis(NOW.0 + 1),
        })
        .await
        .unwrap();
    let enrolment = Enrolment {
        device: id.into(),
        address: loopback(),
        fingerprint: Fingerprint::of(id.as_bytes()),
    };
    registry.enrol([number; 32], enrolment, NOW).await.unwrap();
    beat(registry, id, &[], NOW).await;
}

async fn beat(registry: &SqliteRegistry, id: &str, plans: &[&str], at: UnixMillis) -> usize {
    let heartbeat = Heartbeat {
        address: loopback(),
        version: String::new(),
        uptime_seconds: 0,
        configuration: configuration(),
        utilisation: utilisation(),
        plans: plans.iter().map(|plan| PlanId::from(*plan)).collect(),
        compared: Default::default(),
    };
    let before = UnixMillis(at.0 - 15_000);
    registry
        .heartbeat(id.into(), heartbeat, before, at)
        .await
        .unwrap()
        .len()
}

async fn registry(path: &Path, devices: &[&str]) -> SqliteRegistry {
    let registry = SqliteRegistry::open(path).unwrap();
    for (number, id) in (1..).zip(devices) {
        enter(&registry, id, number).await;
    }
    registry
}

fn ask(plan: &str, gib: u64) -> Ask {
    Ask {
        plan: plan.into(),
        volumes: Vec::new(),
        need: Need {
            source: "s".into(),
            configuration: configuration(),
            role: Role::Paired,
            actions: [Action::Transfer].into_iter().collect(),
            quantity: Bytes(gib << 30),
            twins: TwinNeeds::default(),
            exclude: BTreeMap::new(),
        },
        expires: UnixMillis(NOW.0 + 3_600_000),
    }
}

fn lent(allocation: &Allocation) -> Option<&str> {
    allocation
        .lending
        .as_ref()
        .map(|one| one.pairing.device.as_str())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_duplicators_on_one_registry_never_lend_beyond_capacity() {
    let dir = TempDir::new().unwrap();
    let path = SqliteRegistry::path(dir.path());
    let first = registry(&path, &["s", "p", "q"]).await;
    let second = SqliteRegistry::open(&path).unwrap();
    let mut asking = Vec::new();
    for number in 0..40 {
        let registry = if number % 2 == 0 { &first } else { &second }.clone();
        asking.push(tokio::spawn(async move {
            registry
                .allocate(ask(&format!("plan-{number}"), 10), RULES, NOW)
                .await
                .unwrap()
        }));
    }
    let mut lent_to: BTreeMap<String, u64> = BTreeMap::new();
    for asked in asking {
        if let Some(device) = lent(&asked.await.unwrap()) {
            *lent_to.entry(device.to_owned()).or_default() += 1;
        }
    }
    // Each has 70 GiB free and every pairing spools 10.
    assert_eq!(
        lent_to,
        BTreeMap::from([("p".to_owned(), 7), ("q".to_owned(), 7)])
    );
}

#[tokio::test]
async fn asking_again_for_the_same_plan_gives_the_same_pairing_until_the_device_is_excluded() {
    let dir = TempDir::new().unwrap();
    let registry = registry(&SqliteRegistry::path(dir.path()), &["s", "p", "q"]).await;
    let first = registry
        .allocate(ask("plan", 60), RULES, NOW)
        .await
        .unwrap();
    let again = registry
        .allocate(ask("plan", 60), RULES, NOW)
        .await
        .unwrap();
    let id = |allocation: &Allocation| allocation.lending.as_ref().unwrap().pairing.id.clone();
    assert_eq!(id(&first), id(&again));
    assert_eq!(
        first.lending.as_ref().unwrap().secret,
        again.lending.as_ref().unwrap().secret
    );
    let mut other = ask("plan", 60);
    other
        .need
        .exclude
        .insert("p".into(), "did not answer".to_owned());
    let other = registry.allocate(other, RULES, NOW).await.unwrap();
    assert_eq!((lent(&first), lent(&other)), (Some("p"), Some("q")));
    let ended = registry.pairing(id(&first)).await.unwrap();
    assert_eq!(ended.outcome, Some(DutyOutcome::Abandoned));
}

#[tokio::test]
async fn a_release_frees_the_capacity_and_books_history_once() {
    let dir = TempDir::new().unwrap();
    let registry = registry(&SqliteRegistry::path(dir.path()), &["s", "p"]).await;
    let first = registry
        .allocate(ask("plan-1", 60), RULES, NOW)
        .await
        .unwrap();
    let full = registry
        .allocate(ask("plan-2", 60), RULES, NOW)
        .await
        .unwrap();
    assert_eq!((lent(&first), lent(&full)), (Some("p"), None));
    let id = first.lending.unwrap().pairing.id;
    let cost = ActionCost {
        action: Action::Transfer,
        bytes: Bytes(60 << 30),
        core_nanos: 2 * (60 << 30),
    };
    for outcome in [DutyOutcome::Done, DutyOutcome::Failed] {
        let ended = registry
            .release(id.clone(), outcome, vec![cost], NOW)
            .await
            .unwrap();
        assert_eq!(
            ended.outcome,
            Some(DutyOutcome::Done),
            "the first outcome stands"
        );
    }
    let p = registry.devices().await.unwrap().swap_remove(0);
    assert_eq!(
        (p.id.as_str(), p.completed, p.failed, p.lent),
        ("p", 1, 0, 0)
    );
    let next = registry
        .allocate(ask("plan-2", 60), RULES, NOW)
        .await
        .unwrap();
    let said = next.explanation[0].to_string();
    assert!(
        said.contains("transfer 2.000 ns/B by its own history"),
        "{said}"
    );
}

#[tokio::test]
async fn pairings_of_plans_that_their_source_does_not_drive_are_given_back() {
    let dir = TempDir::new().unwrap();
    let registry = registry(&SqliteRegistry::path(dir.path()), &["s", "p"]).await;
    registry
        .allocate(ask("plan-1", 60), RULES, NOW)
        .await
        .unwrap();
    let at = |seconds: u64| UnixMillis(NOW.0 + seconds * 1000);
    assert_eq!(
        beat(&registry, "s", &[], at(5)).await,
        0,
        "it may have just begun"
    );
    assert_eq!(beat(&registry, "s", &["plan-1"], at(60)).await, 0);
    assert_eq!(
        beat(&registry, "p", &[], at(60)).await,
        0,
        "only the source gives back"
    );
    assert_eq!(beat(&registry, "s", &["plan-2"], at(60)).await, 1);
    let next = registry
        .allocate(ask("plan-2", 60), RULES, at(60))
        .await
        .unwrap();
    assert_eq!(lent(&next), Some("p"));
}

#[tokio::test]
async fn a_pairing_that_expired_lends_nothing_any_more() {
    let dir = TempDir::new().unwrap();
    let registry = registry(&SqliteRegistry::path(dir.path()), &["s", "p"]).await;
    registry
        .allocate(ask("plan-1", 60), RULES, NOW)
        .await
        .unwrap();
    let later = UnixMillis(NOW.0 + 3_600_000);
    beat(&registry, "p", &[], later).await;
    let next = registry
        .allocate(ask("plan-2", 60), RULES, later)
        .await
        .unwrap();
    assert_eq!(lent(&next), Some("p"));
}

#[tokio::test]
async fn what_was_entered_is_there_after_a_restart_and_strangers_are_not() {
    let dir = TempDir::new().unwrap();
    let path = SqliteRegistry::path(dir.path());
    let before = registry(&path, &["s", "p"]).await.devices().await.unwrap();
    let registry = SqliteRegistry::open(&path).unwrap();
    assert_eq!(registry.devices().await.unwrap(), before);
    let unknown = registry.fingerprint("x".into()).await;
    assert!(matches!(unknown, Err(RegistryError::DeviceUnknown(_))));
    let unknown = registry.pairing("pr-0".into()).await;
    assert!(matches!(unknown, Err(RegistryError::PairingUnknown(_))));
}

#[test]
fn a_file_that_is_no_database_is_named() {
    let dir = TempDir::new().unwrap();
    let path = SqliteRegistry::path(dir.path());
    std::fs::write(
        &path,
        "this is no database, and long enough to be looked at as one".repeat(20),
    )
    .unwrap();
    let Err(error) = SqliteRegistry::open(&path) else {
        panic!("opened a text as registry");
    };
    let text = error.to_string();
    assert!(
        text.contains("registry.sqlite") && text.contains("not a database"),
        "{text}"
    );
}

#[tokio::test]
async fn a_plans_target_is_not_also_its_paired_device() {
    let dir = TempDir::new().unwrap();
    let registry = registry(&SqliteRegistry::path(dir.path()), &["s", "p", "q"]).await;
    let mut target = ask("plan", 1);
    target.need.role = Role::Target;
    target.need.actions = Actions::default();
    let target = registry.allocate(target, RULES, NOW).await.unwrap();
    let paired = registry.allocate(ask("plan", 1), RULES, NOW).await.unwrap();
    assert_eq!((lent(&target), lent(&paired)), (Some("p"), Some("q")));
    let said = paired.explanation[1].to_string();
    assert!(said.contains("it is this plan's target already"), "{said}");
}

#[tokio::test]
async fn no_more_devices_evacuate_at_a_time_than_the_storm_guard_lets() {
    let dir = TempDir::new().unwrap();
    let path = SqliteRegistry::path(dir.path());
    let registry = SqliteRegistry::open(&path).unwrap();
    for number in 0..10 {
        enter(&registry, &format!("d{number}"), number).await;
    }
    // Two duplicators over one registry.
    let other = SqliteRegistry::open(&path).unwrap();
    let admit = async |registry: &SqliteRegistry, device: &str, most, at: UnixMillis| {
        registry
            .admit(device.into(), "p".into(), most, RULES, at)
            .await
            .unwrap()
    };
    for (number, registry) in [&registry, &other, &registry].into_iter().enumerate() {
        let device = format!("d{number}");
        assert_eq!(
            admit(registry, &device, Some(30.0), NOW).await,
            Admission::Admitted
        );
    }
    let full = admit(&other, "d3", Some(30.0), NOW).await;
    assert_eq!(
        full.to_string(),
        "storm guard: 3 of 10 live devices may evacuate at a time, and d0, d1, d2 do"
    );
    assert_eq!(
        admit(&other, "d0", Some(30.0), NOW).await,
        Admission::Admitted,
        "asked again"
    );
    assert_eq!(
        admit(&other, "d4", None, NOW).await,
        Admission::Admitted,
        "the operator's word"
    );

    // d0 drives its plan on, d1 and d4 do not any more, d2 fell silent.
    let later = UnixMillis(NOW.0 + 20_000);
    for number in [0, 1, 3, 4] {
        let plans: &[&str] = if number == 0 { &["p"] } else { &[] };
        beat(&registry, &format!("d{number}"), plans, later).await;
    }
    let full = admit(&registry, "d3", Some(30.0), later).await;
    assert_eq!(
        full.to_string(),
        "storm guard: 1 of 4 live devices may evacuate at a time, and d0 does"
    );
    assert_eq!(
        admit(&registry, "d3", Some(50.0), later).await,
        Admission::Admitted
    );
}
