// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The source files of the library.

use std::fs;
use std::path::{Path, PathBuf};

/// Adds all Rust files below `directory`.
pub fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}
