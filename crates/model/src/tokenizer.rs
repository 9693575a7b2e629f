//! Text to token ids and back: raw bytes, or a tokenizer.json.
//!
//! A model of bytes has the ids 0 to 255 for the bytes and 256 for the boundary between documents. Its folder holds an
//! ordinary tokenizer.json that says the same (GPT-2's byte alphabet with ids that are the bytes, no merges), so that
//! transformers and the tokenizers crate load it too; [`Tokenizer::load`] recognises it by its contents and then works
//! on bytes directly, which need not be UTF-8.

use crate::checkpoint::gguf;
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// The id between documents in a model of bytes.
pub const BYTES_BOUNDARY: u32 = 256;
/// How tokenizer.json calls it.
pub(crate) const BOUNDARY_TEXT: &str = "<|endoftext|>";
/// Tokens that serve as the boundary where tokenizer_config.json names none.
const USUAL_BOUNDARIES: [&str; 3] = [BOUNDARY_TEXT, "<|end_of_text|>", "</s>"];
/// Files that belong to a tokenizer. Copied when a checkpoint is converted.
pub const TOKENIZER_FILES: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
];
/// Those that are kept in memory, to be written beside a new model.
const KEPT: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];
/// A character is at most four bytes, and a token at least one; more tokens without a whole character are damaged text.
const MAX_PENDING: usize = 4;

/// Why text cannot become tokens, or the other way round.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// There is no tokenizer where one was expected.
    #[error("{}: there is no tokenizer.json; give one with --tokenizer, or use token ids", .path.display())]
    Missing { path: PathBuf },
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", .path.display())]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },
    /// The file is not a tokenizer.
    #[error("{}: not a tokenizer that can be used: {message}", .path.display())]
    Invalid { path: PathBuf, message: String },
    /// A tokenizer.json works on text; the input is something else.
    #[error(
        "the text is not UTF-8: byte {at} is 0x{byte:02x}; this model's tokenizer reads UTF-8 only (a model of bytes reads anything)"
    )]
    NotUtf8 { at: usize, byte: u8 },
    /// The tokenizer refused the text.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
    /// A token that the tokenizer does not have.
    #[error("token id {id} is outside the vocabulary; expected an id below {size}")]
    UnknownId { id: u32, size: usize },
}

/// Text to token ids and back. Can be shared between threads.
#[derive(Debug, Clone)]
pub enum Tokenizer {
    /// Every byte is a token; 256 is the boundary between documents.
    Bytes,
    /// A tokenizer.json.
    File(Box<FileTokenizer>),
}

/// A tokenizer.json, with the files it came with.
#[derive(Debug, Clone)]
pub struct FileTokenizer {
    tokenizer: tokenizers::Tokenizer,
    /// The largest id and 1.
    vocab_size: usize,
    boundary: Option<u32>,
    files: Vec<(&'static str, Vec<u8>)>,
}

impl Tokenizer {
    /// Loads a tokenizer from a folder with a tokenizer.json, from that file, or from a GGUF file.
    ///
    /// # Errors
    /// None there, or not a tokenizer.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        if gguf::is_gguf(path) {
            return gguf::tokenizer(path)?.ok_or_else(|| TokenizerError::Missing { path: path.into() });
        }
        let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_path_buf() };
        if !file.is_file() {
            return Err(TokenizerError::Missing { path: path.into() });
        }
        let read =
            |p: &Path| fs::read(p).map_err(|source| TokenizerError::Io { path: p.into(), action: "read", source });
        let mut files = Vec::new();
        for name in &KEPT[1..] {
            let beside = file.with_file_name(name);
            if beside.is_file() {
                files.push((*name, read(&beside)?));
            }
        }
        Self::from_json(&file, read(&file)?, files)
    }

    /// A tokenizer from the contents of a tokenizer.json and of the files beside it. `path` is for messages.
    ///
    /// # Errors
    /// Not a tokenizer.
    pub(crate) fn from_json(
        path: &Path,
        bytes: Vec<u8>,
        beside: Vec<(&'static str, Vec<u8>)>,
    ) -> Result<Self, TokenizerError> {
        let invalid = |message: String| TokenizerError::Invalid { path: path.into(), message };
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| invalid(e.to_string()))?;
        if is_bytes(&value) {
            return Ok(Tokenizer::Bytes);
        }
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| invalid(e.to_string()))?;
        // Settings for batches of classifiers; here they would silently cut or fill texts.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| invalid(e.to_string()))?;
        let files: Vec<_> = [("tokenizer.json", bytes)].into_iter().chain(beside).collect();
        let config = files.iter().find(|f| f.0 == "tokenizer_config.json");
        let config: Value = match config {
            Some((name, bytes)) => serde_json::from_slice(bytes)
                .map_err(|e| TokenizerError::Invalid { path: path.with_file_name(name), message: e.to_string() })?,
            None => Value::Null,
        };
        let eos = &config["eos_token"];
        let eos = eos.as_str().or_else(|| eos["content"].as_str());
        let boundary = eos.into_iter().chain(USUAL_BOUNDARIES).find_map(|t| tokenizer.token_to_id(t));
        let vocab_size = tokenizer.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        Ok(Tokenizer::File(Box::new(FileTokenizer { tokenizer, vocab_size, boundary, files })))
    }

    /// The tokenizer of a model folder or a GGUF file, where it has one.
    ///
    /// # Errors
    /// One that is there and does not load.
    pub fn find(folder: impl AsRef<Path>) -> Result<Option<Self>, TokenizerError> {
        if gguf::is_gguf(folder.as_ref()) {
            return gguf::tokenizer(folder.as_ref());
        }
        if folder.as_ref().join("tokenizer.json").is_file() { Self::load(folder).map(Some) } else { Ok(None) }
    }

    /// Whether tokens are bytes.
    pub fn is_bytes(&self) -> bool {
        matches!(self, Tokenizer::Bytes)
    }

    /// Number of token ids: the largest one and 1.
    pub fn vocab_size(&self) -> usize {
        match self {
            Tokenizer::Bytes => 257,
            Tokenizer::File(f) => f.vocab_size,
        }
    }

    /// The token between documents (end of text), where there is one.
    pub fn boundary(&self) -> Option<u32> {
        match self {
            Tokenizer::Bytes => Some(BYTES_BOUNDARY),
            Tokenizer::File(f) => f.boundary,
        }
    }

    /// The token ids of a text. With `special`, those that the tokenizer puts around a prompt are added (a token for the
    /// beginning, where a model was trained with one); a model of bytes has none.
    ///
    /// # Errors
    /// A text that is not UTF-8, unless tokens are bytes.
    pub fn encode(&self, text: &[u8], special: bool) -> Result<Vec<u32>, TokenizerError> {
        match self {
            Tokenizer::Bytes => Ok(text.iter().map(|&b| b.into()).collect()),
            Tokenizer::File(f) => {
                let utf8 = std::str::from_utf8(text).map_err(|e| {
                    let at = e.valid_up_to();
                    TokenizerError::NotUtf8 { at, byte: text[at] }
                })?;
                let encoding = f.tokenizer.encode_fast(utf8, special);
                Ok(encoding.map_err(|e| TokenizerError::Encode(e.to_string()))?.get_ids().to_vec())
            }
        }
    }

    /// The text of token ids, without special tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// An id outside of the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        let mut decoder = self.decoder();
        match self {
            Tokenizer::Bytes => {
                let mut text = String::new();
                for &id in ids {
                    text.push_str(&decoder.push(id)?);
                }
                Ok(text + &decoder.finish()?)
            }
            Tokenizer::File(f) => f.decode(ids),
        }
    }

    /// A decoder for tokens that come one at a time.
    pub fn decoder(&self) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, ids: Vec::new(), read: 0, bytes: Vec::new() }
    }

    /// The files that make a folder have this tokenizer: names and contents.
    pub fn files(&self) -> Vec<(&'static str, Vec<u8>)> {
        match self {
            Tokenizer::File(f) => f.files.clone(),
            Tokenizer::Bytes => {
                let pretty = |v: Value| format!("{v:#}\n").into_bytes();
                let config = json!({
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "bos_token": BOUNDARY_TEXT,
                    "eos_token": BOUNDARY_TEXT,
                    "pad_token": BOUNDARY_TEXT,
                    "clean_up_tokenization_spaces": false,
                });
                vec![("tokenizer.json", pretty(bytes_json())), ("tokenizer_config.json", pretty(config))]
            }
        }
    }

    /// Writes the files into a folder that exists.
    ///
    /// # Errors
    /// The disk.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<(), TokenizerError> {
        for (name, contents) in self.files() {
            let path = folder.as_ref().join(name);
            fs::write(&path, contents).map_err(|source| TokenizerError::Io { path, action: "write", source })?;
        }
        Ok(())
    }
}

impl FileTokenizer {
    fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        if let Some(&id) = ids.iter().find(|&&id| self.tokenizer.id_to_token(id).is_none()) {
            return Err(TokenizerError::UnknownId { id, size: self.vocab_size });
        }
        self.tokenizer.decode(ids, true).map_err(|e| TokenizerError::Encode(e.to_string()))
    }
}

/// Decodes tokens as they come and gives out whole characters only.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// A tokenizer.json: the last tokens that were given out, as context, and those after them that were not.
    ids: Vec<u32>,
    /// How many of `ids` were given out.
    read: usize,
    /// Bytes: the beginning of a character.
    bytes: Vec<u8>,
}

impl StreamDecoder<'_> {
    /// Takes the next token and gives out the text that has become certain; empty within a character.
    ///
    /// # Errors
    /// An id outside of the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        match self.tokenizer {
            Tokenizer::Bytes if id == BYTES_BOUNDARY => Ok(std::mem::take(&mut self.bytes).utf8_lossy()),
            Tokenizer::Bytes => {
                let size = self.tokenizer.vocab_size();
                self.bytes.push(u8::try_from(id).map_err(|_| TokenizerError::UnknownId { id, size })?);
                Ok(take_characters(&mut self.bytes))
            }
            Tokenizer::File(f) => {
                // Decoders look at neighbours (a leading space, for one), so the new text is what the tokens give
                // together with those before them, less what those give alone.
                let mut ids = self.ids.clone();
                ids.push(id);
                let before = f.decode(&ids[..self.read])?;
                let text = f.decode(&ids)?;
                self.ids = ids;
                let new = text.strip_prefix(&before[..]).unwrap_or_default();
                if !new.is_empty() && !new.ends_with(char::REPLACEMENT_CHARACTER) {
                    let new = new.to_string();
                    self.ids.drain(..self.read);
                    self.read = self.ids.len();
                    return Ok(new);
                }
                if self.ids.len() - self.read > MAX_PENDING && !new.is_empty() {
                    let new = new.to_string();
                    (self.ids, self.read) = (Vec::new(), 0);
                    return Ok(new);
                }
                Ok(String::new())
            }
        }
    }

    /// The end of the text: gives out what is left, with U+FFFD for an unfinished character.
    ///
    /// # Errors
    /// None that [`StreamDecoder::push`] has not reported before.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        match self.tokenizer {
            Tokenizer::Bytes => Ok(std::mem::take(&mut self.bytes).utf8_lossy()),
            Tokenizer::File(f) => {
                let before = f.decode(&self.ids[..self.read])?;
                let text = f.decode(&self.ids)?;
                (self.ids, self.read) = (Vec::new(), 0);
                Ok(text.strip_prefix(&before[..]).unwrap_or_default().to_string())
            }
        }
    }
}

/// Takes every whole character from the front; damaged ones become U+FFFD. What may still become one stays.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut used = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        used += chunk.valid().len();
        let invalid = chunk.invalid();
        let unfinished =
            used + invalid.len() == bytes.len() && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
        if !invalid.is_empty() && !unfinished {
            text.push(char::REPLACEMENT_CHARACTER);
            used += invalid.len();
        }
    }
    bytes.drain(..used);
    text
}

/// GPT-2's alphabet: a printable character for each byte. Printable bytes are themselves, the others follow from U+0100.
pub(crate) fn byte_alphabet() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|b| {
        let printable = matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable {
            b as u32
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
    })
}

fn byte_vocab() -> Map<String, Value> {
    byte_alphabet().iter().enumerate().map(|(b, c)| (c.to_string(), json!(b))).collect()
}

/// The tokenizer.json of a model of bytes.
fn bytes_json() -> Value {
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": BYTES_BOUNDARY, "content": BOUNDARY_TEXT, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": byte_vocab(), "merges": [],
        },
    })
}

/// Whether a tokenizer.json is that of a model of bytes, in everything that matters.
fn is_bytes(json: &Value) -> bool {
    let model = &json["model"];
    let added = json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
    model["merges"].as_array().is_some_and(|m| m.is_empty())
        && model["vocab"].as_object() == Some(&byte_vocab())
        && matches!(added, [t] if t["id"] == BYTES_BOUNDARY)
        && json["normalizer"].is_null()
        && json["pre_tokenizer"]["type"] == "ByteLevel"
        && json["pre_tokenizer"]["add_prefix_space"] == false
}

trait Utf8Lossy {
    fn utf8_lossy(self) -> String;
}

impl Utf8Lossy for Vec<u8> {
    fn utf8_lossy(self) -> String {
        String::from_utf8_lossy(&self).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes tokenizer, but through the tokenizers crate.
    fn through_file() -> Tokenizer {
        small_file(&bytes_json().to_string())
    }

    fn small_file(json: &str) -> Tokenizer {
        let tokenizer = tokenizers::Tokenizer::from_bytes(json).unwrap();
        let vocab_size = tokenizer.get_vocab_size(true);
        Tokenizer::File(Box::new(FileTokenizer { tokenizer, vocab_size, boundary: None, files: Vec::new() }))
    }

    #[test]
    fn bytes_there_and_back() {
        let t = Tokenizer::Bytes;
        let text = "Call me Ishmael — naïve 🐍\n";
        let ids = t.encode(text.as_bytes(), true).unwrap();
        assert_eq!(ids.len(), text.len());
        assert_eq!(t.decode(&ids).unwrap(), text);
        assert_eq!(t.encode(&[0xff, 0], false).unwrap(), [255, 0]);
        assert_eq!(t.decode(&[0x61, 0xff, 256, 0x62]).unwrap(), "a\u{fffd}b");
        assert!(t.decode(&[257]).unwrap_err().to_string().contains("257"));
    }

    #[test]
    fn the_tokenizers_crate_agrees_about_the_bytes_tokenizer() {
        let (ours, theirs) = (Tokenizer::Bytes, through_file());
        let text: String = (1..0x300).chain(0x1f400..0x1f420).filter_map(char::from_u32).collect();
        let ids = ours.encode(text.as_bytes(), false).unwrap();
        assert_eq!(ids, theirs.encode(text.as_bytes(), false).unwrap());
        assert_eq!(theirs.decode(&ids).unwrap(), text);
        assert_eq!(theirs.vocab_size(), 257);
    }

    #[test]
    fn a_folder_remembers_its_tokenizer() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Tokenizer::find(&dir).unwrap().is_none());
        assert!(Tokenizer::load(&dir).unwrap_err().to_string().contains("no tokenizer.json"));
        Tokenizer::Bytes.save(&dir).unwrap();
        assert!(Tokenizer::load(&dir).unwrap().is_bytes());
        assert!(Tokenizer::load(dir.path().join("tokenizer.json")).unwrap().is_bytes());

        // One merge more, and it is an ordinary tokenizer.
        let mut json = bytes_json();
        json["model"]["vocab"]["ab"] = json!(256);
        json["added_tokens"][0]["id"] = json!(257);
        json["model"]["merges"] = json!([["a", "b"]]);
        fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        let t = Tokenizer::load(&dir).unwrap();
        assert!(!t.is_bytes());
        assert_eq!(t.encode(b"cab", true).unwrap(), [99, 256]);
        assert_eq!((t.boundary(), t.vocab_size()), (Some(257), 258));
        let other = tempfile::tempdir().unwrap();
        t.save(&other).unwrap();
        let again = Tokenizer::load(&other).unwrap();
        assert_eq!(again.encode(b"abab<|endoftext|>", true).unwrap(), [256, 256, 257]);
        assert!(other.path().join("tokenizer_config.json").is_file());

        fs::write(dir.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
        assert!(Tokenizer::load(&dir).unwrap_err().to_string().contains("tokenizer.json"));
        fs::write(dir.path().join("tokenizer.json"), "no").unwrap();
        assert!(Tokenizer::find(&dir).is_err());
    }

    #[test]
    fn text_that_is_not_utf8_is_a_named_error() {
        let error = through_file().encode(b"abc\xff", false).unwrap_err().to_string();
        assert!(error.contains("not UTF-8") && error.contains("byte 3"), "{error}");
    }

    #[test]
    fn streams_are_whole_characters_and_add_up() {
        let text = "añ🐍🐍 — z\u{fffd} é";
        for t in [Tokenizer::Bytes, through_file()] {
            let ids = t.encode(text.as_bytes(), false).unwrap();
            let mut decoder = t.decoder();
            let mut pieces: Vec<String> = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
            pieces.push(decoder.finish().unwrap());
            assert_eq!(pieces.concat(), text);
            // A snake of four bytes comes out with its last byte.
            assert_eq!(pieces[3..7], ["", "", "", "🐍"]);
        }
    }

    #[test]
    fn damaged_streams_go_on() {
        // A lone continuation, a snake cut short by a letter, an unfinished snake at the end.
        let bytes = b"a\xbfb\xf0\x9f\x90c\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xffd\xf0\x9f\x90";
        let ids: Vec<u32> = bytes.iter().map(|&b| b.into()).collect();
        for t in [Tokenizer::Bytes, through_file()] {
            let mut decoder = t.decoder();
            let mut text = String::new();
            for &id in &ids {
                text.push_str(&decoder.push(id).unwrap());
            }
            text.push_str(&decoder.finish().unwrap());
            let letters: String = text.chars().filter(|c| c.is_ascii()).collect();
            assert_eq!(letters, "abcd", "{text}");
            assert!(text.ends_with('\u{fffd}'), "{text}");
            if t.is_bytes() {
                assert_eq!(text, String::from_utf8_lossy(bytes));
            }
        }
    }

    #[test]
    fn special_tokens_are_not_text() {
        for t in [Tokenizer::Bytes, through_file()] {
            let mut decoder = t.decoder();
            let text: String = [104, 256, 105, 256].map(|id| decoder.push(id).unwrap()).concat();
            assert_eq!(text + &decoder.finish().unwrap(), "hi");
            assert!(decoder.push(300).is_err());
            assert_eq!(decoder.push(104).unwrap(), "h");
        }
    }
}
