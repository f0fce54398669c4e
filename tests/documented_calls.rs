// SPDX-License-Identifier: Apache-2.0 OR MIT
//! docs/threads.md lists what each call waits for. Every public function must be in one of its tables.

#[path = "common/sources.rs"]
mod sources;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use sources::sources;

/// Files whose calls have no row, and why.
const EXCEPT: [(&str, &str); 1] = [("src/sim/", "a kernel for tests, which no VMM runs with")];

/// A call: the type, or the module of a free function, and its name.
type Call = (String, String);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The name that the text begins with.
fn name(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    &text[..end.unwrap_or(text.len())]
}

/// The type of `impl Type {` or `impl<'a> Type<'a> {`.
fn type_of(header: &str) -> &str {
    let rest = header.strip_prefix("impl").unwrap();
    let rest = match rest.starts_with('<') {
        true => rest.split_once("> ").unwrap().1,
        false => rest,
    };
    name(rest.trim_start())
}

/// The calls that rustdoc shows of a file, as rustfmt has formatted it. All that is not public is `pub(...)`, or has no `pub`.
fn calls(file: &Path) -> Vec<Call> {
    let text = fs::read_to_string(file).unwrap();
    let module = file.file_stem().unwrap().to_str().unwrap();
    let (mut owner, mut is_hidden, mut found) = (module, false, Vec::new());
    for line in text.lines() {
        match line.trim() {
            "#[doc(hidden)]" => is_hidden = true,
            _ if line.starts_with("impl") => owner = type_of(line),
            _ if line == "}" => owner = module,
            line => {
                let call = line.strip_prefix("pub ").and_then(|rest| {
                    let rest = rest.strip_prefix("const ").unwrap_or(rest);
                    let rest = rest.strip_prefix("unsafe ").unwrap_or(rest);
                    rest.strip_prefix("fn ")
                });
                if let Some(call) = call.filter(|_| !is_hidden) {
                    found.push((owner.to_owned(), name(call).to_owned()));
                }
                is_hidden &= line.starts_with("#[") || line.starts_with("//");
            }
        }
    }
    found
}

/// The calls that the tables name. A name in a row is of the type named last before it in that row, or of the log.
fn documented(page: &str) -> BTreeSet<Call> {
    let mut documented = BTreeSet::new();
    for row in page.lines().filter(|line| line.starts_with("| ")) {
        let mut owner = "DirtyLog";
        for code in row.split('`').skip(1).step_by(2) {
            let (path, last) = code.rsplit_once("::").unwrap_or((owner, code));
            if last.starts_with(char::is_uppercase) || last == "metrics" {
                owner = last;
                continue;
            }
            owner = path;
            documented.insert((owner.to_owned(), last.to_owned()));
        }
    }
    documented
}

#[test]
fn every_call_has_a_row() {
    let page = fs::read_to_string(root().join("docs/threads.md")).unwrap();
    let documented = documented(&page);
    let mut files = Vec::new();
    sources(&root().join("src"), &mut files);
    let is_excepted = |file: &Path, except: &str| file.starts_with(root().join(except));
    for (except, _) in EXCEPT {
        let some = files.iter().any(|file| is_excepted(file, except));
        assert!(some, "there is no {except}");
    }
    files.retain(|file| !EXCEPT.iter().any(|(except, _)| is_excepted(file, except)));
    let calls: BTreeSet<Call> = files.iter().flat_map(|file| calls(file)).collect();
    let free = ("metrics".to_owned(), "publish".to_owned());
    assert!(calls.len() > 150 && calls.contains(&free), "{calls:?}");
    let missing: Vec<String> = calls
        .difference(&documented)
        .map(|(owner, call)| format!("{owner}::{call}"))
        .collect();
    assert!(
        missing.is_empty(),
        "no row in docs/threads.md: {}",
        missing.join(", ")
    );
}
