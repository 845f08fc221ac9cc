//! The live view: containers, pressure, block and run-queue latency as plain tables.

use super::daemon::ask;
use super::output::{clear, table};
use super::{Context, Failure, Outcome};
use crate::api::local::Status;
use crate::model::telemetry::{BlockIo, Latencies, RunQueueStats, Snapshot};
use crate::model::units::{Bytes, human_duration};
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// Shows containers with their latencies; live on a terminal, once otherwise.
#[derive(clap::Args)]
pub struct Arguments {
    /// Once, also on a terminal.
    #[arg(long)]
    once: bool,
}

/// Prints the view.
pub fn run(arguments: &Arguments, context: &Context) -> Outcome {
    let live = std::io::stdout().is_terminal() && !arguments.once && !context.json;
    ask(&context.socket, async |agent| {
        loop {
            let status: Status = agent.get("/v1/status").await.map_err(Failure::of)?;
            if context.json {
                println!("{}", serde_json::to_string(&status.view.snapshot)?);
            } else {
                let table = render(&status.view.snapshot);
                if live {
                    clear();
                }
                print!("{table}");
                std::io::stdout().flush()?;
            }
            if !live {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    })
}

/// Shown where a source yields nothing.
const NOTHING: &str = "-";

/// One snapshot as text: the host, its containers, its disks, what depends on what, and what the
/// senses lost or cannot see.
#[must_use]
pub fn render(snapshot: &Snapshot) -> String {
    let mut parts = vec![host(snapshot), containers(snapshot)];
    parts.extend(disks(snapshot));
    parts.extend(edges(snapshot));
    parts.extend(blind_spots(snapshot));
    parts.join("\n")
}

fn host(snapshot: &Snapshot) -> String {
    let metric = |name: &str, unit: &str| {
        snapshot
            .samples
            .iter()
            .find(|sample| sample.metric == name && sample.subject.name.is_empty())
            .map_or_else(
                || NOTHING.to_owned(),
                |sample| format!("{:.1}{unit}", sample.value),
            )
    };
    let facts = &snapshot.host;
    let memory = match (facts.memory_available, facts.memory_total) {
        (Some(available), Some(total)) => format!("{available} of {total}"),
        _ => NOTHING.to_owned(),
    };
    let pressure = table(
        [
            "LOAD",
            "CPU",
            "MEMORY FREE",
            "CPU PSI",
            "MEM PSI",
            "I/O PSI",
            "DISK USED",
            "HOTTEST",
        ],
        &[[
            metric("cpu.load1", ""),
            metric("cpu.used", " %"),
            memory,
            metric("pressure.cpu_some", " %"),
            metric("pressure.memory_some", " %"),
            metric("pressure.io_some", " %"),
            metric("disk.used", " %"),
            metric("cpu.temperature", " °C"),
        ]],
    );
    let all = latency_row("host", facts.run_queue.as_ref(), facts.block.as_ref());
    format!("{pressure}\n{}", table(LATENCY, &[all]))
}

const LATENCY: [&str; 9] = [
    "NAME", "RUNQ P50", "RUNQ P99", "WAITING", "I/O P50", "I/O P99", "IOPS", "READ/s", "WRITE/s",
];

fn latency_row(
    name: &str,
    run_queue: Option<&RunQueueStats>,
    block: Option<&BlockIo>,
) -> [String; 9] {
    let run_queue_at = |percent| latency(run_queue.map(|stats| &stats.latency), percent);
    let block_at = |percent| latency(block.map(BlockIo::latency).as_ref(), percent);
    let rate = |rate: fn(&BlockIo) -> f64| {
        block.map_or_else(
            || NOTHING.to_owned(),
            |io| Bytes(rate(io) as u64).to_string(),
        )
    };
    [
        name.to_owned(),
        run_queue_at(50.0),
        run_queue_at(99.0),
        run_queue.map_or_else(|| NOTHING.to_owned(), |stats| stats.waiting.to_string()),
        block_at(50.0),
        block_at(99.0),
        block.map_or_else(|| NOTHING.to_owned(), |io| format!("{:.0}", io.iops())),
        rate(|io| io.reads.bytes_per_second),
        rate(|io| io.writes.bytes_per_second),
    ]
}

fn latency(histogram: Option<&Latencies>, percent: f64) -> String {
    histogram
        .and_then(|histogram| histogram.percentile(percent))
        .map_or_else(
            || NOTHING.to_owned(),
            |nanoseconds| human_duration(Duration::from_nanos(nanoseconds as u64)),
        )
}

fn containers(snapshot: &Snapshot) -> String {
    let rows: Vec<[String; 9]> = snapshot
        .containers
        .iter()
        .map(|stats| {
            latency_row(
                stats.name.as_str(),
                stats.run_queue.as_ref(),
                stats.block.as_ref(),
            )
        })
        .collect();
    let heading = LATENCY.map(|column| {
        if column == "NAME" {
            "CONTAINER"
        } else {
            column
        }
    });
    table(heading, &rows)
}

fn disks(snapshot: &Snapshot) -> Option<String> {
    let rows: Vec<[String; 11]> = snapshot
        .devices
        .iter()
        .map(|disk| {
            let io = &disk.block;
            let [name, _, _, _, p50, p99, iops, read, write] =
                latency_row(&disk.name, None, Some(io));
            let mut sizes = io.reads.sizes.clone();
            sizes.merge(&io.writes.sizes);
            let or_nothing = |value: Option<String>| value.unwrap_or_else(|| NOTHING.to_owned());
            [
                name,
                p50,
                p99,
                format!("{:.1}", io.queue_depth),
                iops,
                read,
                write,
                Bytes(io.discards.bytes_per_second as u64).to_string(),
                or_nothing(
                    sizes
                        .percentile(50.0)
                        .map(|size| Bytes(size as u64).to_string()),
                ),
                or_nothing(io.sequential_percent().map(|share| format!("{share:.0} %"))),
                io.errors.to_string(),
            ]
        })
        .collect();
    let heading = [
        "DISK",
        "I/O P50",
        "I/O P99",
        "QUEUE",
        "IOPS",
        "READ/s",
        "WRITE/s",
        "DISCARD/s",
        "SIZE",
        "SEQUENTIAL",
        "ERRORS",
    ];
    (!rows.is_empty()).then(|| table(heading, &rows))
}

fn counted<T: ToString>(figure: Option<T>) -> String {
    figure.map_or_else(|| "-".to_owned(), |figure| figure.to_string())
}

fn edges(snapshot: &Snapshot) -> Option<String> {
    let rows: Vec<[String; 8]> = snapshot
        .edges
        .iter()
        .map(|edge| {
            [
                edge.child.to_string(),
                format!("{}{}", edge.parent, edge.service()),
                edge.connections.to_string(),
                counted(edge.bytes_to_parent),
                counted(edge.bytes_to_child),
                counted(edge.retransmits),
                edge.srtt_us.map_or_else(
                    || "-".to_owned(),
                    |us| format!("{:.3} ms", f64::from(us) / 1e3),
                ),
                format!("{:?}", edge.learnt).to_lowercase(),
            ]
        })
        .collect();
    let heading = [
        "CHILD",
        "PARENT",
        "CONNECTIONS",
        "SENT",
        "RECEIVED",
        "SENT AGAIN",
        "RTT",
        "LEARNT",
    ];
    (!rows.is_empty()).then(|| table(heading, &rows))
}

/// Losses and disabled programs: silence must not be mistaken for health.
fn blind_spots(snapshot: &Snapshot) -> Option<String> {
    let lost = snapshot
        .losses
        .iter()
        .filter(|loss| loss.lost > 0)
        .map(|loss| format!("lost: {} did not fit into {}\n", loss.lost, loss.map));
    let disabled = snapshot
        .disabled
        .iter()
        .map(|disabled| format!("disabled: {}: {}\n", disabled.what, disabled.why));
    let text: String = lost.chain(disabled).collect();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::metric::{Sample, Subject};
    use crate::model::telemetry::{ContainerStats, Disabled, Loss};

    #[test]
    fn an_absent_source_is_a_dash_and_a_loss_is_said() {
        let mut waited = Latencies::default();
        waited.record(40_000_000);
        let snapshot = Snapshot {
            samples: vec![Sample {
                metric: "cpu.load1".to_owned(),
                subject: Subject::device(),
                value: 1.5,
                at: Default::default(),
            }],
            containers: vec![ContainerStats {
                name: "web".into(),
                run_queue: Some(RunQueueStats {
                    latency: waited,
                    waiting: 2,
                }),
                block: None,
            }],
            losses: vec![Loss {
                map: "ports".to_owned(),
                lost: 3,
            }],
            disabled: vec![Disabled {
                what: "block".to_owned(),
                why: "this kernel has no struct blkcg".to_owned(),
            }],
            ..Snapshot::default()
        };
        let text = render(&snapshot);
        let web: Vec<&str> = text
            .lines()
            .find(|line| line.starts_with("web"))
            .expect("a row for the container")
            .split_whitespace()
            .collect();
        assert_eq!(
            web.len(),
            11,
            "two latencies with units, then one value a column: {web:?}"
        );
        assert_eq!(web[5..], ["2", "-", "-", "-", "-", "-"]);
        assert!(text.contains("lost: 3 did not fit into ports"));
        assert!(text.contains("disabled: block: this kernel has no struct blkcg"));
        assert!(text.contains("1.5"));
    }
}
