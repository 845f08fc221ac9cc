//! `lifeboat relations`: who depends on whom, and in which order they start.

use super::daemon::ask;
use super::output::{say, table};
use super::{Context, Failure, Outcome};
use crate::api::local::Status;
use crate::model::edge::{Correlated, Edge, Learnt, Protocol};
use crate::model::ids::ContainerName;
use crate::model::locate::{Fault, Field, parse};
use crate::model::nearest::hint;
use crate::relations::{Evidence, Graph};
use anyhow::Context as _;
use clap::ValueEnum;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Who depends on whom, and in which order they start.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Read the relations from this file instead of asking the daemon:
    /// {"containers":["web","db"],"edges":[{"child":"web","parent":"db"}],"correlated":[]}
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// What to print; `table` when not given, and with --json everything.
    #[arg(long, value_enum)]
    format: Option<Format>,
}

/// A way to print relations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// One line per container: step, dependencies with ports, dependents.
    Table,
    /// One line per container and relation.
    Matrix,
    /// Children below their parents.
    Tree,
    /// The steps in which they start.
    Order,
    /// Graphviz.
    Dot,
    /// A picture.
    Svg,
    /// Everything, as JSON.
    Json,
}

/// Runs the subcommand.
///
/// # Errors
/// The file cannot be read or has mistakes, or the daemon cannot be asked.
pub fn run(args: &Args, context: &Context) -> Outcome {
    let evidence = match &args.input {
        Some(path) => {
            let name = path.display().to_string();
            let text = std::fs::read_to_string(path).with_context(|| {
                format!("cannot read {name}; write a file as in `lifeboat relations --help`")
            })?;
            read_input(&text, &name)?
        }
        None => from_daemon(&context.socket)?,
    };
    say(&render(&evidence, args.format, context.json)?);
    Ok(())
}

/// What the daemon of this host knows.
fn from_daemon(socket: &Path) -> Result<Evidence, Failure> {
    let status: Status = ask(socket, async |agent| {
        agent.get("/v1/status").await.map_err(Failure::of)
    })?;
    let view = &status.view;
    Ok(Evidence {
        containers: view
            .containers
            .iter()
            .map(|container| container.name.clone())
            .collect(),
        edges: view.snapshot.edges.clone(),
        correlated: view.correlated(),
    })
}

/// A file of relations cannot be used. One line for each mistake.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct InputError(String);

/// Reads a hand-written file of relations. `file` is the name that errors show.
///
/// # Errors
/// Mistakes of form or meaning, with file, line and column.
pub fn read_input(text: &str, file: &str) -> Result<Evidence, InputError> {
    // The JSON parser is faster; the other one reads JSON too and can tell the place of a mistake.
    let evidence: Evidence = serde_json::from_str(text)
        .or_else(|_| parse(text))
        .map_err(|fault| InputError(fault.in_file(file)))?;
    let faults = mistakes(text, &evidence);
    if faults.is_empty() {
        return Ok(evidence);
    }
    let lines: Vec<String> = faults.iter().map(|fault| fault.in_file(file)).collect();
    Err(InputError(lines.join("\n")))
}

/// Enough to see what is wrong with a file; finding the place of each costs a pass over it.
const MAX_FAULTS: usize = 10;

fn mistakes(text: &str, evidence: &Evidence) -> Vec<Fault> {
    let root = Field::default();
    let known: BTreeSet<&str> = evidence
        .containers
        .iter()
        .map(ContainerName::as_str)
        .collect();
    let mut found: Vec<(Field, String)> = Vec::new();
    let mut seen = BTreeSet::new();
    for (place, name) in evidence.containers.iter().enumerate() {
        if name.as_str().is_empty() {
            found.push((root.at("containers").at(place), "the name is empty".into()));
        } else if !seen.insert(name) {
            let message = format!("`{name}` stands here twice: remove one");
            found.push((root.at("containers").at(place), message));
        }
    }
    let mut ends = |field: Field, one: (&str, &ContainerName), other: (&str, &ContainerName)| {
        let part = |end: &str| match end.parse::<usize>() {
            Ok(index) => field.at(index),
            Err(_) => field.at(end),
        };
        for (end, name) in [one, other] {
            if !known.contains(name.as_str()) {
                let hint = hint(name.as_str(), known.iter().copied());
                let message =
                    format!("unknown container `{name}`: it is not under `containers`{hint}");
                found.push((part(end), message));
            }
        }
        if one.1 == other.1 {
            let message = format!("`{}` is related to itself: remove the entry", one.1);
            found.push((part(other.0), message));
        }
    };
    for (place, edge) in evidence.edges.iter().enumerate() {
        let field = root.at("edges").at(place);
        ends(field, ("child", &edge.child), ("parent", &edge.parent));
    }
    for (place, Correlated(one, other)) in evidence.correlated.iter().enumerate() {
        ends(root.at("correlated").at(place), ("0", one), ("1", other));
    }
    found
        .into_iter()
        .take(MAX_FAULTS)
        .map(|(field, message)| Fault::in_value(text, &field, message))
        .collect()
}

/// Prints evidence and what follows from it. With `json`, an explicit matrix, tree, order or dot is
/// printed as JSON by itself.
///
/// # Errors
/// None is expected; JSON that cannot be written is passed on.
pub fn render(
    evidence: &Evidence,
    format: Option<Format>,
    json: bool,
) -> Result<String, serde_json::Error> {
    let graph = evidence.graph();
    let text = match (format.unwrap_or(Format::Table), json) {
        (Format::Json, _) | (Format::Table, true) => whole(evidence, &graph)?,
        (Format::Matrix, true) => pretty(&graph.matrix())?,
        (Format::Tree, true) => pretty(&graph.tree())?,
        (Format::Order, true) => serde_json::to_string(&graph.order())?,
        (Format::Dot, true) => pretty(&graph.dot())?,
        (Format::Svg, true) => pretty(&graph.svg())?,
        (Format::Table, false) => table_text(evidence, &graph),
        (Format::Matrix, false) => matrix_text(&graph),
        (Format::Tree, false) => graph.tree().to_string(),
        (Format::Order, false) => order_text(&graph),
        (Format::Dot, false) => graph.dot(),
        (Format::Svg, false) => graph.svg(),
    };
    Ok(text)
}

fn pretty(value: &impl Serialize) -> Result<String, serde_json::Error> {
    serde_json::to_string_pretty(value)
}

fn whole(evidence: &Evidence, graph: &Graph) -> Result<String, serde_json::Error> {
    let order = graph.order();
    let cycles: Vec<&Vec<ContainerName>> = order
        .0
        .iter()
        .filter(|step| step.sequential)
        .map(|step| &step.containers)
        .collect();
    pretty(&serde_json::json!({
        "containers": evidence.containers,
        "edges": evidence.edges,
        "correlated": evidence.correlated,
        "left_out": graph.left_out(),
        "matrix": graph.matrix(),
        "tree": graph.tree(),
        "order": order,
        "cycles": cycles,
    }))
}

fn joined(names: &[ContainerName]) -> String {
    if names.is_empty() {
        return "-".to_owned();
    }
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    names.join(", ")
}

fn table_text(evidence: &Evidence, graph: &Graph) -> String {
    // Services of each dependence, whether its role is certain, and whether any of it is of late.
    let mut ports: BTreeMap<(&str, &str), (BTreeSet<String>, bool, bool)> = BTreeMap::new();
    for edge in &evidence.edges {
        let entry = ports
            .entry((edge.child.as_str(), edge.parent.as_str()))
            .or_default();
        entry.0.extend(service(edge));
        entry.1 |= edge.learnt != Learnt::Inferred;
        entry.2 |= !edge.stale;
    }
    let mut step = BTreeMap::new();
    for (number, one) in graph.order().0.into_iter().enumerate() {
        for name in one.containers {
            step.insert(name, number + 1);
        }
    }
    let rows: Vec<[String; 6]> = graph
        .matrix()
        .into_iter()
        .map(|row| {
            let on: Vec<String> = row
                .is_a
                .iter()
                .map(|parent| {
                    let known = ports.get(&(row.container.as_str(), parent.as_str()));
                    let (services, certain, fresh) = known.cloned().unwrap_or_default();
                    let services: String = services.into_iter().collect();
                    let mark = match (certain, fresh) {
                        (true, true) => "",
                        (false, true) => " (inferred)",
                        (true, false) => " (stale)",
                        (false, false) => " (inferred, stale)",
                    };
                    format!("{parent}{services}{mark}")
                })
                .collect();
            let by: Vec<ContainerName> = graph
                .children_of(&row.container)
                .into_iter()
                .cloned()
                .collect();
            [
                row.container.to_string(),
                step.get(&row.container)
                    .map_or_else(String::new, ToString::to_string),
                row.relation.to_string(),
                if on.is_empty() {
                    "-".to_owned()
                } else {
                    on.join(", ")
                },
                joined(&by),
                joined(&row.correlated),
            ]
        })
        .collect();
    table(
        [
            "CONTAINER",
            "STEP",
            "RELATION",
            "DEPENDS ON",
            "USED BY",
            "CORRELATED WITH",
        ],
        &rows,
    )
}

/// `:5432`, `:53/udp`, `:unix`; nothing of a declared edge without a port.
fn service(edge: &Edge) -> Option<String> {
    match (edge.protocol, edge.port) {
        (Protocol::Unix, _) => Some(":unix".to_owned()),
        (_, 0) => None,
        (Protocol::Tcp, port) => Some(format!(":{port}")),
        (Protocol::Udp, port) => Some(format!(":{port}/udp")),
    }
}

fn matrix_text(graph: &Graph) -> String {
    let mut rows = Vec::new();
    for row in graph.matrix() {
        let name = row.container.to_string();
        if !row.has_a.is_empty() {
            rows.push([name.clone(), "HAS-A".to_owned(), joined(&row.has_a)]);
        }
        if !row.is_a.is_empty() {
            rows.push([name.clone(), "IS-A".to_owned(), joined(&row.is_a)]);
        }
        if row.has_a.is_empty() && row.is_a.is_empty() {
            rows.push([name, row.relation.to_string(), "-".to_owned()]);
        }
    }
    table(["CONTAINER", "RELATION", "CONTAINERS"], &rows)
}

fn order_text(graph: &Graph) -> String {
    let rows: Vec<[String; 3]> = graph
        .order()
        .0
        .iter()
        .enumerate()
        .map(|(number, step)| {
            let how = match (step.sequential, step.containers.len()) {
                (true, _) => "a cycle: one after another, in this order",
                (false, 1) => "",
                (false, _) => "may start side by side",
            };
            [
                (number + 1).to_string(),
                joined(&step.containers),
                how.to_owned(),
            ]
        })
        .collect();
    table(["STEP", "CONTAINERS", ""], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEN: &str = r#"{"containers":["a","b","c","d","e","f","g","h","i","j"],
        "edges":[{"child":"d","parent":"a"},{"child":"f","parent":"d"},{"child":"g","parent":"d"},
                 {"child":"h","parent":"d"},{"child":"j","parent":"g"}],
        "correlated":[["a","b"],["a","c"],["d","e"],["g","h"],["g","i"]]}"#;

    #[test]
    fn the_known_answer_comes_out_of_the_command() {
        let evidence = read_input(TEN, "ten.json").unwrap();
        assert_eq!(
            render(&evidence, Some(Format::Order), true).unwrap(),
            r#"[["a","b","c","e","i"],["d"],["g","h"],["f","j"]]"#
        );
        let whole = render(&evidence, None, true).unwrap();
        let whole: serde_json::Value = serde_json::from_str(&whole).unwrap();
        assert_eq!(whole["order"][3], serde_json::json!(["f", "j"]));
        assert_eq!(
            whole,
            serde_json::from_str::<serde_json::Value>(
                &render(&evidence, Some(Format::Json), false).unwrap()
            )
            .unwrap()
        );
    }

    #[test]
    fn the_table_is_the_default_and_tells_step_and_dependence() {
        let evidence = read_input(
            r#"{"containers":["web","db"],"edges":[{"child":"web","parent":"db","port":5432}]}"#,
            "f",
        )
        .unwrap();
        assert_eq!(
            render(&evidence, None, false).unwrap(),
            "CONTAINER  STEP  RELATION  DEPENDS ON  USED BY  CORRELATED WITH\n\
             db         1     HAS-A     -           web      -\n\
             web        2     IS-A      db:5432     -        -\n"
        );
    }

    #[test]
    fn the_table_tells_the_transport_and_what_is_stale() {
        let evidence = read_input(
            r#"{"containers":["web","db"],"edges":[
                {"child":"web","parent":"db","port":53,"protocol":"udp","learnt":"observed","stale":true},
                {"child":"web","parent":"db","protocol":"unix","learnt":"inferred","stale":true}]}"#,
            "f",
        )
        .unwrap();
        let table = render(&evidence, None, false).unwrap();
        assert!(table.contains("db:53/udp:unix (stale)"), "{table}");
    }

    #[test]
    fn a_name_is_shown_and_cannot_speak_to_the_terminal() {
        let text = r#"{"containers":["web\u001b[2J\nfake  1  HAS-A","db\u009b1m"],
            "edges":[{"child":"web\u001b[2J\nfake  1  HAS-A","parent":"db\u009b1m","port":5432}]}"#;
        let evidence = read_input(text, "f").unwrap();
        for format in [
            Format::Table,
            Format::Matrix,
            Format::Tree,
            Format::Order,
            Format::Dot,
            Format::Svg,
        ] {
            let text = render(&evidence, Some(format), false).unwrap();
            let raw = text.contains(|c: char| c.is_control() && c != '\n');
            assert!(!raw && !text.contains("\nfake"), "{text:?}");
        }
        let table = render(&evidence, None, false).unwrap();
        assert!(table.contains(r"web\x1b[2J\nfake"), "{table}");
        let json = render(&evidence, None, true).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["edges"][0]["parent"], "db\u{9b}1m");
    }

    #[test]
    fn an_unknown_container_is_told_with_its_place_and_the_nearest_name() {
        let text = "{\"containers\":[\"web\",\"data\"],\n \"edges\":[{\"child\":\"web\",\"parent\":\"dta\"}]}";
        let error = read_input(text, "r.json").unwrap_err().to_string();
        assert_eq!(
            error,
            "r.json:2:35: edges[0].parent: unknown container `dta`: it is not under `containers`; did you mean data?"
        );
    }

    #[test]
    fn each_mistake_of_the_file_names_its_place() {
        for (text, expected) in [
            (
                r#"{"containers":["a","a"]}"#,
                "f:1:20: containers[1]: `a` stands here twice",
            ),
            (
                r#"{"containers":["a"],"correlated":[["a","b"]]}"#,
                "f:1:40: correlated[0][1]: unknown container `b`",
            ),
            (
                r#"{"containers":["a"],"edges":[{"child":"a","parent":"a"}]}"#,
                "f:1:52: edges[0].parent: `a` is related to itself",
            ),
            (
                r#"{"containers":["a"],"edges":[{"child":"a"}]}"#,
                "f:1:30: edges[0]: `parent` is missing: write it",
            ),
            (
                r#"{"containers":["a"],"edge":[]}"#,
                "f:1:21: edge: unknown field; did you mean edges?",
            ),
            (r#"{"containers":["a""#, "f:1:"),
        ] {
            let error = read_input(text, "f").unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
