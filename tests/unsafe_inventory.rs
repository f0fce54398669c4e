// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The inventory of `unsafe` in SECURITY.md against the sources.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What stands behind the word where it is code.
const FORMS: [&str; 5] = ["{", "impl ", "fn ", "trait ", "extern "];

/// How often `unsafe` is code in `source`. In a comment or a lint's name it is not.
fn count(source: &str) -> usize {
    let code = source.lines().map(|line| line.split("//").next().unwrap());
    let words = code.flat_map(|line| line.split("unsafe ").skip(1));
    words
        .filter(|rest| FORMS.iter().any(|form| rest.starts_with(form)))
        .count()
}

/// Those under `directory`, by their path from the crate's root.
fn sources(directory: &Path, found: &mut BTreeMap<String, usize>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap();
            let count = count(&fs::read_to_string(&path).unwrap());
            if count > 0 {
                found.insert(name.to_str().unwrap().into(), count);
            }
        }
    }
}

#[test]
fn it_is_complete() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeMap::new();
    sources(&root.join("src"), &mut found);
    let text = fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let rows = text.lines().filter_map(|line| {
        let (file, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
        let count = rest.split(" |").next()?.parse().ok()?;
        file.starts_with("src/").then(|| (file.to_owned(), count))
    });
    let listed: BTreeMap<_, usize> = rows.collect();
    assert_eq!(found, listed, "in the sources, and in SECURITY.md");
}

#[test]
fn code_is_told_from_words() {
    assert_eq!(count("// unsafe { x }\n#![deny(unsafe_code)]\n"), 0);
    assert_eq!(count("unsafe impl Send for X {}\nlet x = unsafe { y };"), 2);
    assert_eq!(count("unsafe fn f() { unsafe { g() } } // unsafe fn"), 2);
}
