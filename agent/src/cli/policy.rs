//! `lifeboat policy`: checks, tests, replays and pauses degradation policies.

use super::daemon::ask;
use super::output::say;
use super::{Context, Failure, Outcome};
use crate::api::local::PauseRequest;
use crate::health::{
    Policy, PolicyError, ReplaySummary, Replayed, RuleTestOutcome, RuleTests, policy_schema,
    replay, span,
};
use crate::migration::pause::Pause;
use crate::model::locate::{Fault, Field, Position};
use crate::model::units::{UnixMillis, human_duration, utc};
use anyhow::Context as _;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Degradation policies.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Check policy files; exits with 1 when one has a mistake.
    Check {
        /// The files.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Run rule tests: series in, verdicts out; exits with 1 when one fails.
    Test {
        /// The files, as in policies/tests.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Judge a recording (`lifeboat record`) by a policy: when the verdict would have changed, and why.
    Replay {
        /// The recording.
        #[arg(value_name = "FILE")]
        recording: PathBuf,
        /// The policy.
        #[arg(long, value_name = "FILE")]
        policy: PathBuf,
    },
    /// Print the JSON schema of policies, for editors.
    Schema,
    /// Let the policy judge and move nothing by itself, also over a restart of the agent.
    Pause {
        /// How long, such as 2h.
        #[arg(long = "for", value_name = "SPAN", value_parser = span)]
        lasting: Duration,
        /// Why; shown by status and explain.
        #[arg(long, value_name = "TEXT")]
        why: String,
    },
    /// End a pause.
    Resume,
}

/// Runs the subcommand.
///
/// # Errors
/// A file cannot be read, has mistakes or does not pass (they have been printed), or the agent refuses.
pub fn run(args: Args, context: &Context) -> Outcome {
    match args.command {
        Command::Check { files } => check_all(&files, context.json),
        Command::Test { files } => test_all(&files, context.json),
        Command::Replay { recording, policy } => replay_one(&recording, &policy, context.json),
        Command::Schema => {
            say(&serde_json::to_string_pretty(&policy_schema())?);
            Ok(())
        }
        Command::Pause { lasting, why } => pause(lasting, why, context),
        Command::Resume => resume(context),
    }
}

/// Until when a pause lasts. One of which the file cannot be read has no end of its own.
pub fn lasts(pause: &Pause) -> String {
    match pause.until {
        UnixMillis(u64::MAX) => "until `lifeboat policy resume`".to_owned(),
        until => format!("until {}", utc(until)),
    }
}

fn pause(lasting: Duration, why: String, context: &Context) -> Outcome {
    let request = PauseRequest { lasting, why };
    let pause: Pause = ask(&context.socket, async |agent| {
        agent
            .post("/v1/policy/pause", &request)
            .await
            .map_err(Failure::of)
    })?;
    say(&if context.json {
        serde_json::to_string(&pause)?
    } else {
        format!(
            "paused {}: the policy judges, and nothing moves by itself",
            lasts(&pause)
        )
    });
    Ok(())
}

fn resume(context: &Context) -> Outcome {
    let ended: Option<Pause> = ask(&context.socket, async |agent| {
        agent
            .post("/v1/policy/resume", &())
            .await
            .map_err(Failure::of)
    })?;
    say(&match ended {
        _ if context.json => serde_json::to_string(&ended)?,
        // Of one that could not be read.
        Some(pause) if pause.since == UnixMillis(0) => {
            format!("resumed; it was paused ({})", pause.why)
        }
        Some(pause) => format!(
            "resumed; it was paused since {} ({})",
            utc(pause.since),
            pause.why
        ),
        None => "it was not paused".to_owned(),
    });
    Ok(())
}

fn replay_one(recording: &Path, policy: &Path, json: bool) -> Outcome {
    let policy = match check(policy, &policy.display().to_string()) {
        Ok(policy) => policy,
        Err(error) => return Err(anyhow::anyhow!("{error}").into()),
    };
    let named = || recording.display().to_string();
    let bytes = std::fs::read(recording).with_context(|| format!("cannot read {}", named()))?;
    if json {
        let mut events = Vec::new();
        let summary = replay(&bytes, policy, |event| events.push(json!(event)));
        let summary = summary.with_context(named)?;
        let mut told = json!({ "events": events, "summary": summary });
        let altered = whole(recording, bytes.len(), &summary).err();
        if let Some(why) = &altered {
            told["error"] = why.to_string().into();
            told["code"] = 1.into();
        }
        say(&told.to_string());
        return altered.map_or(Ok(()), |_| Err(Failure::Told(1)));
    }
    let summary = replay(&bytes, policy, |event| say(&told(&event))).with_context(named)?;
    say(&format!(
        "{} sweeps over {}: {} change(s) of the verdict, {} time(s) it would have acted",
        summary.sweeps,
        human_duration(summary.lasted),
        summary.changes,
        summary.acts
    ));
    if summary.torn > 0 && !summary.altered {
        say(&format!(
            "the last {} bytes are no whole frame, as after a crash of the recorder",
            summary.torn
        ));
    }
    Ok(whole(recording, bytes.len(), &summary)?)
}

/// An error where a recording was altered: what follows was not judged.
fn whole(recording: &Path, length: usize, summary: &ReplaySummary) -> anyhow::Result<()> {
    if !summary.altered {
        return Ok(());
    }
    let (recording, torn) = (recording.display(), summary.torn);
    let at = length - torn;
    anyhow::bail!(
        "{recording} was altered at byte {at}: the {torn} bytes from there on were not judged"
    )
}

fn told(event: &Replayed) -> String {
    match event {
        Replayed::Started { device, at } => format!("{}  recording of {device} starts", utc(*at)),
        Replayed::Gap { at, lasted } => {
            format!(
                "{}  after {} without samples",
                utc(*at),
                human_duration(*lasted)
            )
        }
        Replayed::Verdict { at, acts, verdict } => {
            let stage = verdict
                .stage
                .map_or(String::new(), |stage| format!(", stage {stage}"));
            let acts = if *acts {
                format!(
                    "\n  would evacuate; delegated: {}",
                    if verdict.delegate.is_empty() {
                        "nothing".to_owned()
                    } else {
                        verdict.delegate.to_string()
                    }
                )
            } else {
                String::new()
            };
            format!("{}  {verdict}{stage}{acts}", utc(*at))
        }
    }
}

fn test_all(files: &[PathBuf], json: bool) -> Outcome {
    let mut failed = false;
    let mut reports = Vec::new();
    for path in files {
        let file = path.display().to_string();
        let outcome = test(path);
        let (passed, faults) = match &outcome {
            Ok(outcomes) => (
                outcomes.iter().filter(|one| one.faults.is_empty()).count(),
                outcomes.iter().flat_map(|one| one.faults.clone()).collect(),
            ),
            Err(faults) => (0, faults.clone()),
        };
        failed |= !faults.is_empty();
        if json {
            reports.push(json!({ "file": file, "ok": faults.is_empty(), "passed": passed, "faults": listed(&faults) }));
            continue;
        }
        for fault in &faults {
            eprintln!("{}", fault.in_file(&file));
        }
        if let Ok(outcomes) = &outcome {
            say(&format!(
                "{file}: {passed} of {} tests passed",
                outcomes.len()
            ));
        }
    }
    if json {
        say(&Value::from(reports).to_string());
    }
    if failed {
        Err(Failure::Told(1))
    } else {
        Ok(())
    }
}

fn test(path: &Path) -> Result<Vec<RuleTestOutcome>, Vec<Fault>> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        vec![unread(&format!(
            "cannot read the file: {error}; give the path of rule tests"
        ))]
    })?;
    let tests = RuleTests::parse(&text)?;
    let policy = path.parent().unwrap_or(Path::new("")).join(&tests.policy);
    let field = Field::default().at("policy");
    let policy = check(&policy, &policy.display().to_string()).map_err(|error| {
        vec![Fault::in_value(
            &text,
            &field,
            format!("the policy is broken:\n{error}"),
        )]
    })?;
    Ok(tests.run(&text, &policy))
}

fn unread(message: &str) -> Fault {
    Fault {
        position: Position { line: 1, column: 1 },
        field: Field::default(),
        message: message.to_owned(),
    }
}

fn check_all(files: &[PathBuf], json: bool) -> Outcome {
    let mut bad = 0;
    let mut reports = Vec::new();
    for path in files {
        let file = path.display().to_string();
        let checked = check(path, &file);
        bad += usize::from(checked.is_err());
        if json {
            reports.push(report(&file, &checked));
        } else {
            match checked {
                Ok(policy) => say(&format!(
                    "{file}: OK ({}, {} thresholds)",
                    policy.name,
                    policy.thresholds.len()
                )),
                Err(error) => eprintln!("{error}"),
            }
        }
    }
    if json {
        say(&Value::from(reports).to_string());
    }
    if bad > 0 {
        Err(Failure::Told(1))
    } else {
        Ok(())
    }
}

fn check(path: &Path, file: &str) -> Result<Policy, PolicyError> {
    let text = std::fs::read_to_string(path).map_err(|error| PolicyError {
        file: file.to_owned(),
        faults: vec![unread(&format!(
            "cannot read the file: {error}; give the path of a policy"
        ))],
    })?;
    Policy::parse(&text, file)
}

fn report(file: &str, checked: &Result<Policy, PolicyError>) -> Value {
    match checked {
        Ok(policy) => json!({
            "file": file,
            "ok": true,
            "name": policy.name,
            "thresholds": policy.thresholds.len(),
            "faults": [],
        }),
        Err(error) => json!({
            "file": file,
            "ok": false,
            "faults": listed(&error.faults),
        }),
    }
}

fn listed(faults: &[Fault]) -> Vec<Value> {
    let listed = faults.iter().map(|fault| {
        json!({
            "line": fault.position.line,
            "column": fault.position.column,
            "field": fault.field.to_string(),
            "message": fault.message,
        })
    });
    listed.collect()
}
