//! The policy file's JSON schema, generated from the types that read it.

use super::form::{FilePolicy, Scalar};
use crate::model::metric::METRICS;
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
