// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How far it is, on stderr, if that is a terminal.

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

/// A bar of that length which looks like that, or a spinner without one. It goes when it is dropped.
///
/// # Panics
/// If the template is wrong.
pub fn bar(length: Option<u64>, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("a template that works");
    let bar = length.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    bar.with_style(style).with_finish(ProgressFinish::AndClear)
}
