// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Progress bars, one a round.

use indicatif::ProgressBar;
use kvm_integration::cli::progress::bar;
use kvm_integration::migration::Observer;

const LOOK: &str = "{prefix:>8} [{bar:40}] {human_pos:>9} / {human_len} pages, {msg}";

/// A bar goes when its round is over, for the table says it better.
#[derive(Debug, Default)]
pub struct Bars {
    bar: Option<ProgressBar>,
}

impl Observer for Bars {
    fn begin(&mut self, round: usize, pages: u64, running: bool) {
        self.bar = None;
        let bar = bar(Some(pages), LOOK).with_prefix(format!("round {round}"));
        self.bar = Some(bar.with_message(match running {
            true => "guest running",
            false => "guest stopped",
        }));
    }

    fn sent(&mut self, pages: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(pages);
        }
    }
}
