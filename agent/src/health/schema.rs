//! The policy file's JSON schema, generated from the types that read it.

use super::form::{FilePolicy, Scalar};
use crate::model::locate::{Fault, Field, parse};
use crate::model::metric::METRICS;
use crate::model::nearest::hint;
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::Value;
use std::borrow::Cow;

/// The schema (JSON Schema 2020-12) that editors complete and check policies with. What a schema
/// cannot say (units, names of thresholds, the healthy side) `Policy::parse` says.
#[must_use]
pub fn policy_schema() -> Value {
    let settings = SchemaSettings::draft2020_12().with_transform(RecursiveTransform(without_null));
    let schema = settings
        .into_generator()
        .into_root_schema_for::<FilePolicy>();
    schema.to_value()
}

/// Fields that the form does not have, each at its key.
///
/// # Errors
/// The text is no YAML.
pub(super) fn unknown_fields(text: &str) -> Result<Vec<Fault>, Fault> {
    let tree: serde_yaml::Value = parse(text)?;
    let root = policy_schema();
    let mut walk = Fields {
        text,
        root: &root,
        unknown: Vec::new(),
    };
    walk.of(&root, &tree, &Field::default());
    Ok(walk.unknown)
}

struct Fields<'a> {
    text: &'a str,
    root: &'a Value,
    unknown: Vec<Fault>,
}

impl Fields<'_> {
    fn of(&mut self, schema: &Value, value: &serde_yaml::Value, field: &Field) {
        match value {
            serde_yaml::Value::Mapping(entries) => {
                let Some(schema) = self.of_mapping(schema) else {
                    return;
                };
                let known = schema["properties"].as_object();
                let others = schema
                    .get("additionalProperties")
                    .filter(|any| any.is_object());
                for (key, value) in entries {
                    // The form takes any scalar for a name.
                    let key = match key {
                        serde_yaml::Value::String(text) => text.clone(),
                        serde_yaml::Value::Number(number) => number.to_string(),
                        serde_yaml::Value::Bool(flag) => flag.to_string(),
                        serde_yaml::Value::Null => "null".to_owned(),
                        _ => continue,
                    };
                    let key = key.as_str();
                    let field = field.at(key);
                    match known.and_then(|known| known.get(key)).or(others) {
                        Some(schema) => self.of(schema, value, &field),
                        None => {
                            let names = known.into_iter().flat_map(|known| known.keys());
                            let near = hint(key, names.map(String::as_str));
                            let message = format!("unknown field{near}");
                            self.unknown.push(Fault::in_key(self.text, &field, message));
                        }
                    }
                }
            }
            serde_yaml::Value::Sequence(elements) => {
                let schema = schema["items"].clone();
                for (place, value) in elements.iter().enumerate() {
                    self.of(&schema, value, &field.at(place));
                }
            }
            serde_yaml::Value::Tagged(tagged) => self.of(schema, &tagged.value, field),
            _ => {}
        }
    }

    /// What a mapping must be here.
    fn of_mapping(&self, schema: &Value) -> Option<Value> {
        if let Some(name) = schema["$ref"].as_str() {
            return self.of_mapping(self.root.pointer(name.strip_prefix('#')?)?);
        }
        if let Some(any) = schema["anyOf"].as_array() {
            return any.iter().find_map(|one| self.of_mapping(one));
        }
        let holds = ["properties", "additionalProperties"];
        let holds = holds.iter().any(|what| schema.get(what).is_some());
        holds.then(|| schema.clone())
    }
}

/// A key without a value is refused, so no value may be null.
fn without_null(schema: &mut Schema) {
    let Some(object) = schema.as_object_mut() else {
        return;
    };
    if object.get("default") == Some(&Value::Null) {
        object.remove("default");
    }
    if let Some(Value::Array(types)) = object.get_mut("type") {
        types.retain(|one| one != "null");
        if let [one] = types.as_slice() {
            let one = one.clone();
            object.insert("type".into(), one);
        }
    }
    if let Some(Value::Array(any)) = object.get_mut("anyOf") {
        any.retain(|one| one.get("type").is_none_or(|of| of != "null"));
        if let [Value::Object(one)] = any.as_slice() {
            let one = one.clone();
            object.remove("anyOf");
            object.extend(one);
        }
    }
}

macro_rules! schema {
    ($name:ident, $type:ty, $schema:expr) => {
        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                $schema
            }
        }
    };
}

/// A span of time.
pub(super) struct Span;
schema!(
    Span,
    Span,
    json_schema!({
        "description": "A span of time: whole numbers with ms, s, m, h or d.",
        "type": "string",
        "pattern": "^([0-9]+(ms|s|m|h|d))+$",
    })
);

/// The name of a metric.
pub(super) struct MetricName;
schema!(
    Metric,
    MetricName,
    json_schema!({
        "oneOf": METRICS.iter().map(|metric| serde_json::json!({
            "const": metric.name,
            "description": metric.about,
        })).collect::<Vec<_>>(),
    })
);

/// What a metric is measured on.
pub(super) struct PerName;
schema!(Per, PerName, {
    let mut names: Vec<Value> = METRICS
        .iter()
        .flat_map(|metric| metric.per)
        .filter_map(|per| serde_json::to_value(per).ok())
        .collect();
    names.sort_by_key(ToString::to_string);
    names.dedup();
    json_schema!({ "enum": names })
});

/// An action.
pub(super) struct ActionName;
schema!(
    Action,
    ActionName,
    json_schema!({ "enum": ["encrypt", "transfer", "serve"] })
);

schema!(
    Quantity,
    Scalar,
    json_schema!({
        "description": "A quantity in the metric's unit: 40ms, 3GiB, 85%, 85C, 120/s, 3x or a plain number.",
        "type": ["string", "number"],
    })
);
