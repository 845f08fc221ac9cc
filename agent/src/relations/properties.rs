//! The known answer, and properties that hold for every graph.

use super::{Evidence, Graph, Relation, StartOrder};
use crate::model::edge::{Correlated, Edge, Learnt};
use crate::model::ids::ContainerName;
use crate::model::units::UnixMillis;
use proptest::prelude::*;
use std::collections::HashMap;
use std::num::NonZeroUsize;

fn edge(child: &str, parent: &str) -> Edge {
    Edge {
        child: child.into(),
        parent: parent.into(),
        port: 0,
        protocol: Default::default(),
        learnt: Learnt::Observed,
        connections: 1,
        bytes_to_parent: None,
        bytes_to_child: None,
        how: Default::default(),
        stale: false,
        retransmits: None,
        srtt_us: None,
        first_seen: UnixMillis(0),
        last_seen: UnixMillis(0),
    }
}

fn graph(containers: &[&str], edges: &[Edge], correlated: &[(&str, &str)]) -> Graph {
    let correlated: Vec<Correlated> = correlated
        .iter()
        .map(|&(one, other)| Correlated(one.into(), other.into()))
        .collect();
    Graph::new(
        containers.iter().map(|&name| name.into()),
        edges,
        &correlated,
    )
}

fn ten() -> Graph {
    let edges: Vec<Edge> = [("d", "a"), ("f", "d"), ("g", "d"), ("h", "d"), ("j", "g")]
        .map(|(child, parent)| edge(child, parent))
        .into();
    let correlated = [("a", "b"), ("a", "c"), ("d", "e"), ("g", "h"), ("g", "i")];
    let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
    graph(&names, &edges, &correlated)
}

#[test]
fn the_known_answer_of_ten_containers() {
    assert_eq!(
        serde_json::to_string(&ten().order()).unwrap(),
        r#"[["a","b","c","e","i"],["d"],["g","h"],["f","j"]]"#
    );
}

#[test]
fn the_matrix_tells_both_relations_of_each_container() {
    let matrix = ten().matrix();
    let names = |list: &[ContainerName]| list.iter().map(ToString::to_string).collect::<String>();
    let row = |name: &str| matrix.iter().find(|row| row.container.0 == name).unwrap();
    let h = row("h");
    assert_eq!(
        (h.relation, names(&h.has_a), names(&h.is_a)),
        (Relation::Both, "g".into(), "d".into())
    );
    assert_eq!(
        (row("b").relation, row("j").relation),
        (Relation::HasA, Relation::IsA)
    );
    assert_eq!(names(&row("d").has_a), "efgh");
}

#[test]
fn the_tree_shows_every_child_below_its_parent() {
    let tree = ten().tree().to_string();
    assert!(
        tree.starts_with("a  ⇄ b, c\n└─ d  ⇄ e\n   └─ f\n   └─ g  ⇄ h, i\n      └─ j\n"),
        "{tree}"
    );
}

#[test]
fn dot_quotes_names_and_draws_correlation_once() {
    let dot = graph(&["a\"", "b"], &[edge("a\"", "b")], &[("b", "a\"")]).dot();
    assert!(dot.contains(r#""a\"" -> "b";"#), "{dot}");
    assert_eq!(dot.matches("dashed").count(), 1);
}

#[test]
fn a_cycle_is_one_step_ordered_by_evidence_weight() {
    let heavy = Edge {
        connections: 50,
        ..edge("app", "db")
    };
    let guessed = Edge {
        learnt: Learnt::Inferred,
        connections: 9000,
        ..edge("db", "app")
    };
    let order = graph(
        &["app", "db", "web"],
        &[heavy, guessed, edge("web", "app")],
        &[],
    )
    .order();
    assert_eq!(order.names(), [vec!["db", "app"], vec!["web"]]);
    assert!(order.0[0].sequential && !order.0[1].sequential);
}

#[test]
fn evidence_about_others_is_counted_and_left_out() {
    let graph = graph(&["a"], &[edge("a", "gone"), edge("a", "a")], &[("a", "b")]);
    assert_eq!(graph.left_out(), 2);
    assert_eq!(graph.order().names(), [["a"]]);
    assert_eq!(graph.matrix()[0].relation, Relation::Independent);
}

#[test]
fn families_stay_together_and_groups_are_balanced() {
    let graph = graph(&["a", "b", "c", "d", "e"], &[edge("a", "b")], &[("d", "e")]);
    let weight = |name: &ContainerName| if name.0 == "c" { 30 } else { 10 };
    let groups = graph.groups(NonZeroUsize::new(2).unwrap(), weight);
    let names: Vec<String> = groups
        .iter()
        .map(|group| group.containers.iter().map(ToString::to_string).collect())
        .collect();
    assert_eq!(names, ["abde", "c"]);
    assert_eq!(groups[1].workload, 30);
    assert_eq!(graph.groups(NonZeroUsize::new(9).unwrap(), weight).len(), 3);
}

#[test]
fn the_picture_shows_everything_and_each_child_below_its_parent() {
    let svg = ten().svg();
    assert_eq!(svg.matches("<rect ").count(), 11);
    assert_eq!(svg.matches("marker-end").count(), 5);
    assert_eq!(svg.matches("stroke-dasharray").count(), 5);
    let height = |name: &str| -> f64 {
        let (_, after) = svg.split_once(&format!("<title>{name}: ")).unwrap();
        let (_, y) = after.split_once(" y=\"").unwrap();
        y.split_once('"').unwrap().0.parse().unwrap()
    };
    for (child, parent) in [("d", "a"), ("f", "d"), ("g", "d"), ("h", "d"), ("j", "g")] {
        assert!(height(child) > height(parent), "{child} above {parent}");
    }
    assert!(!svg.contains("href") && !svg.contains("<script"));
    let odd = graph(&["a<b"], &[], &[]).svg();
    assert!(odd.contains("a&lt;b") && !odd.contains("a<b"));
}

#[test]
fn a_chain_of_a_hundred_thousand_needs_no_deep_stack() {
    let names: Vec<String> = (0..100_000).map(|n| format!("c{n:06}")).collect();
    let edges: Vec<Edge> = names
        .windows(2)
        .map(|pair| edge(&pair[0], &pair[1]))
        .collect();
    let all = names.iter().map(|name| ContainerName(name.clone()));
    let graph = Graph::new(all, &edges, &[]);
    assert_eq!(graph.order().0.len(), 100_000);
    assert_eq!(graph.tree().0.last().unwrap().depth, 99_999);
    assert_eq!(graph.groups(NonZeroUsize::MIN, |_| 1)[0].workload, 100_000);
}

prop_compose! {
    fn evidence()(count in 1_usize..14)(
        edges in prop::collection::vec((0..count, 0..count, 0_u64..4, any::<bool>()), 0..30),
        correlated in prop::collection::vec((0..count, 0..count), 0..8),
        count in Just(count),
    ) -> Evidence {
        let name = |number: usize| ContainerName(format!("c{number}"));
        Evidence {
            containers: (0..count).map(name).collect(),
            edges: edges
                .into_iter()
                .map(|(child, parent, connections, observed)| Edge {
                    connections,
                    learnt: if observed { Learnt::Observed } else { Learnt::Inferred },
                    ..edge(&name(child).0, &name(parent).0)
                })
                .collect(),
            correlated: correlated
                .into_iter()
                .map(|(one, other)| Correlated(name(one), name(other)))
                .collect(),
        }
    }
}

/// Which containers depend on which, over any number of edges.
fn reaches(evidence: &Evidence) -> HashMap<(String, String), bool> {
    let mut reach: HashMap<(String, String), bool> = HashMap::new();
    for edge in &evidence.edges {
        reach.insert((edge.child.0.clone(), edge.parent.0.clone()), true);
    }
    for via in &evidence.containers {
        for from in &evidence.containers {
            for to in &evidence.containers {
                let has = |a: &ContainerName, b: &ContainerName| {
                    reach.contains_key(&(a.0.clone(), b.0.clone()))
                };
                if has(from, via) && has(via, to) {
                    reach.insert((from.0.clone(), to.0.clone()), true);
                }
            }
        }
    }
    reach
}

fn step_of(order: &StartOrder) -> HashMap<&str, usize> {
    let names = order.0.iter().enumerate();
    names
        .flat_map(|(step, one)| one.containers.iter().map(move |name| (name.as_str(), step)))
        .collect()
}

proptest! {
    #[test]
    fn every_container_starts_exactly_once(evidence in evidence()) {
        let order = evidence.graph().order();
        let mut started: Vec<&str> = order.names().concat();
        started.sort_unstable();
        let mut all: Vec<&str> = evidence.containers.iter().map(ContainerName::as_str).collect();
        all.sort_unstable();
        prop_assert_eq!(started, all);
        prop_assert!(order.0.iter().all(|step| !step.containers.is_empty()));
    }

    #[test]
    fn no_child_starts_before_its_parent_unless_they_are_in_one_cycle(evidence in evidence()) {
        let order = evidence.graph().order();
        let step = step_of(&order);
        let reach = reaches(&evidence);
        for edge in evidence.edges.iter().filter(|edge| edge.child != edge.parent) {
            let (child, parent) = (edge.child.as_str(), edge.parent.as_str());
            if reach.contains_key(&(parent.to_owned(), child.to_owned())) {
                prop_assert_eq!(step[child], step[parent]);
                prop_assert!(order.0[step[child]].sequential);
            } else {
                prop_assert!(step[parent] < step[child], "{} before {}", child, parent);
            }
        }
    }

    #[test]
    fn a_step_that_runs_side_by_side_holds_no_two_that_depend_on_each_other(evidence in evidence()) {
        let reach = reaches(&evidence);
        for step in evidence.graph().order().0.iter().filter(|step| !step.sequential) {
            for one in &step.containers {
                for other in step.containers.iter().filter(|other| *other != one) {
                    prop_assert!(!reach.contains_key(&(one.0.clone(), other.0.clone())));
                }
            }
        }
    }

    #[test]
    fn classes_start_in_their_order(evidence in evidence()) {
        let graph = evidence.graph();
        let class: HashMap<String, u8> = graph
            .matrix()
            .into_iter()
            .map(|row| (row.container.0, row.relation.class()))
            .collect();
        let order = graph.order();
        let classes: Vec<u8> = order.names().concat().into_iter().map(|name| class[name]).collect();
        prop_assert!(classes.is_sorted(), "{:?}", classes);
        for step in order.names() {
            prop_assert!(step.iter().all(|name| class[*name] == class[step[0]]));
        }
    }

    #[test]
    fn the_order_of_the_evidence_does_not_matter(evidence in evidence(), turn in 0_usize..30) {
        let mut other = evidence.clone();
        other.containers.reverse();
        other.edges.reverse();
        let turn = turn.min(other.edges.len());
        other.edges.rotate_left(turn);
        other.correlated.reverse();
        let (one, other) = (evidence.graph(), other.graph());
        prop_assert_eq!(one.order(), other.order());
        prop_assert_eq!(one.matrix(), other.matrix());
        prop_assert_eq!(one.tree(), other.tree());
        prop_assert_eq!(one.dot(), other.dot());
        let targets = NonZeroUsize::new(3).unwrap();
        prop_assert_eq!(one.groups(targets, |_| 1), other.groups(targets, |_| 1));
    }

    #[test]
    fn related_containers_share_a_group(evidence in evidence(), targets in 1_usize..5) {
        let graph = evidence.graph();
        let groups = graph.groups(NonZeroUsize::new(targets).unwrap(), |name| name.0.len() as u64);
        prop_assert!(groups.len() <= targets && groups.iter().all(|group| !group.containers.is_empty()));
        let place = |name: &ContainerName| groups.iter().position(|group| group.containers.contains(name));
        for edge in &evidence.edges {
            prop_assert_eq!(place(&edge.child), place(&edge.parent));
        }
        for Correlated(one, other) in &evidence.correlated {
            prop_assert_eq!(place(one), place(other));
        }
        let grouped: usize = groups.iter().map(|group| group.containers.len()).sum();
        prop_assert_eq!(grouped, evidence.containers.len());
    }

    #[test]
    fn the_tree_shows_every_pair_once(evidence in evidence()) {
        let graph = evidence.graph();
        let tree = graph.tree();
        let mut above: Vec<ContainerName> = Vec::new();
        let mut pairs = Vec::new();
        for branch in tree.0 {
            above.truncate(branch.depth as usize);
            if let Some(parent) = above.last() {
                pairs.push((branch.container.clone(), parent.clone()));
            }
            above.push(branch.container);
        }
        pairs.sort_unstable();
        let expected: Vec<(ContainerName, ContainerName)> = graph
            .matrix()
            .into_iter()
            .flat_map(|row| row.is_a.into_iter().map(move |parent| (row.container.clone(), parent)))
            .collect();
        prop_assert_eq!(pairs, expected);
    }
}
