//! Fetching from a hub: against a small server on this machine, then from the cache without it.

use hognose_model::checkpoint::Checkpoint;
use hognose_model::hub::{Hub, HubError};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves one repository, `snakes/tiny`, the way the hub does, and notes what was asked for.
struct Server {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(files: BTreeMap<String, Vec<u8>>) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = answer(stream, &files, &log);
            }
        });
        Server { endpoint, requests }
    }

    fn hub(&self, cache: &Path) -> Hub {
        Hub { endpoint: self.endpoint.clone(), cache: cache.into(), token: None, offline: false, progress: false }
    }
}

fn answer(mut stream: TcpStream, files: &BTreeMap<String, Vec<u8>>, log: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_string();
    let mut range = None;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(r) = line.to_lowercase().strip_prefix("range: bytes=") {
            let (from, to) = r.trim().split_once('-').unwrap();
            range = Some((from.parse::<usize>().unwrap(), to.parse::<usize>().ok()));
        }
    }
    log.lock().unwrap().push(path.clone());
    let mut respond = |status: &str, headers: &str, body: &[u8]| {
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n", body.len())?;
        stream.write_all(body)
    };
    if path == "/api/models/snakes/tiny/revision/main" {
        let siblings: Vec<_> = files.keys().map(|f| format!("{{\"rfilename\": \"{f}\"}}")).collect();
        let body = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", siblings.join(","));
        return respond("200 OK", "Content-Type: application/json\r\n", body.as_bytes());
    }
    let file = path.strip_prefix("/snakes/tiny/resolve/main/").and_then(|name| Some((name, files.get(name)?)));
    let Some((name, contents)) = file else {
        return respond("404 Not Found", "", b"");
    };
    let (from, to) = range.unwrap_or((0, None));
    let end = to.map_or(contents.len(), |t| (t + 1).min(contents.len()));
    let headers = format!(
        "Content-Range: bytes {from}-{}/{}\r\nETag: \"etag-of-{name}\"\r\nX-Repo-Commit: {COMMIT}\r\n",
        end - 1,
        contents.len()
    );
    respond("206 Partial Content", &headers, &contents[from..end])
}

fn oracle(name: &str, files: &[&str]) -> BTreeMap<String, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/oracles").join(name);
    files.iter().map(|f| (f.to_string(), std::fs::read(folder.join(f)).unwrap())).collect()
}

#[test]
fn a_model_is_fetched_once_and_then_works_offline() {
    let mut files = oracle("hf/mamba", &["config.json", "generation_config.json", "model.safetensors"]);
    files.insert("tokenizer.json".into(), b"{}".to_vec());
    files.insert("flax_model.msgpack".into(), b"something large that is not needed".to_vec());
    let server = Server::start(files.clone());
    let cache = tempfile::tempdir().unwrap();
    let hub = server.hub(cache.path());

    let folder = hub.fetch("snakes/tiny").unwrap();
    assert!(folder.starts_with(cache.path()) && folder.ends_with(format!("snapshots/{COMMIT}")), "{folder:?}");
    for (name, contents) in &files {
        let fetched = std::fs::read(folder.join(name)).ok();
        assert_eq!(fetched.as_ref(), (name != "flax_model.msgpack").then_some(contents), "{name}");
    }
    let checkpoint = Checkpoint::open(&folder).unwrap();
    assert_eq!(checkpoint.config.n_layer(), 3);
    assert!(!checkpoint.read_f32("backbone.embedding.weight").unwrap().is_empty());

    let asked = server.requests.lock().unwrap().len();
    assert_eq!(hub.fetch("snakes/tiny").unwrap(), folder);
    let dead = Hub { endpoint: "http://127.0.0.1:1".into(), ..hub.clone() };
    assert_eq!(dead.fetch("snakes/tiny").unwrap(), folder);
    assert_eq!(Hub { offline: true, ..dead }.fetch("snakes/tiny").unwrap(), folder);
    assert_eq!(server.requests.lock().unwrap().len(), asked, "the cache was enough");
}

#[test]
fn original_checkpoints_and_shards_are_fetched_too() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(oracle("official/mamba2", &["config.json", "pytorch_model.bin"]));
    let folder = server.hub(cache.path()).fetch("snakes/tiny").unwrap();
    assert_eq!(Checkpoint::open(&folder).unwrap().config.n_layer(), 3);
    // It has no tokenizer; the cached model is used when the server is gone.
    let dead = Hub { endpoint: "http://127.0.0.1:1".into(), ..server.hub(cache.path()) };
    assert_eq!(dead.fetch("snakes/tiny").unwrap(), folder);

    let cache = tempfile::tempdir().unwrap();
    let mut files = oracle("hf/mamba", &["config.json"]);
    let index = "{\"weight_map\": {\"a\": \"one.safetensors\", \"b\": \"two.safetensors\"}}";
    files.insert("model.safetensors.index.json".into(), index.into());
    files.insert("one.safetensors".into(), b"1".to_vec());
    let server = Server::start(files.clone());
    let hub = server.hub(cache.path());
    let error = hub.fetch("snakes/tiny").unwrap_err().to_string();
    assert!(error.contains("404"), "{error}");
    // Half a model in the cache is none.
    assert!(matches!(Hub { offline: true, ..hub }.fetch("snakes/tiny"), Err(HubError::Offline { .. })));
    files.insert("two.safetensors".into(), b"2".to_vec());
    let folder = Server::start(files).hub(cache.path()).fetch("snakes/tiny").unwrap();
    assert!(folder.join("one.safetensors").exists() && folder.join("two.safetensors").exists());
}

#[test]
fn what_is_not_there_is_said() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(BTreeMap::from([("README.md".to_string(), b"hello".to_vec())]));
    let hub = server.hub(cache.path());
    let message = |hub: &Hub, id: &str| hub.fetch(id).unwrap_err().to_string();
    assert!(message(&hub, "snakes/other").contains("404"), "{}", message(&hub, "snakes/other"));
    assert!(message(&hub, "snakes/tiny").contains("no config.json"), "{}", message(&hub, "snakes/tiny"));
    assert!(message(&hub, "not an id").contains("organisation/name"));
    let offline = Hub { offline: true, ..hub };
    assert!(message(&offline, "snakes/tiny").contains("HF_HUB_OFFLINE"), "{}", message(&offline, "snakes/tiny"));
    let dead = Hub { endpoint: "http://127.0.0.1:1".into(), offline: false, ..offline };
    assert!(message(&dead, "snakes/tiny").contains("http://127.0.0.1:1"), "{}", message(&dead, "snakes/tiny"));
}
