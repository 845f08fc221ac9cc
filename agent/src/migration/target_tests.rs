//! The target against made-up runtimes: what it starts, ends and removes where, over several lives.

use super::events::{Place, TargetEvent};
use super::journal::{self, Journal, plan_directory};
use super::target::{check_binds, rebuild};
use super::target_stage::*;
use crate::model::control::{Offer, Whole};
use crate::model::ids::{PlanId, VolumeId};
use crate::model::plan::Plan;
use crate::model::volume::VolumeKind;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

#[test]
fn the_runtime_that_took_a_plan_has_its_twins_also_while_it_is_away_and_another_one_answers() {
    let mut stage = Stage::new();
    stage.podman.up(&stage.world);
    let plan = plan(VolumeKind::Named(VOLUME.into()), "/var/x".into());
    // The duplicator lent this device.
    let lent = json!({ "pairing": {
        "notice": {
            "pairing": "pairing", "plan": plan.id, "role": "target", "source": plan.source,
            "device": "target", "actions": plan.delegated, "volumes": [], "quantity": 0,
            "expires": u64::MAX, "peer": { "device": plan.source, "addr": "127.0.0.1:1" },
            "peer_fingerprint": "00".repeat(32), "secret": "00".repeat(32),
        },
        "tokens": {},
        "authorised": true,
    }});
    std::fs::write(stage.path("lent.json"), lent.to_string()).unwrap();
    let life = stage.live();
    let offer = Offer {
        plan: plan.clone(),
        layers: BTreeMap::new(),
    };
    let offered = life.target.offer(&plan.source, offer);
    life.runtime.block_on(offered).unwrap();
    assert!(stage.podman.held().volumes.contains_key(VOLUME));
    life.kill();

    stage.write(vec![owns()]);
    stage.podman.set("created");
    stage.podman.task.take().unwrap().abort();
    std::fs::remove_file(&stage.podman.socket).unwrap();
    stage.docker.up(&stage.world);
    let life = stage.resume();
    until("said that its runtime is away", || {
        trouble(&life).contains("podman.sock")
    });
    assert!(stage.docker.held().asked.is_empty());
    stage.podman.up(&stage.world);
    until("started", || stage.podman.state() == Some("running"));
    assert!(stage.docker.held().asked.is_empty());
    life.kill();
}

#[test]
fn a_twin_is_not_started_on_another_volume_of_the_same_name() {
    let stage = Stage::with("created");
    let elsewhere = stage.path("elsewhere");
    let kind = VolumeKind::Named(VOLUME.into());
    stage.write(vec![stage.accepted(kind, stage.path("place")), owns()]);
    let life = stage.resume();
    until("said that there is none", || {
        trouble(&life).contains("inspect volume")
    });
    let set = |at| stage.docker.held().volumes.insert(VOLUME.to_owned(), at);
    set(elsewhere.clone());
    until("said where it is instead", || {
        trouble(&life).contains(&*elsewhere.to_string_lossy())
    });
    assert!(!stage.docker.asked("start"));
    set(stage.path("place"));
    until("started", || stage.docker.state() == Some("running"));
    life.kill();
}

#[test]
fn the_journal_of_an_earlier_build_is_read_and_a_fence_in_it_tells_the_runtime() {
    let mut stage = Stage::with("created");
    stage.podman.up(&stage.world);
    let known = |events: Vec<TargetEvent>| {
        let lines = events.into_iter().map(|event| {
            let mut line = json!({ "at": 1, "event": event });
            line["event"].as_object_mut().unwrap().remove("runtime");
            format!("{line}\n")
        });
        let directory = stage.plan_directory();
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("journal.jsonl"), lines.collect::<String>()).unwrap();
        let life = stage.idle();
        let runtime = life.target.plans()[&plan_id()].runtime.clone();
        life.kill();
        runtime
    };
    assert_eq!(known(stage.owned()), None);
    let socket = stage.docker.socket.display().to_string();
    assert_eq!(known(stage.filling()), Some(socket));

    std::fs::remove_dir_all(stage.plan_directory()).unwrap();
    assert_eq!(known(stage.owned()), None);
    let life = stage.resume();
    until("started", || stage.docker.state() == Some("running"));
    life.kill();
}

#[test]
fn a_twin_that_an_earlier_life_ended_is_started_by_whichever_life_comes_to_it() {
    let stage = Stage::with("running");
    stage.docker.held().refused = Some("/start");
    let mut events = stage.filling();
    events.push(stage.proven());
    stage.write(events);
    let life = stage.resume();
    until("asked to start", || stage.docker.asked("/start"));
    assert!(stage.journal().contains(&TargetEvent::Whole));
    assert_eq!(stage.docker.state(), Some("exited"));
    life.kill();

    stage.docker.held().refused = None;
    let life = stage.resume();
    until("started", || stage.docker.state() == Some("running"));
    life.kill();
}

#[test]
fn a_twin_that_is_brought_to_its_plain_place_is_started_also_by_a_later_life() {
    let stage = Stage::with("running");
    let process = stage.path("proc").join(PID.to_string());
    std::fs::create_dir_all(&process).unwrap();
    let mounts = process.join("mountinfo");
    let on_a_mount = || std::fs::write(&mounts, "1 1 0:1 / /data rw - fuse.lifeboat x rw").unwrap();
    on_a_mount();
    stage.docker.held().refused = Some("/start");
    let mut events = stage.filling();
    events.extend([stage.proven(), TargetEvent::Whole]);
    stage.write(events);
    let life = stage.resume();
    until("asked to start", || stage.docker.asked("/start"));
    assert_eq!(stage.docker.state(), Some("exited"));
    life.kill();

    stage.docker.held().refused = None;
    let life = stage.resume();
    until("ready", || {
        stage.journal().last() == Some(&TargetEvent::Completed)
    });
    assert_eq!(stage.docker.state(), Some("running"));
    life.kill();

    // As when the agent ends: started, it counts as it did before.
    let ready = |life: &Life| {
        let status = life.target.status(&source(), &plan_id()).unwrap();
        status.start_up.is_some() && status.twins.iter().all(|twin| twin.ready.is_some())
    };
    let life = stage.idle();
    assert!(ready(&life));
    let before = stage.journal().len();
    life.runtime.block_on(life.target.stop());
    assert!(ready(&life));
    let containers = vec![TWIN.into()];
    let journal = stage.journal();
    assert_eq!(journal.len(), before + 3);
    assert_eq!(journal[before], TargetEvent::TwinsEnded { containers });
    assert_eq!(stage.docker.state(), Some("running"));
    life.kill();
    assert!(ready(&stage.idle()));
}

#[test]
fn data_takes_its_place_when_no_twin_is_being_started_and_none_is_fenced_afterwards() {
    let stage = Stage::with("exited");
    let mut events = stage.filling();
    events.push(stage.proven());
    stage.write(events);
    let life = stage.idle();
    let target = life.target.clone();
    life.runtime.block_on(async {
        let starting = target.starts.lock().await;
        let settling = {
            let target = target.clone();
            let word = Whole {
                roots: BTreeMap::new(),
            };
            tokio::spawn(async move { target.whole(&source(), &plan_id(), word).await })
        };
        // Had it not waited, it would be over well before.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!settling.is_finished());
        assert!(!stage.journal().contains(&TargetEvent::Whole));
        drop(starting);
        settling.await.unwrap().unwrap();
        assert!(stage.journal().contains(&TargetEvent::Whole));
        assert!(stage.path("place").exists() && !stage.path("store").exists());

        stage.docker.held().asked.clear();
        let (plan, runtime) = known(&target).await;
        let started = target.start_fenced(&plan, &plan.containers[0], runtime);
        started.await.unwrap();
        assert_eq!(stage.docker.held().asked, ["POST containers/db/start"]);
    });
    life.kill();
}

#[test]
fn no_twin_counts_as_ended_before_its_runtime_says_so() {
    let stage = Stage::with("running");
    stage.docker.held().refused = Some("/kill");
    stage.write(stage.filling());
    let life = stage.resume();
    until("said that it may still run", || {
        trouble(&life).contains("may still run")
    });
    assert!(!stage.docker.asked("/start"));
    stage.docker.held().refused = None;
    until("ended", || stage.docker.state() == Some("exited"));
    life.kill();

    // Nor when it cannot be asked.
    stage.docker.task.as_ref().unwrap().abort();
    std::fs::remove_file(&stage.docker.socket).unwrap();
    let life = stage.idle();
    let (plan, _) = life.target.known(&source(), &plan_id()).unwrap();
    let ended = life.runtime.block_on(life.target.end_twins(&plan, true));
    assert!(ended.unwrap_err().contains("docker.sock"));
    life.kill();
}

#[test]
fn a_twin_that_was_ready_and_does_not_run_is_started_until_all_are() {
    let stage = Stage::with("exited");
    let mut events = stage.owned();
    events.push(twin_ready());
    stage.write(events);
    let life = stage.resume();
    until("started", || stage.docker.state() == Some("running"));
    until("ready", || {
        stage.journal().last() == Some(&TargetEvent::Completed)
    });
    life.kill();
}

#[test]
fn whoever_looks_is_told_of_a_twin_that_was_ready_and_does_not_run() {
    let stage = Stage::with("running");
    let mut events = stage.owned();
    events.extend([twin_ready(), TargetEvent::Completed]);
    stage.write(events);
    let life = stage.idle();
    let look = || {
        let (source, plan) = (source(), plan_id());
        let looked = life.target.look(&source, &plan);
        let mut twins = life.runtime.block_on(looked).unwrap().twins;
        twins.remove(0)
    };
    assert!(look().ready.is_some());
    stage.docker.set("exited");
    let twin = look();
    assert_eq!(twin.ready, None);
    let why = "it was ready, and does not run now: it is exited";
    assert_eq!(twin.error.as_deref(), Some(why));
    stage.docker.held().containers.clear();
    assert!(look().error.unwrap().contains("no such thing"));
    // It left with a plan of this device, and what it left there may be removed or not.
    stage.release(|left| left.target.as_mut().unwrap().device = "third".into());
    for here in [false, true] {
        let twin = look();
        let left = twin.left.unwrap();
        assert_eq!(
            (left.device.as_str(), left.plan.as_str()),
            ("third", "p2-2")
        );
        assert!(twin.ready.is_some() && twin.error.is_none());
        if !here {
            stage.docker.set("exited");
        }
    }
}

#[test]
fn whoever_looks_is_told_of_a_twin_that_left_before_it_was_ready_also_by_the_next_life() {
    let stage = Stage::with("exited");
    stage.write(stage.owned());
    let life = stage.idle();
    let look = || {
        let (source, plan) = (source(), plan_id());
        let looked = life.target.look(&source, &plan);
        life.runtime.block_on(looked).unwrap().twins
    };
    assert!(look().is_empty());
    stage.release(|left| left.target.as_mut().unwrap().device = "third".into());
    let twins = look();
    assert_eq!(twins.len(), 1);
    assert_eq!(twins[0].container.as_str(), TWIN);
    assert_eq!(twins[0].left.as_ref().unwrap().device.as_str(), "third");
    life.kill();
}

#[test]
fn a_dismissal_removes_nothing_while_its_runtime_is_away_and_everything_once() {
    let mut stage = Stage::new();
    let at = stage.path("place");
    let set = |stage: &Stage| {
        let mut held = stage.docker.held();
        held.containers.insert(TWIN.to_owned(), "created");
        held.volumes.insert(VOLUME.to_owned(), at.clone());
    };
    set(&stage);
    let kind = VolumeKind::Named(VOLUME.into());
    stage.write(vec![stage.accepted(kind, at.clone())]);
    let life = stage.idle();
    let dismiss = || {
        let (source, plan) = (source(), plan_id());
        let dismissed = life.target.dismiss(&source, &plan, "asked to");
        life.runtime.block_on(dismissed)
    };
    dismiss().unwrap_err();
    assert_eq!(stage.journal().len(), 1);
    assert!(life.target.plans().contains_key(&plan_id()));
    stage.docker.up(&stage.world);
    dismiss().unwrap();
    let last = stage.journal().pop();
    assert!(matches!(last, Some(TargetEvent::Dismissed { .. })));
    assert!(stage.docker.held().volumes.is_empty() && stage.docker.state().is_none());
    // What has its names by now is somebody else's.
    set(&stage);
    dismiss().unwrap();
    assert!(!stage.docker.held().volumes.is_empty() && stage.docker.state().is_some());
    life.kill();
}

#[test]
fn a_dismissal_asks_its_runtime_now_and_not_what_it_answered_once() {
    let mut stage = Stage::with("created");
    let kind = VolumeKind::Named(VOLUME.into());
    stage.write(vec![stage.accepted(kind, stage.path("place"))]);
    let life = stage.idle();
    let dismiss = || {
        let (source, plan) = (source(), plan_id());
        let dismissed = life.target.dismiss(&source, &plan, "asked to");
        life.runtime.block_on(dismissed)
    };
    life.runtime.block_on(async {
        let (_, runtime) = known(&life.target).await;
        runtime.engine().await.unwrap();
    });
    stage.docker.task.take().unwrap().abort();
    std::fs::remove_file(&stage.docker.socket).unwrap();
    let error = dismiss().unwrap_err().to_string();
    assert!(error.contains("docker.sock"), "{error}");
    assert_eq!(stage.journal().len(), 1);
    stage.docker.up(&stage.world);
    assert_eq!(dismiss().unwrap(), None);
    assert_eq!(stage.docker.state(), None);
    life.kill();
}

/// A dismissal removed the twin and could not remove its volume, and what it says of that.
fn dismissed_without_its_volume(stage: &Stage) -> String {
    let at = stage.path("place");
    std::fs::create_dir_all(at.join("below")).unwrap();
    std::fs::write(at.join("below/file"), "the plan's").unwrap();
    let mut held = stage.docker.held();
    held.volumes.insert(VOLUME.to_owned(), at.clone());
    held.refused = Some("DELETE volumes");
    drop(held);
    let kind = VolumeKind::Named(VOLUME.into());
    stage.write(vec![stage.accepted(kind, at)]);
    let life = stage.idle();
    let dismiss = || {
        let (source, plan) = (source(), plan_id());
        let dismissed = life.target.dismiss(&source, &plan, "asked to");
        life.runtime.block_on(dismissed).unwrap()
    };
    let left = dismiss();
    assert_eq!(stage.docker.state(), None);
    assert!(!life.target.plans().contains_key(&plan_id()), "it is over");
    assert_eq!(dismiss(), left, "whoever did not hear it is told again");
    let (stranger, plan) = ("third".into(), plan_id());
    let asked = life.target.dismiss(&stranger, &plan, "whose?");
    assert_eq!(life.runtime.block_on(asked).unwrap(), None);
    life.kill();
    let mut held = stage.docker.held();
    held.refused = None;
    held.asked.clear();
    left.unwrap()
}

/// The next life of the agent has tried once more; whether nothing is left to try.
fn tried_again(stage: &Stage) -> bool {
    let life = stage.resume();
    let (mut journal, _) = Journal::open(&stage.plan_directory()).unwrap();
    let plan = plan_id();
    let tried = life.target.remove_again(&plan, &mut journal);
    let is_over = life.runtime.block_on(tried);
    life.kill();
    is_over
}

#[test]
fn what_a_dismissal_could_not_remove_is_tried_again_alone_also_by_the_next_life() {
    let stage = Stage::with("created");
    let left = dismissed_without_its_volume(&stage);
    assert!(
        left.contains(VOLUME) && left.contains("made to refuse") && left.contains("tried again"),
        "{left}"
    );
    // Of the same name by now, and somebody else's.
    stage.docker.set("created");
    stage.docker.held().refused = Some("DELETE volumes");
    assert!(!tried_again(&stage));
    assert_eq!(stage.docker.held().asked, ["DELETE volumes/db-data"]);
    stage.docker.held().refused = None;
    assert!(tried_again(&stage));
    assert!(stage.docker.held().volumes.is_empty());
    assert_eq!(stage.docker.state(), Some("created"));
    let last = stage.journal().pop();
    assert!(
        matches!(last, Some(TargetEvent::Dismissed { left: None, .. })),
        "{last:?}"
    );
    assert!(tried_again(&stage));
    assert_eq!(stage.docker.held().asked.len(), 2);
}

#[test]
fn what_a_dismissal_could_not_remove_stays_once_somebody_has_written_to_it_or_made_it_anew() {
    let write = |at: &std::path::Path| std::fs::write(at.join("below/file"), "another's").unwrap();
    let make_anew = |at: &std::path::Path| {
        std::fs::remove_dir_all(at).unwrap();
        std::fs::create_dir_all(at.join("below")).unwrap();
        std::fs::write(at.join("below/file"), "the plan's").unwrap();
    };
    for change in [&write as &dyn Fn(&std::path::Path), &make_anew] {
        let stage = Stage::with("created");
        dismissed_without_its_volume(&stage);
        change(&stage.path("place"));
        assert!(tried_again(&stage));
        assert_eq!(stage.docker.held().asked, Vec::<String>::new());
        assert!(stage.path("place/below/file").exists());
    }
}

#[test]
fn what_is_in_use_is_tried_again_while_the_plans_own_twin_may_be_who_uses_it_and_stays_otherwise() {
    for twin in [true, false] {
        let stage = Stage::with("created");
        if !twin {
            stage.docker.held().containers.clear();
        }
        let at = stage.path("place");
        std::fs::create_dir_all(&at).unwrap();
        let names = vec!["shop".to_owned()];
        let mut held = stage.docker.held();
        held.networks.extend(names.clone());
        held.volumes.insert(VOLUME.to_owned(), at.clone());
        (held.refused, held.in_use) = (Some("DELETE"), true);
        drop(held);
        let kind = VolumeKind::Named(VOLUME.into());
        let accepted = stage.accepted(kind, at);
        stage.write(vec![accepted, TargetEvent::Networks { names }]);
        let life = stage.idle();
        let (source, plan) = (source(), plan_id());
        let dismissed = life.target.dismiss(&source, &plan, "asked to");
        let left = life.runtime.block_on(dismissed).unwrap().unwrap();
        assert_eq!(left.contains("tried again"), twin, "{left}");
        assert_eq!(left.contains("stays there"), !twin, "{left}");
        life.kill();
        let mut held = stage.docker.held();
        held.refused = None;
        held.asked.clear();
        drop(held);
        assert!(tried_again(&stage));
        let held = stage.docker.held();
        assert_eq!(held.networks.is_empty() && held.volumes.is_empty(), twin);
        assert_eq!(held.asked.is_empty(), !twin);
    }
}

#[test]
fn a_plan_of_which_an_earlier_offer_is_not_all_removed_is_not_taken() {
    let stage = Stage::with("created");
    dismissed_without_its_volume(&stage);
    let life = stage.resume();
    let refused = life.target.check_removed(&plan_id()).unwrap_err();
    assert!(refused.to_string().contains(VOLUME), "{refused}");
    life.target.check_removed(&"p2-2".into()).unwrap();
    life.kill();
}

#[test]
fn a_twin_that_left_this_device_is_not_started_here_again_and_counts_as_done() {
    let stage = Stage::with("exited");
    let mut events = stage.owned();
    events.push(twin_ready());
    stage.write(events);
    stage.release(|_| {});
    for removed in [false, true] {
        if removed {
            stage.docker.held().containers.clear();
        }
        let life = stage.resume();
        until("done", || {
            stage.journal().last() == Some(&TargetEvent::Completed)
        });
        let target = life.target.clone();
        life.runtime.block_on(async {
            let (plan, runtime) = known(&target).await;
            let started = target.start_fenced(&plan, &plan.containers[0], runtime);
            assert!(started.await.is_err());
        });
        life.kill();
        assert!(stage.docker.held().asked.is_empty());
        stage.write(vec![TargetEvent::TwinsEnded {
            containers: vec![TWIN.into()],
        }]);
    }
    // It came back before it was owned here: that it had left does not count.
    stage.docker.set("created");
    stage.write(vec![owns()]);
    stage.docker.held().containers.clear();
    stage
        .docker
        .held()
        .containers
        .insert("other".to_owned(), "created");
    let life = stage.idle();
    let (plan, _) = life.target.known(&source(), &plan_id()).unwrap();
    let has_left = life
        .target
        .has_left(&plan, &plan.containers[0].container.name);
    assert_eq!(life.runtime.block_on(has_left), Ok(false));
    life.kill();
}

#[test]
fn what_somebody_ended_after_all_twins_were_ready_stays_ended_when_another_one_is_started() {
    let stage = Stage::with("exited");
    let mut events = stage.owned();
    events.extend([twin_ready(), TargetEvent::Completed]);
    events.push(TargetEvent::TwinsEnded {
        containers: vec!["another".into()],
    });
    stage.write(events);
    let life = stage.resume();
    until("done", || {
        stage.journal().last() == Some(&TargetEvent::Completed)
    });
    assert_eq!(stage.docker.state(), Some("exited"));
    life.kill();
}

#[test]
fn twins_that_an_agent_ends_with_itself_are_the_next_lifes_whatever_their_source_says_meanwhile() {
    let stage = Stage::with("running");
    let mut events = stage.filling();
    events.push(stage.proven());
    stage.write(events);
    let life = stage.idle();
    let target = &life.target;
    if let Some(known) = target.plans().get_mut(&plan_id())
        && let TargetEvent::TwinReady { twin } = twin_ready()
    {
        (known.twins, known.start_up) = (vec![twin], Some(Duration::ZERO));
    }
    life.runtime.block_on(async {
        target.stop().await;
        let word = Whole {
            roots: BTreeMap::new(),
        };
        assert!(target.whole(&source(), &plan_id(), word).await.is_err());
    });
    let containers = vec![TWIN.into()];
    let last = stage.journal().pop();
    assert_eq!(last, Some(TargetEvent::TwinsEnded { containers }));
    assert_eq!(stage.docker.state(), Some("exited"));
    life.kill();
}

#[test]
fn an_agent_that_ends_starts_no_twin_any_more_and_none_of_a_plan_that_is_not_its_own() {
    let stage = Stage::with("running");
    stage.write(stage.filling());
    let life = stage.idle();
    let target = &life.target;
    life.runtime.block_on(async {
        let (plan, runtime) = known(target).await;
        target.stop().await;
        assert_eq!(stage.docker.state(), Some("exited"));
        let started = target.start_fenced(&plan, &plan.containers[0], runtime);
        assert!(started.await.is_err());
        assert!(target.mount_later(&plan).await.is_err());
        // Returns, and does not try again and again.
        target.clone().start_twins(plan.clone()).await;
    });
    assert!(!stage.docker.asked("/start"));
    life.kill();

    let life = stage.idle();
    let target = &life.target;
    life.runtime.block_on(async {
        let (plan, runtime) = known(target).await;
        // Given back and dismissed while its twins were being started.
        target.plans().remove(&plan.id);
        let devices = BTreeMap::new();
        let started = target.start_twin(&plan, &plan.containers[0], &devices, runtime);
        assert!(started.await.is_err());
        target.clone().start_twins(plan.clone()).await;
    });
    assert!(!stage.docker.asked("/start"));
    life.kill();
}

#[test]
fn a_twin_that_the_agent_ended_is_looked_at_again_also_when_it_was_ready_once_more() {
    let stage = Stage::with("exited");
    let mut events = stage.owned();
    events.extend([twin_ready(), TargetEvent::Completed]);
    events.push(TargetEvent::TwinsEnded {
        containers: vec![TWIN.into(), "another".into()],
    });
    // Then the host lost its power, before the other one ran again.
    events.push(twin_ready());
    stage.write(events);
    let life = stage.resume();
    until("done", || {
        stage.journal().last() == Some(&TargetEvent::Completed)
    });
    assert_eq!(stage.docker.state(), Some("running"));
    life.kill();
}

#[test]
fn what_a_plan_may_still_remove_is_not_given_to_another_one() {
    let stage = Stage::new();
    let at = stage.path("place");
    stage.write(vec![stage.accepted(VolumeKind::Bind, at.clone())]);
    let life = stage.idle();
    let check = |kind: VolumeKind, container: &str, path: PathBuf| {
        let mut other = plan(kind, at.clone());
        other.id = "p2-2".into();
        other.containers[0].container.name = container.into();
        let (volume, made) = (VolumeId(0), true);
        let place = Place { volume, path, made };
        life.check_free(&other, &[place], &stage.docker)
    };
    let bind = |container: &str, path: PathBuf| check(VolumeKind::Bind, container, path);
    assert!(bind("web", stage.path("placed")));
    for taken in [at.clone(), at.join("below"), stage.path("")] {
        assert!(!bind("web", taken));
    }
    assert!(!bind(TWIN, stage.path("placed")), "its twin's name");
    life.kill();

    std::fs::remove_dir_all(stage.plan_directory()).unwrap();
    let named = || VolumeKind::Named(VOLUME.into());
    stage.write(vec![stage.accepted(named(), PathBuf::new())]);
    let life = stage.idle();
    let mut other = plan(named(), at.clone());
    other.id = "p2-2".into();
    other.containers[0].container.name = "web".into();
    let (volume, made, path) = (VolumeId(0), true, PathBuf::new());
    let places = [Place { volume, path, made }];
    assert!(!life.check_free(&other, &places, &stage.docker));
    assert!(life.check_free(&other, &places, &stage.podman));
    other.volumes[0].kind = VolumeKind::Named("other".into());
    assert!(life.check_free(&other, &places, &stage.docker));
    life.kill();
}

#[test]
fn a_twin_mounts_volumes_of_its_plan_alone_however_that_is_asked_for() {
    let stage = Stage::new();
    let at = stage.path("place");
    let inside = at.join("below").display().to_string();
    let climbing = at.join("../../etc").display().to_string();
    let refused = |inspect: Value, options: Value| {
        let mut plan = plan(VolumeKind::Bind, at.clone());
        plan.containers[0].inspect = inspect;
        plan.containers[0].volumes = vec![json!({ "Name": "cache", "Options": options })];
        check_binds(&plan).is_err()
    };
    for (source, expected) in [(inside.as_str(), false), (&climbing, true), ("/etc", true)] {
        let bind = format!("{source}:/mnt");
        let mount = json!({ "Type": "bind", "Source": source, "Target": "/mnt" });
        let mounted =
            json!({ "Type": "bind", "Source": source, "Destination": "/mnt", "RW": true });
        for inspect in [
            json!({ "HostConfig": { "Binds": [bind] } }),
            json!({ "HostConfig": { "Mounts": [mount] } }),
            json!({ "Mounts": [mounted] }),
        ] {
            assert_eq!(refused(inspect.clone(), json!(null)), expected, "{inspect}");
        }
    }
    let options = |device: &str| json!({ "type": "none", "o": "bind", "device": device });
    assert!(refused(json!({}), options("/etc")) && !refused(json!({}), options("tmpfs")));
}

#[test]
fn a_twin_of_a_later_plan_is_not_taken_for_one_that_left() {
    let stage = Stage::with("running");
    stage.write(stage.owned());
    stage.release(|left| left.containers[0].container.id = "another".into());
    let life = stage.idle();
    let (first, _) = life.target.known(&source(), &plan_id()).unwrap();
    let has_left = |plan: &Plan| {
        let name = &plan.containers[0].container.name;
        let has_left = life.target.has_left(plan, name);
        life.runtime.block_on(has_left).unwrap()
    };
    assert!(!has_left(&first), "it is not the one that was released");

    let id = PlanId::from("p3-3");
    let (mut journal, _) =
        Journal::open(&plan_directory(stage.directory.path(), "target", &id)).unwrap();
    let TargetEvent::Accepted {
        mut plan,
        places,
        runtime,
    } = stage.accepted(VolumeKind::Bind, stage.path("other"))
    else {
        panic!("it is one")
    };
    plan.id = id.clone();
    let accepted = TargetEvent::Accepted {
        plan,
        places,
        runtime,
    };
    journal.append(crate::fleet::now(), accepted).unwrap();
    let entries = journal::read(&plan_directory(stage.directory.path(), "target", &id)).unwrap();
    let known = rebuild(journal, &entries).unwrap();
    let third = known.plan.clone();
    life.target.plans().insert(id, known);
    assert!(has_left(&first), "it is the third plan's");
    assert!(!has_left(&third));
    life.kill();
}

#[test]
fn a_twin_that_was_given_back_and_cannot_be_removed_keeps_what_keeps_it_from_being_started() {
    for refused in [None, Some("DELETE containers")] {
        let stage = Stage::with("exited");
        let mut events = stage.filling();
        let TargetEvent::Owns { release: word, .. } = owns() else {
            panic!("it is one")
        };
        events.push(TargetEvent::GivenBack { word });
        stage.write(events);
        stage.docker.held().refused = refused;
        let life = stage.idle();
        let (source, plan) = (source(), plan_id());
        let dismissed = life.target.dismiss(&source, &plan, "given back");
        let left = life.runtime.block_on(dismissed).unwrap();
        assert_eq!(left.is_some(), refused.is_some());
        assert!(stage.docker.asked("DELETE containers"));
        assert_eq!(stage.docker.asked("/update"), refused.is_none());
        life.kill();
        stage.docker.held().refused = None;
        assert!(tried_again(&stage));
        assert!(stage.docker.asked("/update") && stage.docker.state().is_none());
    }
}
