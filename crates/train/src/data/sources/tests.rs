use std::io::Write;

use tempfile::TempDir;

use super::*;

fn write(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, bytes).unwrap();
    path
}

fn texts(documents: &[Document]) -> Vec<String> {
    documents.iter().map(|d| String::from_utf8_lossy(&d.bytes).into_owned()).collect()
}

fn message(result: Result<Vec<Document>, DataError>) -> String {
    result.unwrap_err().to_string()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 6);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn reads_every_kind_and_packing() {
    let folder = TempDir::new().unwrap();
    let json = b"{\"text\":\"one\"}\n\n{\"id\":7,\"text\":\"two\\n\"}\n";
    write(&folder, "a.txt", b"plain \xff bytes");
    write(&folder, "b.txt.gz", &[gzip(b"first "), gzip(b"second")].concat());
    let frames = [zstd::encode_all(&b"zstd "[..], 3).unwrap(), zstd::encode_all(&b"frames"[..], 3).unwrap()].concat();
    write(&folder, "c.TXT.zst", &frames);
    write(&folder, "d.txt.xz", &xz(b"xz"));
    write(&folder, "e.jsonl", json);
    write(&folder, "f.jsonl.gz", &gzip(json));
    write(&folder, "g.jsonl.zst", &zstd::encode_all(&json[..], 3).unwrap());
    write(&folder, "ignored.md", b"not text");
    let documents = read(&[folder.path().to_path_buf()], "text").unwrap();
    assert_eq!(documents[0].bytes, b"plain \xff bytes");
    assert_eq!(
        texts(&documents)[1..],
        ["first second", "zstd frames", "xz", "one", "two\n", "one", "two\n", "one", "two\n"]
    );
    assert!(documents[5].name.ends_with("e.jsonl:3"), "{}", documents[5].name);
}

#[test]
fn order_is_that_of_arguments_and_sorted_paths_and_files_count_once() {
    let folder = TempDir::new().unwrap();
    for name in ["z.txt", "b/2.txt", "b/1.txt", "b/c/0.txt", ".hidden/x.txt", "a.txt"] {
        write(&folder, name, name.as_bytes());
    }
    let at = |name: &str| folder.path().join(name);
    let documents = read(&[at("z.txt"), folder.path().to_path_buf()], "text").unwrap();
    assert_eq!(texts(&documents), ["z.txt", "a.txt", "b/1.txt", "b/2.txt", "b/c/0.txt"]);
    let documents = read(&[at("b/*.txt"), at("?.txt")], "text").unwrap();
    assert_eq!(texts(&documents), ["b/1.txt", "b/2.txt", "a.txt", "z.txt"]);
}

#[cfg(unix)]
#[test]
fn a_link_to_a_folder_above_does_not_loop() {
    let folder = TempDir::new().unwrap();
    write(&folder, "sub/a.txt", b"a");
    std::os::unix::fs::symlink(folder.path(), folder.path().join("sub/up")).unwrap();
    assert_eq!(read(&[folder.path().to_path_buf()], "text").unwrap().len(), 1);
}

#[test]
fn another_field_can_hold_the_text() {
    let folder = TempDir::new().unwrap();
    let path = write(&folder, "a.jsonl", b"\xef\xbb\xbf{\"body\":\"b\",\"text\":3}");
    assert_eq!(texts(&read(&[path], "body").unwrap()), ["b"]);
}

#[test]
fn names_what_is_wrong_with_paths() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert!(message(read(&[], "text")).contains("no data was named"));
    assert!(message(read(&[at("nothing")], "text")).contains("there is no file or folder"));
    assert!(message(read(&[at("*.txt")], "text")).contains("matches no file"));
    assert!(message(read(&[at("a[")], "text")).contains("not a valid file pattern"));
    fs::create_dir(at("empty")).unwrap();
    assert!(message(read(&[at("empty")], "text")).contains("holds no text"));
    let path = write(&folder, "a.parquet", b"PAR1");
    assert!(message(read(&[path], "text")).contains("cannot tell what"));
    let path = write(&folder, "blank.txt", b"");
    assert!(message(read(&[path], "text")).contains("the data is empty: 1 file"));
}

#[test]
fn names_what_is_wrong_with_contents() {
    let folder = TempDir::new().unwrap();
    let mut number = 0;
    let mut json = |text: &[u8]| {
        number += 1;
        message(read(&[write(&folder, &format!("{number}.jsonl"), text)], "text"))
    };
    let error = json(b"{\"text\":\"ok\"}\n{\"text\":\n");
    assert!(error.contains("line 2: expected a JSON object, found \"EOF"), "{error}");
    assert!(json(b"[1]").contains("line 1: expected a JSON object, found an array"));
    assert!(json(b"{\"a\":1,\"b\":2}").contains("there is no field \"text\"; its fields are \"a\", \"b\""));
    assert!(json(b"{}").contains("none at all"));
    assert!(json(b"{\"text\":null}").contains("the field \"text\" is null, expected a string"));
    assert!(json(b"{\"text\":\"\xff\"}").contains("invalid unicode"));
    let packed = gzip(&b"some text that is long enough to be cut".repeat(20));
    let path = write(&folder, "cut.txt.gz", &packed[..packed.len() / 2]);
    assert!(message(read(std::slice::from_ref(&path), "text")).contains("cannot read"));
    let path = write(&folder, "bad.txt.zst", b"not zstd at all");
    assert!(message(read(&[path], "text")).contains("cannot read"));
    let path = write(&folder, "cut.txt.xz", &xz(b"hello")[..20]);
    assert!(message(read(&[path], "text")).contains("cannot read"));
}
