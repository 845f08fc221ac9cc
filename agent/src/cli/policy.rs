//! `lifeboat policy`: checks degradation policies.

use super::output::say;
use super::{Failure, Outcome};
use crate::health::{Policy, PolicyError};
use crate::model::locate::{Fault, Field, Position};
use serde_json::{Value, json};
use std::path::PathBuf;

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
}

/// Runs the subcommand.
///
/// # Errors
/// A file cannot be read or has mistakes; they have been printed.
pub fn run(args: &Args, json: bool) -> Outcome {
    let Command::Check { files } = &args.command;
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

fn check(path: &PathBuf, file: &str) -> Result<Policy, PolicyError> {
    let text = std::fs::read_to_string(path).map_err(|error| PolicyError {
        file: file.to_owned(),
        faults: vec![Fault {
            position: Position { line: 1, column: 1 },
            field: Field::default(),
            message: format!("cannot read the file: {error}; give the path of a policy"),
        }],
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
            "faults": error.faults.iter().map(|fault| json!({
                "line": fault.position.line,
                "column": fault.position.column,
                "field": fault.field.to_string(),
                "message": fault.message,
            })).collect::<Vec<Value>>(),
        }),
    }
}
