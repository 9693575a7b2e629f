//! Checkpoints from the Hugging Face hub, through the cache folder that its other tools use too.
//!
//! `HF_HUB_CACHE` or `HF_HOME` name the cache, `HF_ENDPOINT` the server, `HF_TOKEN` an access token, and
//! `HF_HUB_OFFLINE=1` forbids the network. What the cache holds completely is used without asking the server; give
//! `organisation/name@revision` to ask for a certain version.

use crate::checkpoint::{CheckpointError, shards};
use crate::tokenizer::TOKENIZER_FILES;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use std::path::{Path, PathBuf};

/// Weight files by preference: the file, and the index where it is in shards.
const WEIGHTS: [(&str, &str); 2] =
    [("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")];

/// Why a checkpoint cannot be found or fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Neither a path nor an id.
    #[error("{0}: there is no such file or folder, and it is not a hub id (organisation/name) either")]
    NotFound(String),
    /// Offline, and not in the cache.
    #[error(
        "{id}: there is no such folder, and HF_HUB_OFFLINE is set while the cache {} does not hold this model \
        completely; unset it to download, or give a folder", .cache.display()
    )]
    Offline { id: String, cache: PathBuf },
    /// The server does not have it, or does not give it.
    #[error("{id}: there is no such folder, and {endpoint} does not give such a model ({message})")]
    Fetch { id: String, endpoint: String, message: String },
    /// The repository holds something else.
    #[error(
        "{id}: the repository has no {missing}; expected a model with config.json and weights as {}",
        weight_names()
    )]
    Incomplete { id: String, missing: &'static str },
    /// There is no place for a cache.
    #[error("there is no home folder for downloads; set HF_HOME to a folder")]
    NoCache,
    /// An index of shards that cannot be used.
    #[error(transparent)]
    Index(#[from] CheckpointError),
}

fn weight_names() -> String {
    WEIGHTS.map(|(a, b)| format!("{a} or {b}")).join(", ")
}

/// Where to fetch from and to.
#[derive(Debug, Clone)]
pub struct Hub {
    /// The server, e.g. `https://huggingface.co`.
    pub endpoint: String,
    /// The cache folder, which holds `models--organisation--name` folders.
    pub cache: PathBuf,
    /// Access token for private models.
    pub token: Option<String>,
    /// Use the cache only.
    pub offline: bool,
    /// Show progress bars on stderr.
    pub progress: bool,
}

impl Hub {
    /// The hub as the environment describes it.
    ///
    /// # Errors
    /// No cache folder named and no home folder.
    pub fn from_env() -> Result<Self, HubError> {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let home = || {
            let base = var("XDG_CACHE_HOME").map(PathBuf::from);
            let base = base.or_else(|| std::env::home_dir().map(|h| h.join(".cache")));
            base.map(|b| b.join("huggingface"))
        };
        let cache = match (var("HF_HUB_CACHE"), var("HF_HOME")) {
            (Some(cache), _) => PathBuf::from(cache),
            (None, Some(home)) => PathBuf::from(home).join("hub"),
            (None, None) => home().ok_or(HubError::NoCache)?.join("hub"),
        };
        let truthy = |v: String| ["1", "on", "yes", "true"].contains(&v.to_lowercase().as_str());
        Ok(Hub {
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
            cache,
            token: var("HF_TOKEN"),
            offline: var("HF_HUB_OFFLINE").is_some_and(truthy),
            progress: true,
        })
    }

    /// The folder of a model in the cache, downloaded if need be: config.json, weights and tokenizer files.
    ///
    /// # Errors
    /// An id that is none, a server that cannot be reached or refuses, a repository without a model.
    pub fn fetch(&self, id: &str) -> Result<PathBuf, HubError> {
        let (name, revision) = parse_id(id).ok_or_else(|| HubError::NotFound(id.into()))?;
        let repo = Repo::with_revision(name.into(), RepoType::Model, revision.into());
        let cached = self.cached(&repo)?;
        if let Some(folder) = &cached
            && (self.offline || folder.join("tokenizer.json").exists())
        {
            return Ok(folder.clone());
        }
        if self.offline {
            return Err(HubError::Offline { id: id.into(), cache: self.cache.clone() });
        }
        // A complete model without a tokenizer may be one, or may have been fetched by a program that did not need it.
        match (self.download(id, repo), cached) {
            (Err(HubError::Fetch { .. }), Some(folder)) => Ok(folder),
            (result, _) => result,
        }
    }

    /// The folder of a model that the cache holds completely.
    fn cached(&self, repo: &Repo) -> Result<Option<PathBuf>, HubError> {
        let cache = Cache::new(self.cache.clone()).repo(repo.clone());
        let folder = cache.get("config.json").and_then(|p| p.parent().map(Path::to_path_buf));
        let Some(folder) = folder else { return Ok(None) };
        for (single, index) in WEIGHTS {
            let index = folder.join(index);
            let complete = if index.exists() {
                shards::shard_names(&index)?.iter().all(|s| folder.join(s).exists())
            } else {
                folder.join(single).exists()
            };
            if complete {
                return Ok(Some(folder));
            }
        }
        Ok(None)
    }

    fn download(&self, id: &str, repo: Repo) -> Result<PathBuf, HubError> {
        let failed = |e: ApiError| self.failed(id, e);
        let remote = self.api().map_err(failed)?.repo(repo);
        let present: Vec<String> = remote.info().map_err(failed)?.siblings.into_iter().map(|s| s.rfilename).collect();
        let has = |name: &str| present.iter().any(|p| p == name);
        let get = |remote: &ApiRepo, name: &str| remote.get(name).map_err(failed);
        if !has("config.json") {
            return Err(HubError::Incomplete { id: id.into(), missing: "config.json" });
        }
        let weights = WEIGHTS.into_iter().find(|(single, index)| has(single) || has(index));
        let (single, index) = weights.ok_or(HubError::Incomplete { id: id.into(), missing: "weights" })?;
        // Weights come last: a cache that holds them holds everything.
        for name in TOKENIZER_FILES.iter().chain(&["generation_config.json"]).filter(|n| has(n)) {
            get(&remote, name)?;
        }
        let config = get(&remote, "config.json")?;
        if has(single) {
            get(&remote, single)?;
        } else {
            for shard in shards::shard_names(&get(&remote, index)?)? {
                get(&remote, &shard)?;
            }
        }
        Ok(config.parent().unwrap_or(Path::new(".")).to_path_buf())
    }

    fn api(&self) -> Result<Api, ApiError> {
        let builder = ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.trim_end_matches('/').to_string())
            .with_progress(self.progress)
            .with_retries(3);
        // Without one of our own, the token file of the hub's tools is used.
        match &self.token {
            Some(token) => builder.with_token(Some(token.clone())).build(),
            None => builder.build(),
        }
    }

    fn failed(&self, id: &str, e: ApiError) -> HubError {
        let text = e.to_string();
        let message = match ["401", "403", "404"].into_iter().find(|code| text.contains(code)) {
            Some(code) => format!("{code}: it does not exist, or is private and needs HF_TOKEN"),
            None => text,
        };
        HubError::Fetch { id: id.into(), endpoint: self.endpoint.clone(), message }
    }
}

/// A path as it is, or the folder of a hub id, downloaded if need be.
///
/// # Errors
/// Neither an existing path nor an id, or as [`Hub::fetch`].
pub fn resolve(path_or_id: &str) -> Result<PathBuf, HubError> {
    let path = Path::new(path_or_id);
    if path.exists() {
        return Ok(path.into());
    }
    if parse_id(path_or_id).is_none() {
        return Err(HubError::NotFound(path_or_id.into()));
    }
    Hub::from_env()?.fetch(path_or_id)
}

/// Takes `organisation/name` or `organisation/name@revision` apart.
fn parse_id(id: &str) -> Option<(&str, &str)> {
    let (name, revision) = id.split_once('@').unwrap_or((id, "main"));
    let (organisation, model) = name.split_once('/')?;
    let word = |s: &str| {
        s.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && !s.contains("..")
            && !s.contains("--")
    };
    (word(organisation) && word(model) && word(revision)).then_some((name, revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_paths() {
        assert_eq!(parse_id("state-spaces/mamba-130m"), Some(("state-spaces/mamba-130m", "main")));
        assert_eq!(parse_id("a/b.c_d@v1.0"), Some(("a/b.c_d", "v1.0")));
        for id in ["mamba", "a/b/c", "/etc/x", "./a", "../a", "a/..", "a/", "a b/c", "a/b@", "a/b@../c", "~/a", ""] {
            assert_eq!(parse_id(id), None, "{id}");
        }
        let error = resolve("no such/folder").unwrap_err().to_string();
        assert!(error.contains("no such/folder"), "{error}");
        assert_eq!(resolve("src").unwrap(), Path::new("src"));
    }
}
