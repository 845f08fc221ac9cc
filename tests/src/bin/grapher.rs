//! How long the judgement takes on a fleet that nobody runs containers on: 100,000 containers and 1,000,000
//! edges, made from a seed so that every run judges the same. Prints milliseconds as JSON.

use std::collections::BTreeSet;
use std::iter;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use lifeboat::model::edge::Edge;
use lifeboat::model::ids::ContainerName;
use lifeboat::relations::Evidence;
use serde_json::json;

const CONTAINERS: usize = 100_000;
const EDGES: usize = 1_000_000;
const TARGETS: usize = 100;
/// The longest line of containers each of which needs the next.
const CHAIN: usize = 10_000;

/// Numbers that look random and are the same for the same seed: Steele's SplitMix64.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ word >> 31) as usize % limit
    }
}

/// Applications of some tens to some hundreds of containers and one of a tenth of all, which is one deep
/// chain. In each, containers need mostly those close behind them, often one of the few at the end
/// (databases, queues), and now and then one before them: a cycle.
fn evidence(seed: u64) -> Evidence {
    let mut numbers = Numbers(seed);
    let containers: Vec<ContainerName> = (0..CONTAINERS)
        .map(|number| ContainerName::from(format!("application-container-{number:06}").as_str()))
        .collect();
    let mut pairs: BTreeSet<(usize, usize)> = (1..CHAIN).map(|end| (end - 1, end)).collect();
    let mut applications: Vec<Range<usize>> = iter::once(0..CHAIN).collect();
    while let Some(begin) = applications
        .last()
        .map(|last| last.end)
        .filter(|&end| end < CONTAINERS)
    {
        let size = 20 + numbers.below(40) * (1 + numbers.below(10));
        applications.push(begin..(begin + size).min(CONTAINERS));
    }
    while pairs.len() < EDGES {
        // By containers, so that large applications have more edges.
        let child = numbers.below(CONTAINERS);
        let at = applications.partition_point(|one| one.end <= child);
        let application = &applications[at];
        let after = application.end - child;
        let parent = match numbers.below(1_000) {
            0 => application.start + numbers.below(application.len()),
            1..400 => application.end - 1 - numbers.below(application.len().min(8)),
            _ => child + numbers.below(after.min(50)),
        };
        // Of the few at the end, none needs those before it.
        if child < parent || (child > parent && numbers.below(10) == 0) {
            pairs.insert((child, parent));
        }
    }
    let edge = |(child, parent): (usize, usize)| -> Result<Edge> {
        Ok(serde_json::from_value(json!({
            "child": containers[child],
            "parent": containers[parent],
            "connections": (child * 7 + parent) % 1_000,
        }))?)
    };
    let edges = pairs.into_iter().map(edge).collect::<Result<_>>();
    Evidence {
        edges: edges.expect("an edge needs no more than its ends"),
        containers,
        correlated: Vec::new(),
    }
}

fn main() -> Result<()> {
    let evidence = evidence(1);
    let ms = |since: Instant| since.elapsed().as_secs_f64() * 1_000.0;

    let start = Instant::now();
    let graph = evidence.graph();
    let build_ms = ms(start);
    let start = Instant::now();
    let order = graph.order();
    let order_ms = ms(start);
    let start = Instant::now();
    let targets = NonZeroUsize::new(TARGETS).context("targets")?;
    let groups = graph.groups(targets, |name| name.as_str().len() as u64);
    let groups_ms = ms(start);

    let started: usize = order.0.iter().map(|step| step.containers.len()).sum();
    let cycles = order.0.iter().filter(|step| step.sequential).count();
    let grouped: usize = groups.iter().map(|group| group.containers.len()).sum();
    ensure!(
        (started, grouped) == (CONTAINERS, CONTAINERS),
        "everything once"
    );
    ensure!(
        evidence.edges.len() == EDGES && groups.len() == TARGETS,
        "as many as asked for"
    );
    println!(
        "{}",
        json!({
            "containers": CONTAINERS, "edges": EDGES, "targets": TARGETS,
            "steps": order.0.len(), "cycles": cycles,
            "build_ms": build_ms, "order_ms": order_ms, "groups_ms": groups_ms,
        })
    );
    Ok(())
}
