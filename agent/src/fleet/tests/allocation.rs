//! The choice, pure: its rule, and that it keeps every limit however often it is asked.

use super::{configuration, loopback, utilisation};
use crate::fleet::allocate::{Candidate, Choice, Cost, Demand, Need, Rules, choose};
use crate::model::action::{Action, Actions};
use crate::model::fleet::{Device, DeviceVerdict, Role, Trust, TwinNeeds};
use crate::model::units::{Bytes, UnixMillis};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const NOW: UnixMillis = UnixMillis(1_000_000);
const RULES: Rules = Rules {
    live_within: Duration::from_secs(15),
    horizon: Duration::from_secs(60),
    max_pairings: 3,
};

fn candidate(id: &str) -> Candidate {
    Candidate {
        device: Device {
            id: id.into(),
            address: loopback(),
            configuration: Some(configuration()),
            utilisation: Some(utilisation()),
            version: String::new(),
            uptime_seconds: 0,
            last_seen: Some(NOW),
            completed: 0,
            failed: 0,
            lent: 0,
            trust: Trust(500),
        },
        taken: Demand::default(),
        history: BTreeMap::new(),
    }
}

fn need() -> Need {
    Need {
        source: "s".into(),
        configuration: configuration(),
        role: Role::Paired,
        actions: [Action::Encrypt].into_iter().collect(),
        quantity: Bytes(1 << 30),
        twins: TwinNeeds::default(),
        exclude: BTreeMap::new(),
    }
}

fn chosen(choice: &Choice) -> &str {
    choice
        .chosen
        .as_ref()
        .map_or("nobody", |(device, _)| device.as_str())
}

/// Which of p and q is chosen when q differs from p by `change`; and what is said of q.
fn against_p(need: &Need, change: impl FnOnce(&mut Candidate)) -> (String, String) {
    let mut q = candidate("q");
    change(&mut q);
    let choice = choose(need, &[candidate("p"), q], &RULES, NOW);
    let said = choice
        .explanation
        .iter()
        .find(|one| one.device == "q".into())
        .unwrap();
    (chosen(&choice).to_owned(), said.to_string())
}

#[test]
fn what_makes_a_device_unfit_is_said() {
    type Change = fn(&mut Candidate);
    let unfit: [(&str, Change); 8] = [
        ("no heartbeat yet", |q| q.device.utilisation = None),
        ("not live: last heartbeat 15.0 s ago", |q| {
            q.device.last_seen = Some(UnixMillis(NOW.0 - 15_001));
        }),
        ("degraded", |q| {
            q.device.utilisation.as_mut().unwrap().verdict = DeviceVerdict::Degraded;
        }),
        ("architecture aarch64", |q| {
            q.device.configuration.as_mut().unwrap().architecture = "aarch64".to_owned();
        }),
        ("1 cores, less than half", |q| {
            q.device.configuration.as_mut().unwrap().cores = 1;
        }),
        ("less than half of the source's 8.0 GiB", |q| {
            q.device.configuration.as_mut().unwrap().memory = Bytes(1 << 30);
        }),
        ("lent 3 times already", |q| q.device.lent = 3),
        ("CPU: 0.0 core seconds free", |q| {
            q.device.utilisation.as_mut().unwrap().cpu_percent = 100.0;
        }),
    ];
    for (reason, change) in unfit {
        let (choice, said) = against_p(&need(), change);
        assert_eq!(choice, "p");
        assert!(
            said.starts_with("q: no (") && said.contains(reason),
            "{reason}: {said}"
        );
    }
}

#[test]
fn the_rule_goes_from_configuration_over_trust_to_load() {
    let mut need = need();
    // p matches; q, though trusted more and idle, is only similar.
    let better = |q: &mut Candidate| {
        q.device.trust = Trust(900);
        q.device.utilisation.as_mut().unwrap().cpu_percent = 0.0;
    };
    let similar = |q: &mut Candidate| q.device.configuration.as_mut().unwrap().cores = 8;
    assert_eq!(against_p(&need, |q| (better(q), similar(q)).0).0, "p");
    assert_eq!(against_p(&need, better).0, "q");
    // More trust outvotes less load; a difference within a tenth does not.
    let busy = |q: &mut Candidate| q.device.utilisation.as_mut().unwrap().cpu_percent = 50.0;
    assert_eq!(
        against_p(&need, |q| (q.device.trust = Trust(600), busy(q)).0).0,
        "q"
    );
    assert_eq!(
        against_p(&need, |q| (q.device.trust = Trust(599), busy(q)).0).0,
        "p"
    );
    assert_eq!(against_p(&need, |_| {}).0, "p", "ties are decided by id");
    need.exclude.insert("p".into(), "did not answer".to_owned());
    assert_eq!(against_p(&need, |_| {}).0, "q");
    need.source = "q".into();
    assert_eq!(against_p(&need, |_| {}).0, "nobody");
}

#[test]
fn history_of_its_own_counts_before_that_of_similar_devices_and_that_before_the_assumption() {
    let slow = Cost {
        bytes: 1 << 30,
        core_nanos: 10 << 30,
    };
    let (_, said) = against_p(&need(), |_| {});
    assert!(said.contains("encrypt 1.100 ns/B by assumption"), "{said}");
    let (_, said) = against_p(&need(), |q| {
        q.history.insert(Action::Encrypt, slow);
    });
    assert!(
        said.contains("encrypt 10.000 ns/B by its own history"),
        "{said}"
    );
    let mut p = candidate("p");
    p.history.insert(Action::Encrypt, slow);
    let choice = choose(&need(), &[p, candidate("q")], &RULES, NOW);
    let said = choice.explanation[1].to_string();
    assert!(
        said.contains("10.000 ns/B by history of similar devices"),
        "{said}"
    );
    // 4 cores idle to 90 % for 60 s are 216 core seconds: 20 GiB at 10 ns/B are 215, 21 are 225.
    for (gib, fits) in [(20, true), (21, false)] {
        let mut need = need();
        need.quantity = Bytes(gib << 30);
        let (_, said) = against_p(&need, |q| {
            q.history.insert(Action::Encrypt, slow);
        });
        assert_eq!(said.contains("q: fits"), fits, "{said}");
    }
}

#[test]
fn trust_grows_with_duties_done_and_falls_with_failures() {
    let new = Trust::of(0, 0, 0, true);
    assert!(Trust::of(5, 0, 0, true) > new && Trust::of(0, 1, 0, true) < new);
    assert!(Trust::of(0, 0, 7 * 86_400, true) > new && Trust::of(0, 0, 0, false) < new);
    assert!(Trust::of(u32::MAX, 0, u64::MAX, true) <= Trust(1000));
}

prop_compose! {
    fn any_candidate()(
        id in "[a-h]", cores in 1u32..16, cpu in 0.0f64..100.0, free in 0u64..40, trust in 0u16..1000,
        age_ms in 0u64..30_000, degraded in prop::bool::weighted(0.1), taken in 0u32..5,
    ) -> Candidate {
        let mut candidate = candidate(&id);
        let device = &mut candidate.device;
        device.configuration.as_mut().unwrap().cores = cores;
        let now = device.utilisation.as_mut().unwrap();
        now.cpu_percent = cpu;
        now.storage_free = Bytes(free << 30);
        if degraded {
            now.verdict = DeviceVerdict::Degraded;
        }
        device.trust = Trust(trust);
        device.last_seen = Some(UnixMillis(NOW.0 - age_ms));
        device.lent = taken;
        candidate
    }
}

prop_compose! {
    fn any_need()(gib in 0u64..20, actions in prop::collection::btree_set(
        prop::sample::select(vec![Action::Encrypt, Action::Transfer, Action::Serve]), 0..3),
        target: bool,
    ) -> Need {
        Need {
            quantity: Bytes(gib << 30),
            actions: if target { Actions::default() } else { Actions(actions) },
            role: if target { Role::Target } else { Role::Paired },
            ..need()
        }
    }
}

fn distinct(candidates: Vec<Candidate>) -> Vec<Candidate> {
    let mut ids = BTreeSet::new();
    let mut candidates = candidates;
    candidates.retain(|one| ids.insert(one.device.id.clone()));
    candidates
}

proptest! {
    #[test]
    fn however_often_it_is_asked_no_device_is_lent_beyond_its_capacity(
        candidates in prop::collection::vec(any_candidate(), 1..8),
        needs in prop::collection::vec(any_need(), 1..30),
    ) {
        let mut candidates = distinct(candidates);
        let before = candidates.clone();
        for need in &needs {
            let choice = choose(need, &candidates, &RULES, NOW);
            let Some((device, demand)) = choice.chosen else { continue };
            let lent = candidates.iter_mut().find(|one| one.device.id == device).unwrap();
            lent.device.lent += 1;
            lent.taken.core_nanos += demand.core_nanos;
            lent.taken.storage.0 += demand.storage.0;
        }
        for (before, after) in before.iter().zip(&candidates) {
            let now = after.device.utilisation.as_ref().unwrap();
            let cores = f64::from(after.device.configuration.as_ref().unwrap().cores);
            prop_assert!(after.taken.storage <= now.storage_free);
            let free = cores * 60e9 * (100.0 - now.cpu_percent) / 100.0;
            prop_assert!(after.taken.core_nanos as f64 <= free + 1.0);
            prop_assert!(after.device.lent <= before.device.lent.max(RULES.max_pairings));
        }
    }

    #[test]
    fn every_candidate_is_explained_once_and_their_order_does_not_matter(
        candidates in prop::collection::vec(any_candidate(), 0..8), need in any_need(), turn in 0usize..8,
    ) {
        let mut candidates = distinct(candidates);
        let choice = choose(&need, &candidates, &RULES, NOW);
        let explained: BTreeSet<_> = choice.explanation.iter().map(|one| one.device.clone()).collect();
        prop_assert_eq!(choice.explanation.len(), candidates.len());
        prop_assert_eq!(explained.len(), candidates.len());
        prop_assert!(choice.explanation.iter().all(|one| !one.reasons.is_empty()));
        prop_assert_eq!(choice.chosen.is_some(), choice.explanation.iter().any(|one| one.accepted));
        let count = candidates.len().max(1);
        candidates.rotate_left(turn % count);
        prop_assert_eq!(choose(&need, &candidates, &RULES, NOW), choice);
    }

    #[test]
    fn a_chosen_device_is_live_sound_and_not_the_source(
        candidates in prop::collection::vec(any_candidate(), 0..8), mut need in any_need(),
    ) {
        let candidates = distinct(candidates);
        need.source = "a".into();
        if let Some((device, _)) = choose(&need, &candidates, &RULES, NOW).chosen {
            prop_assert_ne!(&device, &need.source);
            let one = candidates.iter().find(|one| one.device.id == device).unwrap();
            prop_assert!(NOW.since(one.device.last_seen.unwrap()) <= RULES.live_within);
            prop_assert_ne!(one.device.utilisation.as_ref().unwrap().verdict, DeviceVerdict::Degraded);
        }
    }
}
