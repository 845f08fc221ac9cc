//! The policies that ship.

use super::{Policy, Rule};

const SHIPPED: &[(&str, &str)] = &[
    ("default", include_str!("../../../policies/default.yaml")),
    (
        "storage-node",
        include_str!("../../../policies/storage-node.yaml"),
    ),
    ("edge", include_str!("../../../policies/edge.yaml")),
];

#[test]
fn the_policies_that_ship_are_valid_and_named_like_their_files() {
    for (name, text) in SHIPPED {
        let policy = Policy::parse(text, name).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(policy.name, *name);
        assert!(!policy.delegate.is_empty(), "{name} delegates something");
    }
}

#[test]
fn every_level_in_a_shipped_policy_clears_on_the_other_side_of_a_gap() {
    for (name, text) in SHIPPED {
        for threshold in Policy::parse(text, name).unwrap().thresholds {
            match threshold.rule {
                Rule::Above { enter, clear, .. } => {
                    assert!(clear.number < enter.number, "{name} {}", threshold.name);
                }
                Rule::Below { enter, clear } => {
                    assert!(clear.number > enter.number, "{name} {}", threshold.name);
                }
                Rule::Forecast { within, clear, .. } => {
                    assert!(clear > within, "{name} {}", threshold.name);
                }
                Rule::Count { .. } => {}
            }
            let sensor = threshold.metric.name == "cpu.temperature";
            assert!(
                threshold.optional || !sensor,
                "{name}: hosts may lack a sensor"
            );
        }
    }
}

#[test]
fn every_value_in_a_shipped_policy_says_where_it_comes_from() {
    const VALUES: &[&str] = &[
        "above:",
        "below:",
        "clear:",
        "for:",
        "count:",
        "hold:",
        "stale_after:",
    ];
    for (name, text) in SHIPPED {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (place, line) in lines.iter().enumerate() {
            if VALUES.iter().any(|value| line.starts_with(value)) {
                let said = line.contains(" # ") || lines[place - 1].starts_with("# ");
                assert!(said, "{name}:{}: {line}", place + 1);
            }
        }
    }
}

#[test]
fn the_example_in_the_documentation_is_valid() {
    let page = include_str!("../../../docs/policies.md");
    let example = page
        .split("```yaml\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    Policy::parse(example, "docs/policies.md").unwrap_or_else(|error| panic!("{error}"));
}
