//! JSON as Python writes it, and typed access to its keys with errors that name them.
//!
//! Python's `json` prints bare `Infinity`, `-Infinity` and `NaN`, which JSON does not have; transformers 5 writes
//! `{"__float__": "Infinity"}` instead. Both are read here, as the latter.

use super::error::CheckpointError;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// No configuration is larger than this.
const MAX_BYTES: u64 = 64 << 20;
/// The key under which transformers writes a number that JSON lacks.
const FLOAT_KEY: &str = "__float__";

/// Reads a JSON file whose top level is an object.
pub(super) fn read_object(path: &Path) -> Result<Map<String, Value>, CheckpointError> {
    let size = std::fs::metadata(path).map_err(CheckpointError::io(path, "read"))?.len();
    let bad = |message: String| CheckpointError::Json { path: path.into(), message };
    if size > MAX_BYTES {
        return Err(bad(format!("it has {size} bytes; expected at most {MAX_BYTES}")));
    }
    let bytes = std::fs::read(path).map_err(CheckpointError::io(path, "read"))?;
    let text = String::from_utf8(bytes).map_err(|e| bad(format!("it is not UTF-8: {e}")))?;
    match serde_json::from_str(&name_bare_floats(&text)) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(bad("expected an object, {…}, at the top level".into())),
        Err(e) => Err(bad(e.to_string())),
    }
}

/// Replaces `Infinity`, `-Infinity` and `NaN` outside of strings.
fn name_bare_floats(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut rest) = (false, text);
    while let Some(c) = rest.chars().next() {
        let bare = ["Infinity", "-Infinity", "NaN"].into_iter().find(|w| !in_string && rest.starts_with(w));
        let length = if let Some(word) = bare {
            out.push_str(&format!("{{\"{FLOAT_KEY}\":\"{word}\"}}"));
            word.len()
        } else {
            let escaped = in_string && c == '\\';
            in_string ^= c == '"';
            let length = c.len_utf8() + if escaped { rest.chars().nth(1).map_or(0, char::len_utf8) } else { 0 };
            out.push_str(&rest[..length]);
            length
        };
        rest = &rest[length..];
    }
    out
}

/// A number as JSON can hold it; the form of transformers 5 where it cannot.
pub(super) fn float(x: f32) -> Value {
    if x.is_finite() {
        return Value::from(crate::config::shortest(x));
    }
    let name = if x.is_nan() {
        "NaN"
    } else if x > 0.0 {
        "Infinity"
    } else {
        "-Infinity"
    };
    serde_json::json!({ FLOAT_KEY: name })
}

/// A number for [`to_python`], which is what mamba-ssm reads its configuration with.
pub(super) fn python_float(x: f32) -> Value {
    match float(x) {
        Value::Object(o) => Value::String(format!("{FLOAT_KEY}{}", o[FLOAT_KEY].as_str().unwrap_or_default())),
        finite => finite,
    }
}

/// JSON as Python's `json` module reads and writes it: infinities are bare words.
pub(super) fn to_python(map: &Map<String, Value>) -> Result<String, serde_json::Error> {
    let mut text = serde_json::to_string_pretty(map)?;
    for word in ["Infinity", "-Infinity", "NaN"] {
        text = text.replace(&format!("\"{FLOAT_KEY}{word}\""), word);
    }
    Ok(text + "\n")
}

/// The keys of a JSON object, with the file they come from for error messages. `null` counts as absent.
pub(super) struct Keys<'a> {
    pub(super) path: PathBuf,
    pub(super) map: &'a Map<String, Value>,
    /// Put in front of keys in messages, e.g. `ssm_cfg.`
    pub(super) prefix: &'static str,
}

impl<'a> Keys<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn error(&self, key: &str, message: impl Into<String>) -> CheckpointError {
        CheckpointError::Key { path: self.path.clone(), key: format!("{}{key}", self.prefix), message: message.into() }
    }

    pub(super) fn unsupported(&self, message: impl Into<String>) -> CheckpointError {
        CheckpointError::Unsupported { path: self.path.clone(), message: message.into() }
    }

    /// A size: a whole number that is not negative. Whether it makes sense is checked with the whole configuration.
    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        self.get(key).map(|v| self.as_size(key, v)).transpose()
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, CheckpointError> {
        self.optional_size(key)?.ok_or_else(|| self.error(key, "is missing; expected a whole number"))
    }

    pub(super) fn size_or(&self, key: &str, default: usize) -> Result<usize, CheckpointError> {
        Ok(self.optional_size(key)?.unwrap_or(default))
    }

    fn as_size(&self, key: &str, v: &Value) -> Result<usize, CheckpointError> {
        let n = v.as_u64().and_then(|n| usize::try_from(n).ok());
        n.ok_or_else(|| self.error(key, format!("is {v}; expected a whole number that is not negative")))
    }

    pub(super) fn bool_or(&self, key: &str, default: bool) -> Result<bool, CheckpointError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(v) => Err(self.error(key, format!("is {v}; expected true or false"))),
        }
    }

    pub(super) fn float_or(&self, key: &str, default: f32) -> Result<f32, CheckpointError> {
        self.get(key).map_or(Ok(default), |v| self.as_float(key, v).map(|x| x as f32))
    }

    pub(super) fn as_float(&self, key: &str, v: &Value) -> Result<f64, CheckpointError> {
        let named = v.get(FLOAT_KEY).and_then(Value::as_str).and_then(|s| match s {
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            "NaN" => Some(f64::NAN),
            _ => None,
        });
        v.as_f64().or(named).ok_or_else(|| self.error(key, format!("is {v}; expected a number")))
    }

    /// A pair of numbers, such as the limits of Δ.
    pub(super) fn float_pair_or(&self, key: &str, default: (f32, f32)) -> Result<(f32, f32), CheckpointError> {
        let Some(v) = self.get(key) else { return Ok(default) };
        match v.as_array().map(Vec::as_slice) {
            Some([low, high]) => Ok((self.as_float(key, low)? as f32, self.as_float(key, high)? as f32)),
            _ => Err(self.error(key, format!("is {v}; expected two numbers"))),
        }
    }

    /// A width given as a multiple of `of`, which Python computes as `int(expand * of)`.
    pub(super) fn expanded(&self, key: &str, default: usize, of: usize) -> Result<usize, CheckpointError> {
        let Some(v) = self.get(key) else { return Ok(default.saturating_mul(of)) };
        if let Some(n) = v.as_u64().and_then(|n| usize::try_from(n).ok()) {
            return Ok(n.saturating_mul(of));
        }
        let factor = self.as_float(key, v)?;
        if factor.is_finite() && factor > 0.0 && factor < 1e9 {
            return Ok((factor * of as f64) as usize);
        }
        Err(self.error(key, format!("is {v}; expected a positive number")))
    }

    /// A rank, or "auto" for ⌈width/16⌉.
    pub(super) fn rank_or_auto(&self, key: &str, width: usize) -> Result<usize, CheckpointError> {
        match self.get(key) {
            None => Ok(width.div_ceil(16)),
            Some(Value::String(s)) if s == "auto" => Ok(width.div_ceil(16)),
            Some(v @ Value::String(_)) => Err(self.error(key, format!("is {v}; expected a whole number or \"auto\""))),
            Some(v) => self.as_size(key, v),
        }
    }

    /// A token id, or a list of them.
    pub(super) fn token_ids(&self, key: &str) -> Result<Vec<u32>, CheckpointError> {
        let one = |v: &Value| {
            let id = v.as_u64().and_then(|n| u32::try_from(n).ok());
            id.ok_or_else(|| self.error(key, format!("is {v}; expected a token id")))
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(all)) => all.iter().map(one).collect(),
            Some(v) => Ok(vec![one(v)?]),
        }
    }

    pub(super) fn token_id(&self, key: &str) -> Result<Option<u32>, CheckpointError> {
        match self.token_ids(key)?.as_slice() {
            [] => Ok(None),
            [id] => Ok(Some(*id)),
            _ => Err(self.error(key, "is a list; expected one token id")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_floats_outside_of_strings() {
        let text = r#"{"a": [0.0, Infinity], "b": -Infinity, "c": NaN, "d": "NaN \" Infinity é", "NaN": 1}"#;
        let v: Value = serde_json::from_str(&name_bare_floats(text)).unwrap();
        assert_eq!(v["a"][1], serde_json::json!({"__float__": "Infinity"}));
        assert_eq!(v["b"], serde_json::json!({"__float__": "-Infinity"}));
        assert_eq!(v["c"], serde_json::json!({"__float__": "NaN"}));
        assert_eq!(v["d"], "NaN \" Infinity é");
        assert_eq!(v["NaN"], 1);
    }

    #[test]
    fn damaged_text_stays_damaged() {
        for text in ["", "{", "\"\\", "{\"a\": Infin}", "\\Infinity", "{\"a\": 1}}"] {
            assert!(serde_json::from_str::<Value>(&name_bare_floats(text)).is_err(), "{text}");
        }
    }
}
