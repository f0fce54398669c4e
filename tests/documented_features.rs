// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What exists with the feature `test-utils` alone says so in its documentation, which is made with all features.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn items_for_tests_say_so() {
    const FEATURE: &str = "feature = \"test-utils\"";
    const SAYS_SO: &str = "#[cfg_attr(docsrs, doc(cfg(feature = \"test-utils\")))]";
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let mut public = 0;
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (number, line) in lines.iter().enumerate() {
            let is_condition =
                line.contains(FEATURE) && !line.contains("docsrs") && !line.starts_with("//");
            if !is_condition {
                continue;
            }
            // Up to what the attributes are those of.
            let begins = |line: &&str| {
                ["pub", "impl", "mod", "fn", "use"]
                    .iter()
                    .any(|word| line.starts_with(word))
            };
            let item = lines[number..].iter().position(begins).unwrap();
            if lines[number + item].starts_with("pub ") {
                public += 1;
                let says_so = lines[number..number + item].contains(&SAYS_SO);
                assert!(says_so, "{}:{}: {SAYS_SO}", file.display(), number + 1);
            }
        }
    }
    assert!(public >= 3, "{public} found");
}
