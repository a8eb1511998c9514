//! `config.json`: the few fields that decide shapes, heads and quantisation, read from the raw JSON.
//!
//! Raw, because the defaults and renames of configuration classes have been wrong before (GLM-5's rope size, the
//! vision sizes of Kimi-K2.5); a key means what the published file says.

use serde_json::Value;

use crate::error::PlanError;

/// The name of the main configuration file.
pub const CONFIG_FILE: &str = "config.json";

/// The name of the file that ModelOpt declares quantisation in.
pub const HF_QUANT_CONFIG_FILE: &str = "hf_quant_config.json";

/// The largest dimension that is believed: eight times the largest published one (an MLP of 131 072), and small enough
/// that the size of any parameter (three dimensions and an element) fits in 64 bits.
pub const DIM_MAX: u64 = 1 << 20;

/// The most experts that are believed (published models have up to 384).
pub const EXPERTS_MAX: u64 = 4096;

/// The largest vocabulary that is believed.
pub const VOCAB_MAX: u64 = 1 << 24;

/// A JSON object with typed access; errors name the file and the key.
#[derive(Debug, Clone)]
pub struct Config {
    file: String,
    /// Where this object lies in the file (`text_config.` for a nested one).
    prefix: String,
    value: Value,
}

impl Config {
    /// Parses a configuration file.
    ///
    /// # Errors
    /// Not JSON, or not an object.
    pub fn parse(file: &str, json: &[u8]) -> Result<Self, PlanError> {
        let value: Value = serde_json::from_slice(json)
            .map_err(|e| PlanError::ConfigSyntax { file: file.into(), reason: e.to_string() })?;
        let this = Self { file: file.into(), prefix: String::new(), value };
        match this.value {
            Value::Object(_) => Ok(this),
            _ => Err(this.wrong("(top level)", "an object")),
        }
    }

    /// An object without keys, as if `prefix` stood empty in `file`.
    pub(crate) fn empty(file: &str, prefix: &str) -> Self {
        Self { file: file.into(), prefix: prefix.into(), value: Value::Object(Default::default()) }
    }

    /// The file's name, for messages.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// File and full key, for messages: `config.json: text_config.quantization_config.ignore`.
    pub fn place(&self, key: &str) -> String {
        format!("{}: {}{key}", self.file, self.prefix)
    }

    /// The nested object under `key`, if there is one.
    pub fn nested(&self, key: &str) -> Option<Config> {
        let value = self.value.get(key)?;
        value.is_object().then(|| Config {
            file: self.file.clone(),
            prefix: format!("{}{key}.", self.prefix),
            value: value.clone(),
        })
    }

    /// The objects in this one, by key; a value of another kind counts as an empty object.
    pub(crate) fn children(&self) -> Vec<(String, Config)> {
        let keys = self.value.as_object().into_iter().flat_map(|object| object.keys());
        let child = |key: &String| {
            let empty = || Self::empty(&self.file, &format!("{}{key}.", self.prefix));
            (key.clone(), self.nested(key).unwrap_or_else(empty))
        };
        keys.map(child).collect()
    }

    /// The raw value under `key`; JSON `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|v| !v.is_null())
    }

    /// The whole object.
    pub fn value(&self) -> &Value {
        &self.value
    }

    /// A required dimension: a positive integer up to [`DIM_MAX`].
    ///
    /// # Errors
    /// Absent, not a whole number, zero or too large.
    pub fn dim(&self, key: &str) -> Result<u64, PlanError> {
        self.dim_up_to(key, DIM_MAX)
    }

    /// A required positive integer with a limit of its own.
    ///
    /// # Errors
    /// As [`Config::dim`].
    pub fn dim_up_to(&self, key: &str, max: u64) -> Result<u64, PlanError> {
        match self.get(key).and_then(Value::as_u64) {
            Some(n) if n > 0 && n <= max => Ok(n),
            _ => Err(self.wrong(key, &format!("an integer from 1 to {max}"))),
        }
    }

    /// An optional count; absent or `null` is `None`, zero is allowed.
    ///
    /// # Errors
    /// Present, but no whole number up to [`DIM_MAX`].
    pub fn opt_count(&self, key: &str) -> Result<Option<u64>, PlanError> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match v.as_u64() {
                Some(n) if n <= DIM_MAX => Ok(Some(n)),
                _ => Err(self.wrong(key, &format!("an integer from 0 to {DIM_MAX}, or null"))),
            },
        }
    }

    /// An optional positive integer with a default.
    ///
    /// # Errors
    /// Present, but not a positive integer.
    pub fn dim_or(&self, key: &str, default: u64) -> Result<u64, PlanError> {
        if self.get(key).is_none() { Ok(default) } else { self.dim(key) }
    }

    /// An optional switch; absent is `false`.
    ///
    /// # Errors
    /// Present, but not a boolean.
    pub fn flag(&self, key: &str) -> Result<bool, PlanError> {
        match self.get(key) {
            None => Ok(false),
            Some(v) => v.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// An optional string.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    /// An optional list of strings; absent is empty.
    ///
    /// # Errors
    /// Present, but no list, or an entry that is no string.
    pub fn texts(&self, key: &str) -> Result<Vec<String>, PlanError> {
        let wrong = || self.wrong(key, "a list of strings");
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let entries = value.as_array().ok_or_else(wrong)?.iter();
        entries.map(|v| v.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
    }

    /// The error for a key whose value cannot be used.
    pub fn wrong(&self, key: &str, expected: &str) -> PlanError {
        let found = match self.value.get(key) {
            None => "nothing".to_owned(),
            Some(v) => {
                let mut text = v.to_string();
                if text.len() > 80 {
                    let cut = (0..=80).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
                    text.truncate(cut);
                    text.push('…');
                }
                text
            }
        };
        PlanError::ConfigValue {
            file: self.file.clone(),
            key: format!("{}{key}", self.prefix),
            expected: expected.into(),
            found,
        }
    }
}
