//! One line that says how far it is.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::report::Report;

/// Draws on stderr, if that is a terminal.
#[derive(Debug)]
pub struct Bar(ProgressBar);

impl Bar {
    /// Nothing yet.
    pub fn new() -> Self {
        let style = ProgressStyle::with_template("{spinner} {msg}");
        // indicatif draws on stderr, on a terminal only, and seldom enough.
        let bar = ProgressBar::new_spinner();
        Self(bar.with_style(style.expect("the template is a constant that works")))
    }

    /// Shows how far it is.
    pub fn show(&self, time: Duration, report: &Report) {
        self.0.set_message(format!(
            "{} episodes in {} s, {} entries, {} pages missed",
            report.episodes,
            time.as_secs(),
            report.entries,
            report.missed_pages
        ));
        self.0.tick();
    }

    /// Prints a line that stays, on a terminal or not.
    pub fn above(&self, line: &str) {
        self.0.suspend(|| eprintln!("{line}"));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
