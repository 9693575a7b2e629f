//! Layer patterns: a model's layers as a text, such as `2*mamba1, attention(heads=4)+mlp, 3*(mamba2, s4d)`.
//!
//! ```text
//! pattern = item , item , …
//! item    = [count *] layer   or   count * ( pattern )
//! layer   = kind [( size = value , … )] [+mlp [( width )]]
//! ```
//!
//! A kind is one of [`Mixer::KINDS`]. Its sizes follow from the model's width; those in parentheses replace them, under
//! the names that the configuration has. `+mlp` puts a gated MLP behind the mixer, 8/3 times as wide as the model.

use serde_json::Value;

use crate::config::{LayerConfig, MAX_LAYERS, Mixer};

/// What the width of an MLP is rounded up to.
const MLP_MULTIPLE: usize = 8;
/// Groups inside of groups that are taken for real.
const MAX_DEPTH: usize = 16;

/// Why a pattern is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the layer pattern \"{pattern}\" {reason}")]
pub struct PatternError {
    /// The pattern.
    pub pattern: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The layers of a pattern in a model of width `d_model`.
///
/// # Errors
/// A text that is no pattern, a kind that does not exist, sizes that the kind does not have, too many layers. Sizes
/// themselves are checked with the whole model.
pub fn layers(pattern: &str, d_model: usize) -> Result<Vec<LayerConfig>, PatternError> {
    let mut parser = Parser { text: pattern, d_model };
    let found = parser.pattern(0).and_then(|layers| match parser.peek() {
        None => Ok(layers),
        Some(c) => Err(format!("has \"{c}\" where a comma or the end should be")),
    });
    found.map_err(|reason| PatternError { pattern: pattern.into(), reason })
}

/// Sets one size of a mixer, by the name that the configuration has.
///
/// # Errors
/// A name that the mixer does not have (the message lists them), or a value of another type.
pub fn set(mixer: &mut Mixer, key: &str, value: Value) -> Result<(), String> {
    let fail = |e: serde_json::Error| format!("{}: {e}", mixer.kind());
    let mut fields = serde_json::to_value(&*mixer).map_err(fail)?;
    if key != "kind" {
        fields[key] = value;
        *mixer = serde_json::from_value(fields).map_err(fail)?;
        return Ok(());
    }
    Err(format!("{}: the kind of a layer is its name", mixer.kind()))
}

/// The names of a mixer's sizes and options.
pub fn sizes(mixer: &Mixer) -> Vec<String> {
    let fields = serde_json::to_value(mixer).unwrap_or_default();
    fields.as_object().into_iter().flat_map(|map| map.keys()).filter(|k| *k != "kind").cloned().collect()
}

/// Layers as a pattern without sizes: neighbours of one kind are counted.
pub fn outline(layers: &[LayerConfig]) -> String {
    let name = |l: &LayerConfig| format!("{}{}", l.mixer.kind(), if l.d_intermediate.is_some() { "+mlp" } else { "" });
    let mut runs: Vec<(String, usize)> = Vec::new();
    for layer in layers {
        match runs.last_mut() {
            Some((last, n)) if *last == name(layer) => *n += 1,
            _ => runs.push((name(layer), 1)),
        }
    }
    let texts: Vec<String> =
        runs.into_iter().map(|(name, n)| if n == 1 { name } else { format!("{n}*{name}") }).collect();
    texts.join(", ")
}

/// A layer as an item of a pattern, with all its sizes.
pub fn full(layer: &LayerConfig) -> String {
    let fields = serde_json::to_value(&layer.mixer).unwrap_or_default();
    let sizes: Vec<String> = (fields.as_object().into_iter().flatten())
        .filter(|(key, _)| *key != "kind")
        .map(|(key, value)| format!("{key}={}", value.as_str().map_or(value.to_string(), String::from)))
        .collect();
    let mlp = layer.d_intermediate.map(|h| format!("+mlp({h})")).unwrap_or_default();
    format!("{}({}){mlp}", layer.mixer.kind(), sizes.join(", "))
}

struct Parser<'a> {
    /// What is left of it.
    text: &'a str,
    d_model: usize,
}

impl<'a> Parser<'a> {
    fn peek(&mut self) -> Option<char> {
        self.text = self.text.trim_start();
        self.text.chars().next()
    }

    /// Takes the next character if it is `c`.
    fn take(&mut self, c: char) -> bool {
        let found = self.peek() == Some(c);
        if found {
            self.text = &self.text[c.len_utf8()..];
        }
        found
    }

    fn expect(&mut self, c: char) -> Result<(), String> {
        if self.take(c) {
            return Ok(());
        }
        let found = self.peek().map_or("its end".to_string(), |found| format!("\"{found}\""));
        Err(format!("has {found} where \"{c}\" should be"))
    }

    /// Letters, digits, and what else names and numbers are made of.
    fn word(&mut self) -> &'a str {
        self.peek();
        let end = self.text.find(|c: char| !(c.is_ascii_alphanumeric() || "_.-".contains(c)));
        let (word, rest) = self.text.split_at(end.unwrap_or(self.text.len()));
        self.text = rest;
        word
    }

    fn pattern(&mut self, depth: usize) -> Result<Vec<LayerConfig>, String> {
        let mut layers = Vec::new();
        loop {
            layers.extend(self.item(depth)?);
            if layers.len() > MAX_LAYERS {
                return Err(format!("has more than {MAX_LAYERS} layers"));
            }
            if !self.take(',') {
                return Ok(layers);
            }
        }
    }

    fn item(&mut self, depth: usize) -> Result<Vec<LayerConfig>, String> {
        let word = self.word();
        if !word.starts_with(|c: char| c.is_ascii_digit()) {
            return Ok(vec![self.layer(word)?]);
        }
        let count = word.parse().ok().filter(|n| (1..=MAX_LAYERS).contains(n));
        let count = count.ok_or_else(|| format!("has the count {word}; expected 1 to {MAX_LAYERS}"))?;
        self.expect('*')?;
        let repeated = if self.take('(') {
            if depth == MAX_DEPTH {
                return Err(format!("has more than {MAX_DEPTH} groups inside each other"));
            }
            let inside = self.pattern(depth + 1)?;
            self.expect(')')?;
            inside
        } else {
            let kind = self.word();
            vec![self.layer(kind)?]
        };
        if repeated.len() * count > MAX_LAYERS {
            return Err(format!("has more than {MAX_LAYERS} layers"));
        }
        Ok(repeated.iter().cycle().take(repeated.len() * count).cloned().collect())
    }

    fn layer(&mut self, kind: &str) -> Result<LayerConfig, String> {
        let mut mixer = Mixer::of_kind(kind, self.d_model)
            .ok_or_else(|| format!("has a layer \"{kind}\"; known are {}", Mixer::KINDS.join(", ")))?;
        if self.take('(') {
            loop {
                let key = self.word();
                self.expect('=')?;
                let word = self.word();
                let value = serde_json::from_str(word).unwrap_or_else(|_| Value::String(word.into()));
                set(&mut mixer, key, value).map_err(|e| format!("does not fit {e}"))?;
                if !self.take(',') {
                    break;
                }
            }
            self.expect(')')?;
        }
        let mut d_intermediate = None;
        if self.take('+') {
            let word = self.word();
            if word != "mlp" {
                return Err(format!("has \"+{word}\"; expected \"+mlp\""));
            }
            d_intermediate = Some((8 * self.d_model).div_ceil(3).next_multiple_of(MLP_MULTIPLE));
            if self.take('(') {
                let word = self.word();
                d_intermediate = Some(word.parse().map_err(|_| format!("has an MLP of the width \"{word}\""))?);
                self.expect(')')?;
            }
        }
        Ok(LayerConfig { mixer, d_intermediate })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_groups_sizes_and_mlps() {
        let found = layers("2*mamba1(d_state=4), mamba2+mlp , 2*(mamba1, 2*mamba2+mlp(40))", 48).unwrap();
        assert_eq!(outline(&found), "2*mamba1, mamba2+mlp, mamba1, 2*mamba2+mlp, mamba1, 2*mamba2+mlp");
        let Mixer::Mamba1(m) = &found[1].mixer else { panic!("{:?}", found[1]) };
        assert_eq!((m.d_inner, m.d_state, m.dt_rank), (96, 4, 3));
        assert_eq!((found[2].d_intermediate, found[4].d_intermediate), (Some(128), Some(40)));
    }

    #[test]
    fn what_is_no_pattern_is_explained() {
        for (pattern, words) in [
            ("", "known are mamba1, mamba2"),
            ("mamba9", "layer \"mamba9\""),
            ("mamba1,", "layer \"\""),
            ("mamba1 mamba2", "\"m\" where a comma"),
            ("0*mamba1", "count 0"),
            ("99999999999999999999*mamba1", "expected 1 to"),
            ("65536*(2*mamba1)", "more than 65536 layers"),
            ("2(mamba1)", "\"(\" where \"*\""),
            ("2*(mamba1", "its end where \")\""),
            ("mamba1(foo=1)", "unknown field `foo`, expected one of `d_inner`"),
            ("mamba1(d_state=big)", "mamba1: invalid type: string \"big\""),
            ("mamba1(d_state=-3)", "invalid value"),
            ("mamba1(d_state 3)", "where \"=\""),
            ("mamba1(kind=mamba2)", "the kind of a layer"),
            ("mamba1+moe", "\"+moe\""),
            ("mamba1+mlp(wide)", "the width \"wide\""),
            ("mamba1é", "\"é\""),
        ] {
            let error = layers(pattern, 16).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("layer pattern"), "{pattern}: {error}");
        }
        let deep = format!("{}mamba1{}", "1*(".repeat(100_000), ")".repeat(100_000));
        assert!(layers(&deep, 16).unwrap_err().reason.contains("inside each other"));
    }
}
