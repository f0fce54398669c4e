// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The documentation is made with all features. It names the feature of a module that exists with `test-utils` only. It hides
//! calls of the log that exist with that feature only: they are for the tests and benches of this crate.

#[path = "common/sources.rs"]
mod sources;

use std::fs;
use std::path::Path;

use sources::sources;

#[test]
fn items_for_tests_say_so_or_are_hidden() {
    const FEATURE: &str = "feature = \"test-utils\"";
    const HIDDEN: &str = "#[doc(hidden)]";
    const SAYS_SO: &str = "#[cfg_attr(docsrs, doc(cfg(feature = \"test-utils\")))]";
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let (mut modules, mut calls) = (0, 0);
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
            let (counted, attribute) = match lines[number + item] {
                line if line.starts_with("pub fn ") => (&mut calls, HIDDEN),
                line if line.starts_with("pub ") => (&mut modules, SAYS_SO),
                _ => continue,
            };
            *counted += 1;
            let has = lines[number..number + item].contains(&attribute);
            assert!(has, "{}:{}: {attribute}", file.display(), number + 1);
        }
    }
    // `sim`; `reap_on_shard` and `harvest_and_stop`.
    assert_eq!((modules, calls), (1, 2));
}
