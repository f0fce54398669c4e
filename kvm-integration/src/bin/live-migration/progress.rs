//! Progress bars, one a round.

use indicatif::{ProgressBar, ProgressStyle};
use kvm_integration::migration::Observer;

/// Draws on stderr, if that is a terminal; and takes the bar away when a round is over, for the
/// table says it better.
#[derive(Debug, Default)]
pub struct Bars {
    bar: Option<ProgressBar>,
}

impl Observer for Bars {
    fn begin(&mut self, round: usize, pages: u64, running: bool) {
        self.clear();
        let what = if running {
            "guest running"
        } else {
            "guest stopped"
        };
        let style = ProgressStyle::with_template(
            "{prefix:>8} [{bar:40}] {human_pos:>9} / {human_len} pages, {msg}",
        );
        // indicatif draws on stderr, and on a terminal only.
        let bar = ProgressBar::new(pages)
            .with_style(style.expect("the template is a constant that works"))
            .with_prefix(format!("round {round}"))
            .with_message(what);
        self.bar = Some(bar);
    }

    fn sent(&mut self, pages: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(pages);
        }
    }
}

impl Bars {
    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.clear();
    }
}
