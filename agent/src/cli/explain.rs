//! `lifeboat explain`: the verdict as a person would say it, and what comes next.

use super::daemon::ask;
use super::output::say;
use super::policy::lasts;
use super::{Context, Failure, Outcome};
use crate::api::local::{FailedTry, Judgement, Status};
use crate::health::{Missing, Stage, Verdict, VerdictKind};
use crate::migration::PlanStatus;
use crate::model::metric::{Metric, Per};
use crate::model::units::{UnixMillis, human_duration, utc};

/// Explains the verdict: which thresholds, which samples, since when, what would clear them, what happens next.
#[derive(clap::Args)]
pub struct Arguments {}

/// Prints the explanation.
pub fn run(_: &Arguments, context: &Context) -> Outcome {
    ask(&context.socket, async |agent| {
        let status: Status = agent.get("/v1/status").await.map_err(Failure::of)?;
        if context.json {
            let told = serde_json::json!({
                "device": status.device,
                "verdict": status.view.verdict,
                "judgement": status.judgement,
                "next": next(&status),
            });
            say(&told.to_string());
        } else {
            say(&explain(&status));
        }
        Ok(())
    })
}

fn explain(status: &Status) -> String {
    let now = status.now;
    let Some(verdict) = &status.view.verdict else {
        let why = match &status.judgement {
            Some(_) => {
                "there is no verdict yet: the agent has just started, and judges from its second sweep on, in a second."
            }
            None => {
                "no policy is loaded, so there is no verdict.\nSet `policy` in the agent's configuration and restart it."
            }
        };
        return format!("{}: {why}", status.device);
    };
    let mut lines = vec![summary(
        &status.device,
        verdict,
        status.judgement.as_ref(),
        now,
    )];
    for evidence in &verdict.evidence {
        let metric = Metric::named(&evidence.metric).map_or("", |metric| metric.about);
        lines.push(format!("\n{}", evidence.text));
        if !metric.is_empty() {
            lines.push(format!("  {} is the {metric}.", evidence.metric));
        }
        lines.push(format!(
            "  The limit was passed first at {}, {} ago; the last sample is {} old.",
            utc(evidence.since),
            human_duration(now.since(evidence.since)),
            human_duration(now.since(evidence.last_sample)),
        ));
        lines.push(format!("  It is over at {}.", evidence.clears_when));
    }
    if !verdict.missing.is_empty() {
        lines.push("\nNot known:".to_owned());
        for missing in &verdict.missing {
            lines.push(format!("  {}", missing.text));
            lines.extend(ends(missing));
        }
    }
    lines.push("\nWhat happens next:".to_owned());
    lines.extend(next(status).iter().map(|line| format!("  {line}")));
    lines.join("\n")
}

/// What ends that a part is missing which was failing and may be dead.
fn ends(missing: &Missing) -> Option<String> {
    let per = missing.subject.as_ref()?.per;
    let comes_and_goes = matches!(per, Per::Container | Per::Peer | Per::Device);
    (missing.failing && !comes_and_goes).then(|| {
        "    It is over when this part is measured well again. If it was taken away for good, stop the agent, remove verdict.json from its state directory and start it again.".to_owned()
    })
}

fn summary(
    device: &str,
    verdict: &Verdict,
    judgement: Option<&Judgement>,
    now: UnixMillis,
) -> String {
    let Some(judgement) = judgement else {
        return format!(
            "{device} is {} since {} ({}): no policy is in force.",
            verdict.kind,
            utc(verdict.since),
            human_duration(now.since(verdict.since)),
        );
    };
    let stage = verdict
        .stage
        .map_or(String::new(), |stage| format!(", stage {stage}"));
    let because = if verdict.because.is_empty() {
        match verdict.kind {
            VerdictKind::Healthy => format!(
                "none of {} thresholds fails, and all that are not optional are measured",
                judgement.thresholds
            ),
            VerdictKind::Suspect => "something fails, and no entry of `degraded` holds".to_owned(),
            VerdictKind::Unknown => "data that the policy needs are missing".to_owned(),
            VerdictKind::Degraded => "nothing of it holds any more".to_owned(),
        }
    } else {
        format!("by {}", verdict.because.join(" and by "))
    };
    format!(
        "{device} is {}{stage} since {} ({}): {because}. Policy: {}.",
        verdict.kind,
        utc(verdict.since),
        human_duration(now.since(verdict.since)),
        judgement.policy
    )
}

/// What will happen, sentence by sentence.
fn next(status: &Status) -> Vec<String> {
    let now = status.now;
    let Some(verdict) = &status.view.verdict else {
        return Vec::new();
    };
    let under_way: Vec<_> = status.plans.iter().filter(|plan| !plan.over).collect();
    let nothing = if under_way.is_empty() {
        "Nothing moves"
    } else {
        "Nothing new is begun"
    };
    let mut lines = Vec::new();
    let Some(judgement) = &status.judgement else {
        lines.extend(under_way.iter().flat_map(|plan| of_plan(plan)));
        lines.push(format!(
            "{nothing} by itself without a policy; `lifeboat evacuate --all` moves the containers, with no guards."
        ));
        return lines;
    };
    if let Some(until) = verdict.held_until {
        lines.push(format!(
            "guards.hold keeps the verdict for another {}.",
            human_duration(until.since(now))
        ));
    }
    if let Some(pause) = &judgement.paused {
        let lasts = lasts(pause);
        let or = if lasts.contains("resume") {
            ""
        } else {
            ", or `lifeboat policy resume`"
        };
        lines.push(format!(
            "An operator paused the policy ({}): nothing moves by itself {lasts}{or}.",
            pause.why,
        ));
    }
    lines.extend(under_way.iter().flat_map(|plan| of_plan(plan)));
    if !judgement.automatic {
        lines.push(format!(
            "{nothing} by itself, as `migration.automatic` is false or the device is in no fleet; `lifeboat evacuate --all` moves the containers."
        ));
    }
    let acting = &judgement.acting;
    if let Some(stage) = acting.refused {
        lines.push(format!(
            "A person said no at stage `{stage}` (an abort, or an approval that was not given): no plan is begun by itself before the stage of the verdict changes; `lifeboat evacuate --all` moves the containers."
        ));
    }
    let acts = judgement.automatic && judgement.paused.is_none() && acting.refused.is_none();
    // Whether the policy would begin a plan now, and whether it would go on with what it copied in advance.
    let free = acts && under_way.is_empty();
    let goes_on =
        acts && verdict.stage == Some(Stage::Evacuate) && under_way.iter().any(|plan| plan.held);
    let asks = verdict.stage >= Some(Stage::Prepare);
    let tries = asks && (free || goes_on);
    let failed = acting.failed.as_ref().filter(|_| tries);
    if let Some(FailedTry { why, again }) = failed {
        lines.push(format!(
            "The last try failed: {why}. The next is at {}, in {}.",
            utc(*again),
            human_duration(again.since(now))
        ));
    }
    // Said already where nothing would whatever the verdict was.
    let nothing = (judgement.automatic && judgement.paused.is_none()).then_some(nothing);
    let given_up = "What the verdict began and does not move yet is given up; what was copied in advance, after `guards.hold`.";
    match (verdict.kind, verdict.stage) {
        (VerdictKind::Degraded, Some(Stage::Watch)) => {
            let nothing = nothing.map_or(String::new(), |nothing| format!(" {nothing}."));
            lines.push(format!("Stage `watch`: it is shown.{nothing}"));
            if judgement.automatic {
                lines.extend(ladder(judgement, Stage::Prepare, "It would act when"));
            }
        }
        (VerdictKind::Degraded, _) if !judgement.automatic => {}
        (VerdictKind::Degraded, Some(Stage::Prepare)) => {
            let copied = "the data of running containers is copied to a target in advance, again and again; they run on here";
            lines.push(if free && failed.is_none() {
                format!("Stage `prepare`: {copied}.")
            } else if under_way.is_empty() {
                format!("Stage `prepare`, at which {copied}: not now.")
            } else {
                "Stage `prepare`. Nothing new is begun beside what is under way.".to_owned()
            });
            lines.extend(ladder(judgement, Stage::Evacuate, "It would evacuate when"));
        }
        (VerdictKind::Degraded, _) if free && failed.is_none() => {
            let delegated = if verdict.delegate.is_empty() {
                "doing all of the work itself".to_owned()
            } else {
                format!("a paired device is asked to do: {}", verdict.delegate)
            };
            lines.push(format!(
                "Running containers are evacuated by themselves; {delegated}."
            ));
        }
        (VerdictKind::Degraded, _) => {}
        (VerdictKind::Unknown, _) => {
            lines.extend(nothing.map(|nothing| format!("{nothing} while the verdict is unknown.")));
        }
        (VerdictKind::Suspect | VerdictKind::Healthy, _) => {
            lines.extend(nothing.map(|nothing| format!("{nothing}.")));
            if !under_way.is_empty() && judgement.automatic {
                lines.push(given_up.to_owned());
            }
            lines.extend(ladder(judgement, Stage::Watch, "It would be degraded when"));
        }
    }
    lines
}

/// What is to be said of a plan under way.
fn of_plan(plan: &PlanStatus) -> Vec<String> {
    let mut lines = vec![format!(
        "Plan {} is under way ({}); `lifeboat status --watch` shows it.",
        plan.plan, plan.phase
    )];
    if plan.held {
        lines.push(format!(
            "  Its data is kept up to date on {}; the containers run on here.",
            plan.target
                .as_ref()
                .map_or("a target".to_owned(), ToString::to_string)
        ));
    }
    for role in &plan.awaits {
        lines.push(format!(
            "  It waits for `lifeboat approve {} --as {role}`.",
            plan.plan
        ));
    }
    lines.extend(plan.trouble.iter().map(|text| format!("  {text}.")));
    lines
}

/// Entries of `degraded` of at least this stage.
fn ladder(judgement: &Judgement, stage: Stage, start: &str) -> Vec<String> {
    judgement
        .degraded
        .iter()
        .filter(|(_, of)| *of >= stage)
        .map(|(entry, of)| format!("{start} {entry} holds (stage {of})."))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::local::Acting;
    use crate::migration::pause::Pause;
    use crate::migration::view::HostView;
    use crate::model::metric::Subject;

    fn status(kind: VerdictKind, stage: Option<Stage>) -> Status {
        Status {
            device: "h1".into(),
            now: UnixMillis(1_750_000_000_000),
            view: HostView {
                verdict: Some(Verdict {
                    kind,
                    stage,
                    ..Verdict::default()
                }),
                ..HostView::default()
            },
            plans: Vec::new(),
            arriving: Vec::new(),
            judgement: Some(Judgement {
                policy: "p".into(),
                thresholds: 1,
                degraded: Vec::new(),
                automatic: true,
                paused: None,
                acting: Acting::default(),
            }),
        }
    }

    fn plan() -> PlanStatus {
        let plan = serde_json::json!({
            "plan": "p-1", "phase": "replicate", "over": false, "target": null, "paired": null,
            "bytes_read": 0, "bytes_sent": 0, "bytes_total": 0, "images": [0, 0], "since": 0,
            "twins": [], "trouble": null,
        });
        serde_json::from_value(plan).unwrap()
    }

    fn told(status: &Status) -> String {
        next(status).join("\n")
    }

    #[test]
    fn what_will_not_happen_is_not_foretold() {
        let evacuated = "evacuated by themselves";
        let copied = "Stage `prepare`: the data of running containers is copied";
        for (stage, promise) in [(Stage::Evacuate, evacuated), (Stage::Prepare, copied)] {
            let mut status = status(VerdictKind::Degraded, Some(stage));
            assert!(told(&status).contains(promise), "{}", told(&status));
            let judgement = status.judgement.as_mut().unwrap();
            judgement.acting.refused = Some(stage);
            let text = told(&status);
            assert!(!text.contains(promise), "{text}");
            assert!(text.contains("A person said no at stage"), "{text}");
            let judgement = status.judgement.as_mut().unwrap();
            judgement.acting = Acting {
                refused: None,
                failed: Some(FailedTry {
                    why: "no target was allocated".into(),
                    again: UnixMillis(1_750_000_060_000),
                }),
            };
            let text = told(&status);
            assert!(!text.contains(promise), "{text}");
            assert!(text.contains("no target was allocated"), "{text}");
            assert!(text.contains("in 1 min"), "{text}");
            let judgement = status.judgement.as_mut().unwrap();
            judgement.acting = Acting::default();
            judgement.paused = Some(Pause {
                since: UnixMillis(0),
                until: UnixMillis(1_750_000_060_000),
                why: "fans".into(),
            });
            assert!(!told(&status).contains(promise), "{}", told(&status));
        }
    }

    #[test]
    fn why_a_copy_in_advance_does_not_evacuate_is_told_and_no_try_that_nothing_asks_for() {
        let mut status = status(VerdictKind::Degraded, Some(Stage::Evacuate));
        let judgement = status.judgement.as_mut().unwrap();
        judgement.acting.failed = Some(FailedTry {
            why: "plan is blocked: /srv".into(),
            again: UnixMillis(1_750_000_060_000),
        });
        status.plans.push(PlanStatus {
            held: true,
            ..plan()
        });
        let text = told(&status);
        assert!(text.contains("plan is blocked: /srv"), "{text}");
        assert!(text.contains("in 1 min"), "{text}");
        // It copies on, as it is asked to; or moves.
        for (stage, held) in [(Stage::Prepare, true), (Stage::Evacuate, false)] {
            status.view.verdict.as_mut().unwrap().stage = Some(stage);
            status.plans[0].held = held;
            assert!(!told(&status).contains("blocked"), "{}", told(&status));
        }
        status.plans.clear();
        assert!(told(&status).contains("blocked"), "{}", told(&status));
        status.view.verdict.as_mut().unwrap().kind = VerdictKind::Healthy;
        status.view.verdict.as_mut().unwrap().stage = None;
        assert!(!told(&status).contains("blocked"), "{}", told(&status));
    }

    #[test]
    fn a_policy_that_cannot_be_used_is_told_with_its_place_and_what_goes_on() {
        let mut status = status(VerdictKind::Unknown, None);
        status.judgement = None;
        status.plans.push(plan());
        let why = "/etc/p.yaml:6:5: thresholds.a: wrong\n/etc/p.yaml:9:1: name: empty";
        status.view.verdict = Some(Verdict::without_policy(status.now, why));
        let text = explain(&status);
        for part in [
            "h1 is unknown since",
            "no policy is in force",
            "the policy cannot be used",
            "\n  /etc/p.yaml:6:5: thresholds.a: wrong\n",
            "\n  /etc/p.yaml:9:1: name: empty\n",
            "Plan p-1 is under way",
            "Nothing new is begun by itself",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_plan_under_way_is_never_called_nothing() {
        for kind in [
            VerdictKind::Unknown,
            VerdictKind::Suspect,
            VerdictKind::Healthy,
        ] {
            let mut status = status(kind, None);
            assert!(told(&status).contains("Nothing moves"), "{kind}");
            status.plans.push(plan());
            assert!(!told(&status).contains("Nothing moves"), "{kind}");
        }
    }

    #[test]
    fn that_nothing_moves_is_said_once() {
        let kinds = [
            (VerdictKind::Healthy, None),
            (VerdictKind::Unknown, None),
            (VerdictKind::Degraded, Some(Stage::Watch)),
        ];
        for (kind, stage) in kinds {
            let mut status = status(kind, stage);
            let times =
                |status: &Status| told(status).to_lowercase().matches("nothing moves").count();
            assert_eq!(times(&status), 1, "{}", told(&status));
            status.judgement.as_mut().unwrap().automatic = false;
            assert_eq!(times(&status), 1, "{}", told(&status));
            let judgement = status.judgement.as_mut().unwrap();
            judgement.automatic = true;
            judgement.paused = Some(Pause {
                since: UnixMillis(0),
                until: UnixMillis(u64::MAX),
                why: "pause.json cannot be read".into(),
            });
            assert_eq!(times(&status), 1, "{}", told(&status));
            let text = told(&status);
            assert!(
                text.contains("by itself until `lifeboat policy resume`."),
                "{text}"
            );
        }
    }

    #[test]
    fn a_failing_disk_that_was_pulled_says_what_ends_it() {
        let missing = |per| Missing {
            threshold: "slow".into(),
            metric: "block.latency_p99".into(),
            subject: Some(Subject::new(per, "sda")),
            last_sample: None,
            failing: true,
            text: String::new(),
        };
        assert!(ends(&missing(Per::Disk)).is_some());
        assert_eq!(ends(&missing(Per::Container)), None);
    }
}
