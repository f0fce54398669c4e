// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Links of the documents resolve: in a checkout, in the package, and in rustdoc.
//!
//! Pages that rustdoc shows (src/guide.rs) link to other files by reference alone. docs/rustdoc.links stands before each
//! of them there and leads the same labels to rustdoc's own pages.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Pages that rustdoc shows, with their names below `crate::guide`.
const SHOWN: [(&str, &str); 12] = [
    ("docs/guide.md", ""),
    ("docs/slots.md", "::slots"),
    ("docs/threads.md", "::threads"),
    ("docs/migration.md", "::migration"),
    ("docs/limits.md", "::limits"),
    ("docs/operations.md", "::operations"),
    ("docs/terms.md", "::terms"),
    ("docs/working-set.md", "::working_set"),
    ("docs/pacing.md", "::pacing"),
    ("docs/performance.md", "::performance"),
    ("docs/guestperf.md", "::guestperf"),
    ("docs/tested-on.md", "::tested_on"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The document without blocks and pieces of code.
fn prose(document: &str) -> String {
    let mut is_code = false;
    let mut prose = String::new();
    for line in document.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
        } else if !is_code {
            // Every second piece is code.
            let pieces = line.split('`').step_by(2);
            prose += &pieces.collect::<Vec<_>>().join("`");
            prose.push('\n');
        }
    }
    prose
}

/// Targets of `[text](target)`.
fn inline_links(prose: &str) -> Vec<&str> {
    let links = prose.split("](").skip(1);
    links.filter_map(|rest| rest.split(')').next()).collect()
}

/// `[label]: target`, one a line.
fn definitions(text: &str) -> BTreeMap<&str, &str> {
    let lines = text.lines().filter_map(|line| line.strip_prefix('['));
    lines.filter_map(|line| line.split_once("]: ")).collect()
}

/// Labels that are used: `[text][label]`, or `[label]` alone.
fn labels<'a>(prose: &'a str, defined: &BTreeMap<&str, &str>) -> Vec<&'a str> {
    let joined = prose.split("][").skip(1);
    let mut used: Vec<&str> = joined.filter_map(|rest| rest.split(']').next()).collect();
    let alone = prose
        .split('[')
        .skip(1)
        .filter_map(|rest| rest.split(']').next());
    used.extend(alone.filter(|label| defined.contains_key(label)));
    used
}

/// The anchors of a document's headings, as Markdown's renderers make them.
fn anchors(document: &str) -> Vec<String> {
    let headings = document.lines().filter_map(|line| {
        let text = line.trim_start_matches('#');
        (text.len() < line.len()).then(|| text.strip_prefix(' '))?
    });
    let anchor = |heading: &str| {
        let kept = heading
            .chars()
            .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.collect::<String>().to_lowercase().replace(' ', "-")
    };
    headings.map(anchor).collect()
}

/// The file, as seen from the root, and the anchor that a link of `page` leads to; `None` if it leads elsewhere.
fn target(page: &str, link: &str) -> Option<(String, Option<String>)> {
    if link.contains("://") {
        return None;
    }
    let (file, anchor) = link
        .split_once('#')
        .map_or((link, None), |(file, anchor)| (file, Some(anchor)));
    if file.is_empty() {
        return Some((page.to_owned(), anchor.map(str::to_owned)));
    }
    let mut path: Vec<&str> = page.split('/').collect();
    path.pop();
    for part in file.split('/') {
        match part {
            ".." => drop(path.pop()),
            part => path.push(part),
        }
    }
    Some((path.join("/"), anchor.map(str::to_owned)))
}

/// What Cargo.toml keeps out of the package.
fn excluded() -> Vec<String> {
    let manifest = read("Cargo.toml");
    let list = manifest.split("\nexclude = [").nth(1).expect("a list");
    let names = list
        .split(']')
        .next()
        .unwrap()
        .split('"')
        .skip(1)
        .step_by(2);
    names.map(str::to_owned).collect()
}

fn documents() -> Vec<String> {
    let mut documents: Vec<_> = [
        "README.md",
        "SECURITY.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ]
    .map(str::to_owned)
    .into();
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") {
            documents.push(format!("docs/{name}"));
        }
    }
    documents
}

#[test]
fn links_lead_to_files_and_headings() {
    let mut seen = 0;
    for page in documents() {
        let document = read(&page);
        let prose = prose(&document);
        let defined = definitions(&document);
        for label in labels(&prose, &defined) {
            assert!(
                defined.contains_key(label),
                "{page}: [{label}] is not defined"
            );
        }
        for link in inline_links(&prose)
            .into_iter()
            .chain(defined.into_values())
        {
            let Some((file, anchor)) = target(&page, link) else {
                continue;
            };
            assert!(
                root().join(&file).exists(),
                "{page}: {link}: there is no {file}"
            );
            if let Some(anchor) = anchor {
                let there = anchors(&read(&file)).contains(&anchor);
                assert!(there, "{page}: {link}: no such heading");
            }
            seen += 1;
        }
    }
    assert!(seen > 80, "{seen}");
}

#[test]
fn pages_that_rustdoc_shows_link_within_the_package() {
    let shown: BTreeMap<_, _> = SHOWN.into();
    let there = read("docs/rustdoc.links");
    let there = definitions(&there);
    let excluded = excluded();
    assert!(
        excluded.iter().any(|name| name == "kvm-integration"),
        "{excluded:?}"
    );
    let module = read("src/guide.rs");
    for page in shown.keys() {
        assert!(
            module.contains(&format!("include_str!(\"../{page}\")")),
            "{page}"
        );
        let document = read(page);
        let prose = prose(&document);
        for link in inline_links(&prose) {
            let stays = link.starts_with('#') || link.contains("://");
            assert!(
                stays,
                "{page}: ({link}): write [text][label], and define it at the page's end"
            );
        }
        let defined = definitions(&document);
        for label in labels(&prose, &defined) {
            let (file, anchor) = target(page, defined[label]).expect("a file");
            let top = file.split('/').next().unwrap();
            assert!(
                !excluded.iter().any(|name| name == top),
                "{page}: {file} is not in the package"
            );
            let shown_at = there
                .get(label)
                .copied()
                .unwrap_or_else(|| panic!("{page}: docs/rustdoc.links lacks [{label}]"));
            if let Some(name) = shown.get(file.as_str()) {
                let anchor = anchor
                    .map(|anchor| format!("#{anchor}"))
                    .unwrap_or_default();
                assert_eq!(
                    shown_at,
                    format!("crate::guide{name}{anchor}"),
                    "{page}: [{label}]"
                );
            } else {
                let is_known = ["crate", "https://docs.rs/"]
                    .iter()
                    .any(|begin| shown_at.starts_with(begin));
                assert!(is_known, "[{label}]: {shown_at}");
            }
        }
    }
}
