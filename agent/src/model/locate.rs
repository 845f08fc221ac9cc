//! Files that people write (YAML, and JSON as a part of it): every mistake gets its line and column.
//!
//! Purpose: syntax and type errors as well as mistakes that are found later by meaning point at the
//! key or value itself. Invariants: positions come from the parser that reads the file, never from a
//! search in the text. Non-goals: reading files; the caller knows the file's name.

use super::nearest::hint;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess,
    Visitor,
};
use std::fmt;

/// Where something stands in a text; both count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Column, in characters.
    pub column: usize,
}

/// One step on the way from the top of a document to a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// A mapping's key.
    Key(String),
    /// A sequence's element, from 0.
    Index(usize),
}

impl From<&str> for Part {
    fn from(key: &str) -> Self {
        Self::Key(key.to_owned())
    }
}

impl From<usize> for Part {
    fn from(index: usize) -> Self {
        Self::Index(index)
    }
}

/// Way from the top of a document to a value, printed as `thresholds.disk-slow.above` or
/// `degraded[0].any[1]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Field(pub Vec<Part>);

impl Field {
    /// The field below this one.
    #[must_use]
    pub fn at(&self, part: impl Into<Part>) -> Self {
        let mut parts = self.0.clone();
        parts.push(part.into());
        Self(parts)
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, part) in self.0.iter().enumerate() {
            match part {
                Part::Index(index) => write!(f, "[{index}]")?,
                Part::Key(key) if place == 0 => f.write_str(key)?,
                Part::Key(key) => write!(f, ".{key}")?,
            }
        }
        Ok(())
    }
}

/// One mistake in a document: where, in which field, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where it stands.
    pub position: Position,
    /// The field; empty for the document itself and for syntax errors.
    pub field: Field,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Fault {
    /// A mistake in the value of `field`.
    #[must_use]
    pub fn in_value(text: &str, field: &Field, message: impl Into<String>) -> Self {
        Self::new(text, field, false, message.into())
    }

    /// A mistake about the key of `field`: it should not be there, or something is missing under it.
    #[must_use]
    pub fn in_key(text: &str, field: &Field, message: impl Into<String>) -> Self {
        Self::new(text, field, true, message.into())
    }

    fn new(text: &str, field: &Field, key: bool, message: String) -> Self {
        // A default that is wrong stands nowhere: told at the key under which it would stand.
        let above = (1..field.0.len()).rev();
        let above = above.map(|length| (Field(field.0[..length].to_vec()), true));
        let mut places = std::iter::once((field.clone(), key)).chain(above);
        let found = places.find_map(|(field, key)| locate(text, &field, key));
        Self {
            position: found.unwrap_or(Position { line: 1, column: 1 }),
            field: field.clone(),
            message,
        }
    }

    /// The fault as one line, with the file's name in front as compilers do.
    #[must_use]
    pub fn in_file(&self, file: &str) -> String {
        let Position { line, column } = self.position;
        if self.field.0.is_empty() {
            format!("{file}:{line}:{column}: {}", self.message)
        } else {
            format!("{file}:{line}:{column}: {}: {}", self.field, self.message)
        }
    }
}

/// Reads a YAML or JSON document into a `T`.
///
/// # Errors
/// The first mistake, with its position.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, Fault> {
    serde_path_to_error::deserialize(serde_yaml::Deserializer::from_str(text)).map_err(|error| {
        let field = Field(
            error
                .path()
                .iter()
                .filter_map(|part| match part {
                    serde_path_to_error::Segment::Seq { index } => Some(Part::Index(*index)),
                    serde_path_to_error::Segment::Map { key } => Some(Part::Key(key.clone())),
                    serde_path_to_error::Segment::Enum { .. }
                    | serde_path_to_error::Segment::Unknown => None,
                })
                .collect(),
        );
        let inner = error.into_inner();
        let message = plain_message(&inner, &field);
        let in_key = ["unknown field", "missing field"]
            .iter()
            .any(|start| message.starts_with(start));
        // The path leads to the first of two equal keys; the parser stood at the second.
        let by_path = !field.0.is_empty() && !message.starts_with("duplicate");
        let position = by_path
            .then(|| locate(text, &field, in_key))
            .flatten()
            .or_else(|| {
                inner.location().map(|place| Position {
                    line: place.line(),
                    column: place.column(),
                })
            })
            .unwrap_or(Position { line: 1, column: 1 });
        Fault {
            position,
            field,
            message: in_words(&message),
        }
    })
}

/// What the parser and serde say, as a person would.
fn in_words(message: &str) -> String {
    let names = |text: &str| -> Vec<String> {
        text.split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect()
    };
    let expected = |rest: &str| {
        rest.split_once(", expected ")
            .map(|(_, tail)| tail.to_owned())
    };
    if let Some(rest) = message.strip_prefix("unknown field ") {
        let mut names = names(rest).into_iter();
        let key = names.next().unwrap_or_default();
        let known: Vec<String> = names.collect();
        return format!(
            "unknown field{}",
            hint(&key, known.iter().map(String::as_str))
        );
    }
    if let Some(rest) = message.strip_prefix("unknown variant ") {
        let mut names = names(rest).into_iter();
        let given = names.next().unwrap_or_default();
        let known: Vec<String> = names.collect();
        return format!("`{given}` is not known: write {}", known.join(" or "));
    }
    if let Some(rest) = message.strip_prefix("missing field ") {
        let name = names(rest).concat();
        return format!("`{name}` is missing: write it");
    }
    for start in ["invalid type: ", "invalid value: ", "invalid length "] {
        if let Some((given, wanted)) = message
            .strip_prefix(start)
            .and_then(|rest| Some((rest.split_once(", expected ")?.0, expected(rest)?)))
        {
            return format!(
                "{} does not fit here: write {}",
                kind(given),
                right(&wanted)
            );
        }
    }
    if YAML.iter().any(|start| message.starts_with(start)) {
        return format!(
            "this is no YAML ({message}): look before this place for a bracket or quote that is not closed, a missing colon or a wrong indentation"
        );
    }
    message.to_owned()
}

/// How libyaml begins to say what is no YAML.
const YAML: [&str; 8] = [
    "did not find",
    "could not find",
    "found ",
    "mapping values are not allowed",
    "block sequence entries are not allowed",
    "block collection entries are not allowed",
    "control characters are not allowed",
    "EOF while parsing",
];

/// What serde calls what it was given.
fn kind(given: &str) -> String {
    match given {
        "map" => "a mapping".to_owned(),
        "sequence" => "a list".to_owned(),
        "unit value" => "nothing".to_owned(),
        _ => match given.split_once(' ') {
            Some(("string", text)) => text.replace('"', "`"),
            Some((_, value)) if value.contains('`') => {
                format!("`{}`", value.split('`').nth(1).unwrap_or(value))
            }
            _ => given.to_owned(),
        },
    }
}

/// What serde calls what would be right.
fn right(wanted: &str) -> String {
    match wanted {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more".to_owned(),
        "i8" | "i16" | "i32" | "i64" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a string" => "text".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a mapping".to_owned(),
        _ if wanted.starts_with("struct ") => "a mapping of fields".to_owned(),
        _ => wanted.to_owned(),
    }
}

/// The parser's message without the path and position that it adds; both are told in a [`Fault`].
fn plain_message(error: &serde_yaml::Error, field: &Field) -> String {
    let mut message = error.to_string();
    if let Some(place) = error.location() {
        let tail = format!(" at line {} column {}", place.line(), place.column());
        if let Some(start) = message.find(&tail) {
            message.truncate(start);
        }
    }
    for length in (1..=field.0.len()).rev() {
        let prefix = format!("{}: ", Field(field.0[..length].to_vec()));
        if let Some(rest) = message.strip_prefix(&prefix) {
            return rest.to_owned();
        }
    }
    message
}

/// Position of the value of `field`, or of its key; none when the text has no such field.
///
/// The document is read again by a visitor that walks to the field and gives up there: the parser
/// then reports where it stood.
fn locate(text: &str, field: &Field, key: bool) -> Option<Position> {
    let key = key && matches!(field.0.last(), Some(Part::Key(_)));
    let seed = Walk {
        parts: &field.0,
        key,
    };
    let found = seed.deserialize(serde_yaml::Deserializer::from_str(text));
    let error = found.err()?;
    if !error.to_string().contains(HERE) {
        return None;
    }
    error.location().map(|place| Position {
        line: place.line(),
        column: place.column(),
    })
}

const HERE: &str = "the field that was looked for";

struct Walk<'a> {
    parts: &'a [Part],
    key: bool,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.parts.is_empty() {
            // `Stop` accepts nothing, so every kind of value ends the walk here.
            deserializer.deserialize_any(Stop)
        } else {
            deserializer.deserialize_any(self)
        }
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value with fields")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some((Part::Key(wanted), rest)) = self.parts.split_first() else {
            return Err(A::Error::custom("a sequence was expected"));
        };
        let stop = self.key && rest.is_empty();
        while let Some(found) = map.next_key_seed(Key { wanted, stop })? {
            if found {
                return map.next_value_seed(Walk {
                    parts: rest,
                    key: self.key,
                });
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        let Some((Part::Index(wanted), rest)) = self.parts.split_first() else {
            return Err(A::Error::custom("a mapping was expected"));
        };
        for _ in 0..*wanted {
            if sequence.next_element::<IgnoredAny>()?.is_none() {
                return Ok(());
            }
        }
        let walk = Walk {
            parts: rest,
            key: self.key,
        };
        sequence.next_element_seed(walk).map(|_| ())
    }
}

struct Stop;

impl Visitor<'_> for Stop {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HERE)
    }
}

struct Key<'a> {
    wanted: &'a str,
    stop: bool,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = bool;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<bool, E> {
        if key != self.wanted {
            return Ok(false);
        }
        if self.stop {
            return Err(E::custom(HERE));
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        #[expect(dead_code, reason = "only parsed")]
        size: u32,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[expect(dead_code, reason = "only parsed")]
        list: Vec<Inner>,
    }

    fn fault(text: &str) -> String {
        parse::<Outer>(text).expect_err("a fault").in_file("f")
    }

    #[test]
    fn a_wrong_value_is_found_at_its_line_and_column() {
        let message = fault("list:\n  - size: 1\n  - size: big\n");
        assert!(message.starts_with("f:3:11: list[1].size: "), "{message}");
        assert!(message.contains("big"), "{message}");
    }

    #[test]
    fn an_unknown_key_is_found_at_the_key() {
        let message = fault("list:\n  - size: 1\n    colour: red\n");
        assert!(
            message.starts_with("f:3:5: list[0].colour: unknown field; known: size"),
            "{message}"
        );
    }

    #[test]
    fn json_is_located_as_well_and_so_are_syntax_errors() {
        let message = fault("{\n\t\"list\": [{\"size\": true}]\n}");
        assert!(message.starts_with("f:2:20: list[0].size: "), "{message}");
        let message = fault("list: [\n");
        assert!(
            message.starts_with("f:1:7: list: this is no YAML (did not find"),
            "{message}"
        );
    }

    #[test]
    fn what_the_parser_says_is_told_in_words_that_a_person_knows() {
        for (text, told) in [
            (
                "list: 3\n",
                "f:1:7: list: `3` does not fit here: write a list",
            ),
            (
                "list: [3]\n",
                "f:1:8: list[0]: `3` does not fit here: write a mapping of fields",
            ),
            (
                "list: [{ size: big }]\n",
                "f:1:16: list[0].size: `big` does not fit here: write a whole number, 0 or more",
            ),
            (
                "list: [{ size: -2 }]\n",
                "f:1:16: list[0].size: `-2` does not fit here: write a whole number, 0 or more",
            ),
            (
                "list: [{ size: [] }]\n",
                "f:1:16: list[0].size: a list does not fit here: write a whole number, 0 or more",
            ),
            (
                "list: [{}]\n",
                "f:1:8: list[0]: `size` is missing: write it",
            ),
        ] {
            assert_eq!(fault(text), told, "{text}");
        }
    }

    #[test]
    fn a_mistake_about_what_is_not_written_is_found_where_it_would_be() {
        let text = "a:\n  b: { c: 1 }\n";
        let below = Field::default().at("a").at("b").at("d").at("e");
        let fault = Fault::in_value(text, &below, "no");
        assert_eq!(fault.in_file("f"), "f:2:3: a.b.d.e: no");
    }

    #[test]
    fn a_mistake_of_meaning_is_found_by_its_field() {
        let text = "a:\n  b: 1\nlist: [x, y]\n";
        let list = Field::default().at("list");
        let place = |fault: Fault| (fault.position.line, fault.position.column);
        assert_eq!(place(Fault::in_value(text, &list.at(1), "no")), (3, 11));
        assert_eq!(place(Fault::in_key(text, &list, "no")), (3, 1));
        let inner = Field::default().at("a").at("b");
        assert_eq!(place(Fault::in_value(text, &inner, "no")), (2, 6));
    }
}
