//! The README's Rust code is the examples' code.

const README: &str = include_str!("../README.md");
const EXAMPLES: [&str; 3] = [
    include_str!("../examples/load_and_generate.rs"),
    include_str!("../examples/forward.rs"),
    include_str!("../examples/train.rs"),
];

#[test]
fn the_readme_quotes_the_examples() {
    let outdent =
        |text: &&str| text.lines().map(|l| l.strip_prefix("    ").unwrap_or(l)).collect::<Vec<_>>().join("\n");
    let examples: Vec<String> = EXAMPLES.iter().map(outdent).collect();
    let quotes: Vec<&str> = README.split("```rust\n").skip(1).filter_map(|rest| rest.split("\n```").next()).collect();
    assert_eq!(quotes.len(), EXAMPLES.len());
    for quote in quotes {
        assert!(examples.iter().any(|e| e.contains(quote)), "README.md quotes what no example has:\n{quote}");
    }
}

#[test]
fn the_readmes_links_lead_somewhere() {
    for link in README.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(link);
        assert!(link.starts_with("http") || path.exists(), "README.md: there is no {link}");
    }
}
