//! JSON values whose objects keep their order, written the way Python's `json.dumps` does.
//!
//! The configuration files and safetensors headers of a generated checkpoint have fixed SHA-256
//! digests, so spelling matters: key order, separators, escapes and the digits of floats.

use std::fmt::Write;

use serde_json::Value;

/// One JSON value; an object is a list of pairs in insertion order.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// An object of the given pairs.
    pub(crate) fn object<const N: usize>(pairs: [(&str, Json); N]) -> Json {
        Json::Object(pairs.map(|(key, value)| (key.to_owned(), value)).into())
    }

    /// Replaces the value under `key` where it stands, or appends it, as a Python dict does.
    pub(crate) fn set(&mut self, key: &str, value: impl Into<Json>) {
        let value = value.into();
        match self.pairs_mut().iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.pairs_mut().push((key.to_owned(), value)),
        }
    }

    /// Sets every pair, in order.
    pub(crate) fn update<const N: usize>(&mut self, pairs: [(&str, Json); N]) {
        for (key, value) in pairs {
            self.set(key, value);
        }
    }

    /// This object with every pair of `other` set on it.
    pub(crate) fn merged_with(&self, other: &Json) -> Json {
        let mut all = self.clone();
        for (key, value) in other.pairs() {
            all.set(key, value.clone());
        }
        all
    }

    /// Deletes the pair under `key`.
    pub(crate) fn remove(&mut self, key: &str) {
        self.pairs_mut().retain(|(k, _)| k != key);
    }

    /// What Python's `bool(value)` says.
    pub(crate) fn is_truthy(&self) -> bool {
        match self {
            Json::Null => false,
            Json::Bool(value) => *value,
            Json::Int(value) => *value != 0,
            Json::Float(value) => *value != 0.0,
            Json::Text(value) => !value.is_empty(),
            Json::List(value) => !value.is_empty(),
            Json::Object(value) => !value.is_empty(),
        }
    }

    /// `json.dumps(value, separators=(",", ":"))`
    pub(crate) fn compact(&self) -> String {
        let mut out = String::new();
        self.write(&mut out, None);
        out
    }

    /// `json.dumps(value, indent=2)`
    pub(crate) fn pretty(&self) -> String {
        let mut out = String::new();
        self.write(&mut out, Some(0));
        out
    }

    fn pairs(&self) -> &[(String, Json)] {
        match self {
            Json::Object(pairs) => pairs,
            other => unreachable!("not an object: {other:?}"),
        }
    }

    fn pairs_mut(&mut self) -> &mut Vec<(String, Json)> {
        match self {
            Json::Object(pairs) => pairs,
            other => unreachable!("not an object: {other:?}"),
        }
    }

    /// `level`: the depth of indentation, or nothing for the compact form.
    fn write(&self, out: &mut String, level: Option<usize>) {
        match self {
            Json::Null => out.push_str("null"),
            Json::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Json::Int(value) => out.push_str(&value.to_string()),
            Json::Float(value) => out.push_str(&float(*value)),
            Json::Text(value) => text(out, value),
            Json::List(items) if items.is_empty() => out.push_str("[]"),
            Json::List(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    separate(out, i, level);
                    item.write(out, level.map(|l| l + 1));
                }
                new_line(out, level);
                out.push(']');
            }
            Json::Object(pairs) if pairs.is_empty() => out.push_str("{}"),
            Json::Object(pairs) => {
                out.push('{');
                for (i, (key, value)) in pairs.iter().enumerate() {
                    separate(out, i, level);
                    text(out, key);
                    out.push_str(if level.is_some() { ": " } else { ":" });
                    value.write(out, level.map(|l| l + 1));
                }
                new_line(out, level);
                out.push('}');
            }
        }
    }
}

/// What stands before item `index`: a comma unless it is the first, and its own line when indented.
fn separate(out: &mut String, index: usize, level: Option<usize>) {
    if index > 0 {
        out.push(',');
    }
    new_line(out, level.map(|l| l + 1));
}

fn new_line(out: &mut String, level: Option<usize>) {
    if let Some(level) = level {
        out.push('\n');
        out.push_str(&"  ".repeat(level));
    }
}

/// Python's `repr` of a float: shortest digits, exponent form below 1e-4 and from 1e16 on.
fn float(value: f64) -> String {
    if value != 0.0 && (value.abs() < 1e-4 || value.abs() >= 1e16) {
        let short = format!("{value:e}");
        let (digits, exponent) = short.split_once('e').expect("the e format has an exponent");
        let (sign, size) = match exponent.strip_prefix('-') {
            Some(size) => ('-', size),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{size:0>2}");
    }
    format!("{value:?}")
}

/// A string literal with everything outside printable ASCII escaped (`ensure_ascii`).
fn text(out: &mut String, value: &str) {
    out.push('"');
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            other => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}").expect("a String takes any text");
                }
            }
        }
    }
    out.push('"');
}

impl From<bool> for Json {
    fn from(value: bool) -> Json {
        Json::Bool(value)
    }
}

impl From<i32> for Json {
    fn from(value: i32) -> Json {
        Json::Int(value.into())
    }
}

impl From<u64> for Json {
    fn from(value: u64) -> Json {
        Json::Int(value.into())
    }
}

impl From<usize> for Json {
    fn from(value: usize) -> Json {
        Json::Int(value as i128)
    }
}

impl From<f64> for Json {
    fn from(value: f64) -> Json {
        Json::Float(value)
    }
}

impl From<&str> for Json {
    fn from(value: &str) -> Json {
        Json::Text(value.to_owned())
    }
}

impl From<String> for Json {
    fn from(value: String) -> Json {
        Json::Text(value)
    }
}

impl<T: Into<Json>> From<Vec<T>> for Json {
    fn from(value: Vec<T>) -> Json {
        Json::List(value.into_iter().map(Into::into).collect())
    }
}

impl<T: Into<Json>, const N: usize> From<[T; N]> for Json {
    fn from(value: [T; N]) -> Json {
        Json::List(value.into_iter().map(Into::into).collect())
    }
}

impl<T: Into<Json>> From<Option<T>> for Json {
    fn from(value: Option<T>) -> Json {
        value.map_or(Json::Null, Into::into)
    }
}

impl From<&Value> for Json {
    fn from(value: &Value) -> Json {
        match value {
            Value::Null => Json::Null,
            Value::Bool(b) => Json::Bool(*b),
            Value::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(i), _) => Json::Int(i.into()),
                (None, Some(u)) => Json::Int(u.into()),
                (None, None) => Json::Float(n.as_f64().expect("a JSON number is a float at worst")),
            },
            Value::String(s) => Json::Text(s.clone()),
            Value::Array(items) => Json::List(items.iter().map(Json::from).collect()),
            Value::Object(pairs) => {
                Json::Object(pairs.iter().map(|(k, v)| (k.clone(), v.into())).collect())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Floats have Python's digits, not Rust's.
    #[test]
    fn floats_are_spelt_as_python_does() {
        let spelt = [1e-5, 1e-6, 0.0001, 0.02, 2.0, 500_000.0, 1e16, 1.5e300, 0.0].map(float);
        let python = ["1e-05", "1e-06", "0.0001", "0.02", "2.0", "500000.0", "1e+16", "1.5e+300"];
        assert_eq!(spelt[..8], python);
        assert_eq!(spelt[8], "0.0");
    }

    /// Both forms keep the order of insertion and escape what is not ASCII.
    #[test]
    fn objects_keep_their_order() {
        let mut value = Json::object([("b", 1.into()), ("a", Json::List(vec![]))]);
        value.update([("c", vec!["é\n", "😀"].into()), ("b", Json::Null)]);
        assert_eq!(value.compact(), r#"{"b":null,"a":[],"c":["\u00e9\n","\ud83d\ude00"]}"#);
        let pretty = "{\n  \"b\": null,\n  \"a\": [],\n  \"c\": [\n    \"\\u00e9\\n\",\n    \
                      \"\\ud83d\\ude00\"\n  ]\n}";
        assert_eq!(value.pretty(), pretty);
    }
}
