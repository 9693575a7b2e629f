//! From a configuration to what a run needs: the model's configuration, its tokenizer and its data.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hognose_core::Device;
use hognose_model::checkpoint::{self, Checkpoint};
use hognose_model::config::{LayerConfig, MAX_LAYERS, ModelConfig};
use hognose_model::presets;
use hognose_model::tokenizer::Tokenizer;
use hognose_model::{hub, pattern};

use crate::config::{DeviceKind, TrainConfig};
use crate::corpus;
use crate::data::{Boundary, Document, Encode, EncodeError, Evaluation, Shape, TokenStore, sources, split};
use crate::error::Error;

/// Rows of the embedding are padded to a multiple of this, so that products have no ragged edge.
const VOCABULARY_MULTIPLE: usize = 8;

/// Opens the devices that a configuration names; with a sentence that says why, where the CPU takes the place of a GPU.
///
/// # Errors
/// A library that is missing, no such GPU, an instruction set that is not there.
pub fn devices(config: &TrainConfig) -> Result<(Vec<Device>, Option<String>), Error> {
    let gpus = |numbers: &[usize]| numbers.iter().map(|&n| Device::cuda(n)).collect::<Result<_, _>>();
    Ok(match (config.device, config.devices.as_slice()) {
        (DeviceKind::Cpu, _) => (vec![Device::cpu(config.threads)?], None),
        (DeviceKind::Auto, []) => {
            let (device, why_not) = Device::auto(config.threads)?;
            (vec![device], why_not)
        }
        (DeviceKind::Cuda, []) => (gpus(&[0])?, None),
        (_, numbers) => (gpus(numbers)?, None),
    })
}

/// What a run starts from.
#[derive(Debug)]
pub struct Setup {
    /// What is trained.
    pub model: ModelConfig,
    /// How text becomes tokens.
    pub tokenizer: Tokenizer,
    /// The folder of the checkpoint to start from, where there is one.
    pub init: Option<PathBuf>,
    /// The tokens to train on.
    pub training: Arc<TokenStore>,
    /// Evaluations on all held-out text, and on a part of it for the way; none where nothing is held out.
    pub evaluation: Option<(Evaluation, Evaluation)>,
    /// Number of documents that are held out.
    pub held_out_documents: usize,
    /// The texts themselves, for the compressors.
    pub documents: Option<(Vec<Document>, Vec<Document>)>,
    /// Where the text comes from.
    pub source: String,
    /// Sentences for the user.
    pub warnings: Vec<String>,
}

/// Minutes of the run without any argument, everything included.
pub const DEFAULT_MINUTES: f64 = 3.7;
/// Tokens of an evaluation on the way, at most about: a share of those trained on since the last one, so that
/// evaluations take a small part of the time, within limits.
fn quick_tokens(config: &TrainConfig) -> u64 {
    (config.eval_every.saturating_mul(config.tokens_per_step()) / 5).clamp(8 * 1024, 256 * 1024)
}

impl Setup {
    /// Reads the texts and makes tokens of them. `compress` keeps the texts for the comparison with compressors.
    pub fn new(config: &TrainConfig, compress: bool) -> Result<Setup, Error> {
        let mut warnings = Vec::new();
        let init = match &config.init {
            Some(init) => Some(hub::resolve(&init.to_string_lossy())?),
            None => None,
        };
        let tokenizer = match (&config.data.tokenizer, &init) {
            (Some(path), _) => Tokenizer::load(path).map_err(hognose_model::Error::from)?,
            (None, Some(folder)) => Tokenizer::find(folder).map_err(hognose_model::Error::from)?.ok_or_else(|| {
                let message = "has no tokenizer; give one with --tokenizer FILE".to_string();
                Error::Resume { path: folder.clone(), message }
            })?,
            (None, None) => Tokenizer::Bytes,
        };
        let (documents, source) = if config.data.paths.is_empty() {
            (corpus::documents()?, corpus::DESCRIPTION.to_string())
        } else {
            let names: Vec<String> = config.data.paths.iter().map(|p| p.display().to_string()).collect();
            (sources::read(&config.data.paths, &config.data.field)?, names.join(", "))
        };
        let split = split::split(documents, config.data.validation_fraction, config.seed)?;
        warnings.extend(split.warning.clone());

        let model = match &init {
            Some(folder) => checkpoint::read_config(folder)?.2,
            None => fresh_model(config, &tokenizer)?,
        };
        let what =
            "it would see the tokens that it is to predict; train it with a loss of your own through the library";
        model.expect_causal(what).map_err(hognose_model::Error::from)?;
        let store = |documents: &[Document]| tokens(documents, &tokenizer, &model).map(Arc::new);
        let training = store(&split.training)?;
        let evaluation = if split.validation.is_empty() {
            None
        } else {
            let store = store(&split.validation)?;
            let shape = Shape { length: config.length.max(256), batch: config.batch };
            Some((
                Evaluation::new(store.clone(), shape, None)?,
                Evaluation::new(store, shape, Some(quick_tokens(config)))?,
            ))
        };
        let held_out_documents = split.validation.len();
        let documents = compress.then_some((split.training, split.validation));
        Ok(Setup { model, tokenizer, init, training, evaluation, held_out_documents, documents, source, warnings })
    }

    /// The checkpoint to start from.
    pub fn open_init(&self) -> Result<Option<Checkpoint>, Error> {
        Ok(match &self.init {
            Some(folder) => Some(Checkpoint::open(folder)?),
            None => None,
        })
    }
}

/// The preset with the changes of `[model]`, its vocabulary being the tokenizer's.
fn fresh_model(config: &TrainConfig, tokenizer: &Tokenizer) -> Result<ModelConfig, Error> {
    let mut model = presets::preset(&config.preset).map_err(|e| Error::Preset(e.to_string()))?;
    // Widths before the layers that follow from them, and these before what changes single sizes.
    let order = ["d_model", "layers", "n_layer"];
    let place = |key: &str| order.iter().position(|k| *k == key).unwrap_or(order.len());
    let mut changes: Vec<_> = config.model.iter().collect();
    changes.sort_by_key(|(key, _)| place(key));
    for (key, value) in changes {
        change(&mut model, key, value)?;
    }
    let boundary = tokenizer.boundary();
    model.vocab_size = tokenizer.vocab_size();
    model.padded_vocab = model.vocab_size.next_multiple_of(VOCABULARY_MULTIPLE);
    model.bos_token_id = boundary;
    model.eos_token_ids = boundary.into_iter().collect();
    model.pad_token_id = boundary;
    model.validate().map_err(hognose_model::Error::from)?;
    Ok(model)
}

/// Sets one value of `[model]`: the pattern of its layers, or a size of all layers that have it.
fn change(model: &mut ModelConfig, key: &str, value: &toml::Value) -> Result<(), Error> {
    let bad = |expected| Error::ModelValue { key: key.to_string(), found: value.to_string(), expected };
    // Bounded here, so that no product of two sizes wraps around; what is too large is refused with the whole model.
    let number = || {
        let n = value.as_integer().and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
        n.map(|n| n as usize).ok_or_else(|| bad("a whole number from 1 to 4294967295"))
    };
    match key {
        "d_model" => {
            let (old, new) = (model.d_model, number()?);
            model.layers.iter_mut().for_each(|l| l.mixer.resize(old, new));
            model.d_model = new;
        }
        "layers" => model.layers = layers(model.d_model, value).ok_or_else(|| bad(PATTERN))??,
        // The pattern of layers, as often as needed.
        "n_layer" => model.layers = model.layers.iter().cycle().take(number()?.min(MAX_LAYERS + 1)).cloned().collect(),
        "d_intermediate" => {
            let hidden = number()?;
            model.layers.iter_mut().for_each(|l| l.d_intermediate = Some(hidden));
        }
        "tie_embeddings" => model.tie_embeddings = value.as_bool().ok_or_else(|| bad("true or false"))?,
        "expand" => {
            let d_inner = number()? * model.d_model;
            model.layers.iter_mut().for_each(|l| l.mixer.set_d_inner(d_inner));
        }
        _ => {
            if value.is_integer() {
                number()?;
            }
            let known: BTreeSet<String> = model.layers.iter().flat_map(|l| pattern::sizes(&l.mixer)).collect();
            if !known.contains(key) {
                let known = known.into_iter().fold(MODEL_KEYS.to_string(), |all, key| format!("{all}, {key}"));
                return Err(Error::ModelKey { key: key.to_string(), known });
            }
            let json = serde_json::to_value(value).map_err(|e| Error::Preset(e.to_string()))?;
            for mixer in model.layers.iter_mut().map(|l| &mut l.mixer) {
                if pattern::sizes(mixer).iter().any(|k| k == key) {
                    pattern::set(mixer, key, json.clone()).map_err(|e| Error::Preset(format!("[model] {key}: {e}")))?;
                }
            }
        }
    }
    Ok(())
}

/// Documents as a model's tokens, each with a boundary token before it.
///
/// # Errors
/// A tokenizer with more ids than the model, or one that refuses a text; no token that could stand at a boundary.
pub fn tokens(documents: &[Document], tokenizer: &Tokenizer, model: &ModelConfig) -> Result<TokenStore, Error> {
    if tokenizer.vocab_size() > model.padded_vocab {
        return Err(Error::Vocabulary { tokenizer: tokenizer.vocab_size(), model: model.padded_vocab });
    }
    let encoder = Encoder { tokenizer, vocabulary: model.padded_vocab };
    Ok(TokenStore::encode(documents, &encoder, boundary(tokenizer, model)?)?)
}

/// The keys of `[model]` beside the sizes that its layers have.
const MODEL_KEYS: &str = "d_model, n_layer, layers, d_intermediate, tie_embeddings, expand";
const PATTERN: &str = "a pattern such as \"3*mamba1, attention+mlp\", or a list of such";

/// The layers of a pattern or of a list of patterns; nothing for other values.
fn layers(d_model: usize, value: &toml::Value) -> Option<Result<Vec<LayerConfig>, Error>> {
    let texts: Vec<&str> = match value {
        toml::Value::String(text) => vec![text],
        toml::Value::Array(list) => list.iter().map(toml::Value::as_str).collect::<Option<_>>()?,
        _ => return None,
    };
    Some(pattern::layers(&texts.join(", "), d_model).map_err(|e| Error::Preset(format!("[model] layers: {e}"))))
}

/// The token that separates documents: the tokenizer's own, else the one that the model names.
fn boundary(tokenizer: &Tokenizer, model: &ModelConfig) -> Result<Boundary, Error> {
    let token = tokenizer.boundary().or(model.eos_token_ids.first().copied()).or(model.bos_token_id);
    token.map(Boundary::Start).ok_or(Error::NoBoundary)
}

struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    vocabulary: usize,
}

impl Encode for Encoder<'_> {
    fn encode(&self, bytes: &[u8]) -> Result<Vec<u32>, EncodeError> {
        self.tokenizer.encode(bytes, false).map_err(|e| Box::new(e) as EncodeError)
    }

    fn vocabulary(&self) -> usize {
        self.vocabulary
    }
}

/// A name for a run's folder that is not taken: `runs/PRESET`, `runs/PRESET-2`, …
pub fn free_folder(preset: &str) -> PathBuf {
    let base = Path::new("runs");
    let names = std::iter::once(preset.to_string()).chain((2..).map(|n| format!("{preset}-{n}")));
    names.map(|name| base.join(name)).find(|p| !p.exists()).unwrap_or_else(|| base.join(preset))
}
