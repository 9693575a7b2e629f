//! How a text is cut before pairs of bytes are merged: a name in a GGUF file, a description in a tokenizer.json.
//!
//! Both mean a list of regular expressions: each cuts what the ones before it left, and what it matches stays together.

use serde_json::{Value, json};

/// GPT-2's expression, and GPT-NeoX's.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's: single digits.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Digits one by one.
const DIGITS: &str = r"\p{N}";

/// A kind of cuts.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    /// Its names in GGUF files; the first one is written.
    names: &'static [&'static str],
    splits: &'static [&'static str],
    /// A piece that is a token as a whole becomes that token without a look at the merges.
    pub(super) whole_tokens: bool,
    /// Whether a text gets a token for the beginning where the file does not say.
    pub(super) adds_bos: bool,
}

const KNOWN: [PreTokenizer; 6] = [
    PreTokenizer {
        names: &["gpt-2", "mpt", "olmo", "phi-2", "jais", "roberta-bpe", "modern-bert"],
        splits: &[GPT2],
        whole_tokens: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1"],
        splits: &[LLAMA3],
        whole_tokens: true,
        adds_bos: true,
    },
    PreTokenizer { names: &["qwen2"], splits: &[QWEN2], whole_tokens: false, adds_bos: false },
    PreTokenizer {
        names: &["starcoder", "refact", "command-r", "smollm", "codeshell"],
        splits: &[DIGITS, GPT2],
        whole_tokens: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["falcon"],
        splits: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
        whole_tokens: false,
        adds_bos: false,
    },
    // What llama.cpp does where a file says nothing.
    PreTokenizer {
        names: &["default", ""],
        splits: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        whole_tokens: false,
        adds_bos: false,
    },
];

impl PreTokenizer {
    /// The one that a GGUF file names.
    pub(super) fn named(name: &str) -> Option<&'static PreTokenizer> {
        KNOWN.iter().find(|k| k.names.contains(&name))
    }

    /// The one that a tokenizer.json describes, if it has a name in GGUF.
    pub(super) fn of(description: &Value) -> Option<&'static PreTokenizer> {
        let parts = match (description["type"].as_str()?, &description["pretokenizers"]) {
            ("Sequence", Value::Array(parts)) => parts.as_slice(),
            _ => std::slice::from_ref(description),
        };
        let kinds: Vec<&str> = parts.iter().map(|p| p["type"].as_str().unwrap_or_default()).collect();
        // Punctuation as a class, then threes of digits: the classes are those of the expressions above.
        if kinds == ["Punctuation", "ByteLevel", "Digits", "Split"]
            && parts[0]["behavior"] == "Contiguous"
            && parts[1]["use_regex"] != false
            && parts[1]["add_prefix_space"] == false
            && parts[2]["individual_digits"] == false
            && parts[3]["pattern"]["Regex"] == "[0-9][0-9][0-9]"
        {
            return PreTokenizer::named("falcon");
        }
        let mut splits = Vec::new();
        let mut bytes = false;
        for part in parts {
            match part["type"].as_str()? {
                "Split" if part["behavior"] == "Isolated" && part["invert"] != true => {
                    splits.push(part["pattern"]["Regex"].as_str()?);
                }
                "Digits" if part["individual_digits"] == true => splits.push(DIGITS),
                "ByteLevel" if part["add_prefix_space"] == false && !bytes => {
                    bytes = true;
                    splits.extend((part["use_regex"] != false).then_some(GPT2));
                }
                _ => return None,
            }
        }
        KNOWN.iter().find(|k| bytes && k.splits == splits)
    }

    /// The name that is written.
    pub(super) fn name(&self) -> &'static str {
        self.names[0]
    }

    /// As a tokenizer.json has it.
    pub(super) fn description(&self) -> Value {
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let split = |regex: &&str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let parts: Vec<Value> = self.splits.iter().map(split).chain([bytes]).collect();
        json!({"type": "Sequence", "pretokenizers": parts})
    }
}
