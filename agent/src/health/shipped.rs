//! The policies that ship.

use super::{Policy, Rule, RuleTests, policy_schema};

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

/// The rule tests of the policies, in the same order.
const TESTS: &[&str] = &[
    include_str!("../../../policies/tests/default.yaml"),
    include_str!("../../../policies/tests/storage-node.yaml"),
    include_str!("../../../policies/tests/edge.yaml"),
];

#[test]
fn the_rule_tests_of_every_shipped_policy_pass_and_see_each_threshold_fail() {
    for ((name, text), tests) in SHIPPED.iter().zip(TESTS) {
        let policy = Policy::parse(text, name).unwrap();
        let parsed = RuleTests::parse(tests).unwrap_or_else(|faults| panic!("{name}: {faults:?}"));
        assert_eq!(parsed.policy, format!("../{name}.yaml"));
        for outcome in parsed.run(tests, &policy) {
            let told: Vec<String> = outcome
                .faults
                .iter()
                .map(|fault| fault.in_file(name))
                .collect();
            assert!(told.is_empty(), "{}:\n{}", outcome.name, told.join("\n"));
        }
        let untested: Vec<&str> = parsed
            .untested(&policy)
            .iter()
            .map(|one| one.name.as_str())
            .collect();
        assert!(
            untested.is_empty(),
            "{name}: no test sees {untested:?} fail"
        );
    }
}

#[test]
fn the_shipped_schema_is_that_of_the_types_and_every_shipped_policy_fits_it() {
    let schema = policy_schema();
    let shipped: serde_json::Value =
        serde_json::from_str(include_str!("../../../policies/schema.json")).unwrap();
    assert!(
        shipped == schema,
        "write it anew: lifeboat policy schema >policies/schema.json"
    );
    let fits = jsonschema::validator_for(&schema).unwrap();
    for (name, text) in SHIPPED {
        let policy: serde_json::Value = serde_yaml::from_str(text).unwrap();
        let wrong: Vec<String> = fits
            .iter_errors(&policy)
            .map(|e| format!("{e} at {}", e.instance_path()))
            .collect();
        assert!(wrong.is_empty(), "{name}: {wrong:?}");
        let broken: serde_json::Value =
            serde_yaml::from_str(&text.replacen("metric: ", "metric: x", 1)).unwrap();
        assert!(!fits.is_valid(&broken), "{name} with an unknown metric");
        let broken: serde_json::Value =
            serde_yaml::from_str(&text.replacen("for:", "fro:", 1)).unwrap();
        assert!(!fits.is_valid(&broken), "{name} with an unknown field");
        assert!(
            text.starts_with("# yaml-language-server: $schema=schema.json\n"),
            "{name}"
        );
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
