//! The tokenizer inside of a GGUF file: merges of bytes (`gpt2`), or none.
//!
//! hognose writes a tokenizer.json into the file as a whole, too (`tokenizer.huggingface.json`), and reads that first, so
//! that nothing of it is lost; the other keys are for llama.cpp, and for files that other programs wrote.

use super::super::Format;
use super::super::error::CheckpointError;
use super::container::Value as Stored;
use super::metadata::{BOS_KEY, EOS_KEYS, Given, Keys, PAD_KEY, Values};
use super::pretokenizer::PreTokenizer;
use crate::config::ModelConfig;
use crate::tokenizer::{BOUNDARY_TEXT, BYTES_BOUNDARY, Tokenizer, TokenizerError, byte_alphabet};
use serde_json::{Map, Value, json};

const MODEL_KEY: &str = "tokenizer.ggml.model";
const PRE_KEY: &str = "tokenizer.ggml.pre";
const TOKENS_KEY: &str = "tokenizer.ggml.tokens";
const TYPES_KEY: &str = "tokenizer.ggml.token_type";
const MERGES_KEY: &str = "tokenizer.ggml.merges";
const ADD_BOS_KEY: &str = "tokenizer.ggml.add_bos_token";
const JSON_KEY: &str = "tokenizer.huggingface.json";
const TEMPLATE_KEY: &str = "tokenizer.chat_template";

/// What a token is, by the numbers that files have.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// The tokenizer of a file; `None` where it has none.
///
/// # Errors
/// One that is damaged, or of a kind that is not read.
pub(super) fn read(keys: &Keys) -> Result<Option<Tokenizer>, TokenizerError> {
    let invalid = |message: String| TokenizerError::Invalid { path: keys.path.into(), message };
    let wrong = |e: CheckpointError| match e {
        CheckpointError::Key { key, message, .. } => invalid(format!("\"{key}\" {message}")),
        other => invalid(other.to_string()),
    };
    let rows = texts(keys, TOKENS_KEY).map_err(wrong)?.len();
    let token_text = |key: &str, tokens: &[&str]| -> Result<Option<String>, TokenizerError> {
        let id = keys.token(key, rows).map_err(wrong)?;
        Ok(id.map(|id| tokens[id as usize].to_string()))
    };
    let tokens = texts(keys, TOKENS_KEY).map_err(wrong)?;
    let config = tokenizer_config(
        token_text(BOS_KEY, &tokens)?,
        token_text(EOS_KEYS[0], &tokens)?,
        keys.optional_text(TEMPLATE_KEY).map_err(wrong)?,
    );
    if let Some(json) = keys.optional_text(JSON_KEY).map_err(wrong)? {
        return Tokenizer::from_json(keys.path, json.as_bytes().to_vec(), vec![config]).map(Some);
    }
    match keys.optional_text(MODEL_KEY).map_err(wrong)? {
        None | Some("none" | "no_vocab") => return Ok(None),
        Some("gpt2") => {}
        Some(kind) => {
            let message =
                format!("it is of the kind \"{kind}\"; \"gpt2\" is read. Give a tokenizer.json with --tokenizer");
            return Err(invalid(message));
        }
    }
    let types: Vec<i32> = match keys.get(TYPES_KEY) {
        None => vec![NORMAL; rows],
        Some(Stored::Array(array)) if array.len() == rows => {
            let number = |v| if let Stored::Whole(n) = v { n as i32 } else { NORMAL };
            array.values().map(number).collect()
        }
        Some(_) => return Err(invalid(format!("\"{TYPES_KEY}\" does not hold a number for each of {rows} tokens"))),
    };
    let merges = texts(keys, MERGES_KEY).map_err(wrong)?;
    let used = types.iter().rposition(|&t| t != UNUSED).map_or(0, |i| i + 1);
    if merges.is_empty() && used == 257 && tokens[256] == BOUNDARY_TEXT {
        let alphabet = byte_alphabet();
        if tokens.iter().zip(alphabet).all(|(token, c)| *token == c.to_string()) {
            return Ok(Some(Tokenizer::Bytes));
        }
    }
    let pre = keys.optional_text(PRE_KEY).map_err(wrong)?.unwrap_or_default();
    let Some(cuts) = PreTokenizer::named(pre) else {
        let message =
            format!("it cuts texts as \"{pre}\" does, which is not known; give a tokenizer.json with --tokenizer");
        return Err(invalid(message));
    };
    let bos = match keys.flag(ADD_BOS_KEY, cuts.adds_bos).map_err(wrong)? {
        true => keys.token(BOS_KEY, rows).map_err(wrong)?,
        false => None,
    };
    let json = describe(&tokens, &types, &merges, cuts, bos).map_err(invalid)?;
    Tokenizer::from_json(keys.path, json.to_string().into_bytes(), vec![config]).map(Some)
}

/// An array of texts; empty where there is none.
fn texts<'f>(keys: &Keys<'_, 'f>, key: &str) -> Result<Vec<&'f str>, CheckpointError> {
    let array = match keys.get(key) {
        None => return Ok(Vec::new()),
        Some(Stored::Array(array)) => array,
        Some(_) => return Err(keys.error(key, "is no array of texts")),
    };
    let text = |(i, value)| match value {
        Stored::Text(text) => std::str::from_utf8(text).map_err(|_| keys.error(key, format!("is not UTF-8 at {i}"))),
        _ => Err(keys.error(key, "is no array of texts")),
    };
    array.values().enumerate().map(text).collect()
}

/// tokenizer_config.json of what a GGUF file says.
fn tokenizer_config(bos: Option<String>, eos: Option<String>, template: Option<&str>) -> (&'static str, Vec<u8>) {
    let mut map = Map::new();
    map.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    let entries = [("bos_token", bos), ("eos_token", eos), ("chat_template", template.map(Into::into))];
    for (key, value) in entries {
        map.extend(value.map(|v| (key.to_string(), Value::String(v))));
    }
    ("tokenizer_config.json", format!("{:#}\n", Value::Object(map)).into_bytes())
}

/// The tokenizer.json of tokens and merges.
fn describe(
    tokens: &[&str],
    types: &[i32],
    merges: &[&str],
    cuts: &PreTokenizer,
    bos: Option<u32>,
) -> Result<Value, String> {
    let (mut vocabulary, mut added) = (Map::new(), Vec::new());
    for (id, (&token, &kind)) in tokens.iter().zip(types).enumerate() {
        if kind == UNUSED {
            continue;
        }
        if vocabulary.insert(token.into(), json!(id)).is_some() {
            return Err(format!("the token {token:?} is there twice, the second time as {id}"));
        }
        if kind == CONTROL || kind == USER_DEFINED {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind == CONTROL,
            }));
        }
    }
    let mut pairs = Vec::new();
    for merge in merges {
        // The first part has at least one character, which may be a space in old files.
        let second = merge.char_indices().nth(1).map_or(merge.len(), |(at, _)| at);
        let Some(space) = merge[second..].find(' ') else {
            return Err(format!("the merge {merge:?} is no pair of tokens with a space between them"));
        };
        pairs.push(json!([merge[..second + space], merge[second + space + 1..]]));
    }
    let post_processor = match bos {
        None => Value::Null,
        Some(id) => {
            let token = tokens[id as usize];
            let part = json!({"SpecialToken": {"id": token, "type_id": 0}});
            let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
            json!({
                "type": "TemplateProcessing",
                "single": [part, text("A", 0)],
                "pair": [part, text("A", 0), text("B", 1)],
                "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
            })
        }
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": cuts.description(), "post_processor": post_processor, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": cuts.whole_tokens, "vocab": vocabulary, "merges": pairs,
        },
    }))
}

/// The keys of a tokenizer, and a sentence for people where llama.cpp gets none.
///
/// # Errors
/// More tokens than the model has rows.
pub(super) fn write(
    tokenizer: Option<&Tokenizer>,
    config: &ModelConfig,
) -> Result<(Values, Option<String>), CheckpointError> {
    let mut all = Vec::new();
    let mut put = |key: &str, value: Given| all.push((key.to_string(), value));
    let no = |message: String| CheckpointError::Inexpressible { format: Format::Gguf, message };
    let rows = config.padded_vocab;
    if let Some(size) = tokenizer.map(Tokenizer::vocab_size).filter(|&n| n > rows) {
        return Err(no(format!("its tokenizer has {size} tokens, but its embedding only {rows} rows")));
    }
    let mut note = None;
    let mut adds_bos = None;
    match tokenizer {
        None => {
            note = Some("there is no tokenizer; the file works with token ids only".to_string());
            put(MODEL_KEY, Given::Text("none".into()));
        }
        Some(Tokenizer::Bytes) => {
            let mut tokens: Vec<(String, i32)> = byte_alphabet().iter().map(|c| (c.to_string(), NORMAL)).collect();
            tokens.push((BOUNDARY_TEXT.into(), CONTROL));
            // Without merges every byte is a token, whatever the cuts.
            put_tokens(&mut put, tokens, rows, "gpt-2", Vec::new());
            adds_bos = Some(BYTES_BOUNDARY);
        }
        Some(file @ Tokenizer::File(_)) => {
            let files = file.files();
            let read = |name: &str| files.iter().find(|f| f.0 == name).map(|f| f.1.as_slice());
            let text = read("tokenizer.json").and_then(|b| std::str::from_utf8(b).ok()).unwrap_or_default();
            match byte_pairs(&serde_json::from_str(text).unwrap_or_default(), rows) {
                Ok((tokens, pre, merges)) => put_tokens(&mut put, tokens, rows, pre, merges),
                Err(why) => {
                    note = Some(format!("llama.cpp does not get this tokenizer, since {why}; hognose does"));
                    put(MODEL_KEY, Given::Text("none".into()));
                }
            }
            put(JSON_KEY, Given::Text(text.into()));
            let settings: Value =
                read("tokenizer_config.json").and_then(|b| serde_json::from_slice(b).ok()).unwrap_or_default();
            let beside = read("chat_template.jinja").and_then(|b| std::str::from_utf8(b).ok());
            if let Some(template) = beside.or(settings["chat_template"].as_str()) {
                put(TEMPLATE_KEY, Given::Text(template.into()));
            }
            adds_bos = first_token(file);
        }
    }
    let boundary = tokenizer.and_then(Tokenizer::boundary);
    let [bos, pad] = [adds_bos.or(config.bos_token_id), config.pad_token_id];
    for (key, id) in [(BOS_KEY, bos.or(boundary)), (PAD_KEY, pad)] {
        id.into_iter().for_each(|id| put(key, Given::U32(id)));
    }
    let eos =
        if config.eos_token_ids.is_empty() { boundary.into_iter().collect() } else { config.eos_token_ids.clone() };
    if eos.len() > EOS_KEYS.len() {
        return Err(no(format!("{} tokens end a text; there are keys for {}", eos.len(), EOS_KEYS.len())));
    }
    EOS_KEYS.iter().zip(eos).for_each(|(key, id)| put(key, Given::U32(id)));
    if tokenizer.is_some() {
        put(ADD_BOS_KEY, Given::Bool(adds_bos.is_some()));
    }
    Ok((all, note))
}

/// The token that a tokenizer puts in front of every text.
fn first_token(tokenizer: &Tokenizer) -> Option<u32> {
    let [with, without] = [true, false].map(|special| tokenizer.encode(b"a", special).unwrap_or_default());
    (with.len() > without.len() && with.ends_with(&without)).then(|| with[0])
}

/// Tokens, one for each row: what is missing is unused.
fn put_tokens(
    put: &mut impl FnMut(&str, Given),
    tokens: Vec<(String, i32)>,
    rows: usize,
    pre: &str,
    merges: Vec<String>,
) {
    let missing = (tokens.len()..rows).map(|i| (format!("[PAD{i}]"), UNUSED));
    let (tokens, types) = tokens.into_iter().chain(missing).unzip();
    put(MODEL_KEY, Given::Text("gpt2".into()));
    put(PRE_KEY, Given::Text(pre.into()));
    put(TOKENS_KEY, Given::Texts(tokens));
    put(TYPES_KEY, Given::I32s(types));
    put(MERGES_KEY, Given::Texts(merges));
}

/// Tokens, cuts and merges.
type BytePairs = (Vec<(String, i32)>, &'static str, Vec<String>);

/// The tokens with their types, the name of the cuts, and the merges of a tokenizer.json that merges bytes.
///
/// # Errors
/// Why it is of another kind.
fn byte_pairs(json: &Value, rows: usize) -> Result<BytePairs, String> {
    let model = &json["model"];
    let vocabulary =
        model["vocab"].as_object().filter(|_| model["type"] == "BPE").ok_or("it is not one of byte pairs")?;
    if json["decoder"]["type"] != "ByteLevel" {
        return Err("its tokens are not made of bytes".into());
    }
    let cuts = PreTokenizer::of(&json["pre_tokenizer"]).ok_or("it cuts texts in a way that has no name")?;
    let mut tokens: Vec<(String, i32)> = Vec::new();
    let mut set = |id: Option<u64>, text: &str, kind: i32| -> Result<(), String> {
        let id = id.and_then(|id| usize::try_from(id).ok()).filter(|&id| id < rows);
        let id = id.ok_or_else(|| format!("the token {text:?} has no row"))?;
        // A gap is filled as the end is.
        while tokens.len() <= id {
            tokens.push((format!("[PAD{}]", tokens.len()), UNUSED));
        }
        tokens[id] = (text.to_string(), kind);
        Ok(())
    };
    for (text, id) in vocabulary {
        set(id.as_u64(), text, NORMAL)?;
    }
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let kind = if token["special"] == true { CONTROL } else { USER_DEFINED };
        set(token["id"].as_u64(), token["content"].as_str().unwrap_or_default(), kind)?;
    }
    let mut merges = Vec::new();
    for merge in model["merges"].as_array().into_iter().flatten() {
        let text = match (merge.as_str(), merge[0].as_str(), merge[1].as_str()) {
            (Some(text), ..) => text.to_string(),
            (None, Some(a), Some(b)) if !a.contains(' ') && !b.contains(' ') => format!("{a} {b}"),
            _ => return Err(format!("its merge {merge} cannot be written")),
        };
        merges.push(text);
    }
    Ok((tokens, cuts.name(), merges))
}
