// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a look is shown: redrawn in place on a terminal, a line each elsewhere.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use console::Term;
use kvm_dirty_ring::Mode;

use super::look::Look;
use crate::report::grouped;

/// Between two looks on a terminal: people can't read faster.
const REDRAW: Duration = Duration::from_millis(200);
/// Between two lines elsewhere, at first.
const LINE: Duration = Duration::from_millis(500);
/// A line comes when so many parts of the time so far have gone by since the one before: an hour has
/// no more than some hundred lines.
const PARTS: u32 = 60;

/// Where looks are shown.
pub enum View {
    /// Lines of a terminal, drawn anew each time, and taken away in the end.
    Terminal(Board),
    /// Nobody sees it now, or knows how wide it is; how long it has been written so far.
    Lines(Duration),
}

impl View {
    /// Stderr: stdout is for results.
    pub fn for_stderr() -> Self {
        match io::stderr().is_terminal() {
            true => Self::Terminal(Board::default()),
            false => Self::Lines(Duration::ZERO),
        }
    }

    /// Until the next look.
    pub fn interval(&self) -> Duration {
        match self {
            Self::Terminal(_) => REDRAW,
            Self::Lines(so_far) => LINE.max(*so_far / PARTS),
        }
    }

    pub fn show(&mut self, look: &Look) {
        match self {
            Self::Terminal(board) => board.draw(&picture(look)),
            Self::Lines(so_far) => {
                *so_far = look.elapsed;
                // Without a reader of stderr a line is missed, and no more.
                let _ = writeln!(io::stderr(), "{}", line(look));
            }
        }
    }
}

/// Lines of a terminal, which are taken away when this is dropped. No cursor is hidden and no mode
/// changed: whatever ends the program, the terminal is as it was.
pub struct Board {
    terminal: Term,
    /// Lines that are there now; the cursor is at the begin of the one behind.
    drawn: usize,
}

impl Board {
    fn draw(&mut self, picture: &str) {
        let (height, width) = self.terminal.size();
        let (height, width) = (usize::from(height), usize::from(width));
        let (text, drawn) = drawing(self.drawn, picture, height, width);
        self.drawn = drawn;
        // In one write, so that it does not flicker. A terminal that is gone misses it.
        let _ = self.terminal.write_all(text.as_bytes());
    }
}

impl Default for Board {
    fn default() -> Self {
        Self {
            terminal: Term::stderr(),
            drawn: 0,
        }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        self.draw("");
    }
}

/// What takes `drawn` lines away and draws as many of the picture's as fit; and how many they are.
fn drawing(drawn: usize, picture: &str, height: usize, width: usize) -> (String, usize) {
    let mut text = String::new();
    if drawn > 0 {
        // Up, to the begin of the line, and all from there on cleared.
        let _ = write!(text, "\x1b[{drawn}A\r\x1b[J");
    }
    // One line is the cursor's.
    let fits = picture.lines().take(height.saturating_sub(1));
    let mut lines = 0;
    for line in fits {
        // A full line might wrap, or not: terminals differ.
        text.extend(line.chars().take(width.saturating_sub(1)));
        text.push('\n');
        lines += 1;
    }
    (text, lines)
}

/// vCPUs that a picture shows, so that it fits into 24 lines.
const ROWS: usize = 16;

/// Several lines of less than 80 columns.
fn picture(look: &Look) -> String {
    let (progress, stats) = (&look.progress, &look.stats);
    let sent = progress.sent as f64 / progress.pages.max(1) as f64;
    let mut lines = vec![format!(
        "round {}, {} {} {} of {} pages left",
        progress.round,
        progress.phase.name(),
        bar(sent, 20),
        grouped(look.left()),
        grouped(progress.pages),
    )];
    if look.mode == Mode::Rings {
        lines.push(format!(
            "{:>6} {:>12} {:>12} {:>12}  ring",
            "vCPU", "entries/s", "full exits", "stall ms"
        ));
        for (place, (vcpu, ring)) in stats.vcpus.iter().zip(&look.rings).take(ROWS).enumerate() {
            lines.push(format!(
                "{place:>6} {:>12} {:>12} {:>12.2}  {} {:>3.0} %",
                grouped(ring.rate as u64),
                grouped(vcpu.full_exits),
                ms(vcpu.stall_ns),
                bar(ring.fill, 20),
                100.0 * ring.fill,
            ));
        }
        if stats.vcpus.len() > ROWS {
            lines.push(format!("and {} vCPUs more", stats.vcpus.len() - ROWS));
        }
        lines.push(format!(
            "{:>6} {:>12} {:>12} {:>12.2}",
            "all",
            grouped(look.rate() as u64),
            grouped(stats.full_exits()),
            ms(stats.stall_ns()),
        ));
        lines.push(format!(
            "reaper: {} passes, sleeps {:.2} ms, was {:.2} ms late{}",
            grouped(stats.reaper.passes),
            ms(stats.reaper.delay_ns),
            ms(stats.reaper.lateness_ns),
            if stats.reaper.saturated {
                ", can't keep up"
            } else {
                ""
            },
        ));
        lines.push(format!(
            "log: {} passes, {} resets of {:.1} entries",
            grouped(stats.passes),
            grouped(stats.resets),
            stats.entries_per_reset(),
        ));
    } else {
        lines.push("bitmap mode: there are no rings to look at".into());
    }
    lines.push(format!("suspects: {} pages", grouped(stats.suspect_pages)));
    lines.join("\n")
}

/// The same in one line, without what it would take a line a vCPU to say.
fn line(look: &Look) -> String {
    let (progress, stats) = (&look.progress, &look.stats);
    let rings = match look.mode {
        Mode::Rings => format!(
            "{} entries/s, fullest ring {:.0} %, {} full exits of {:.2} ms in all, {} passes of \
             the reaper, which sleeps {:.2} ms",
            grouped(look.rate() as u64),
            100.0 * look.fullest(),
            grouped(stats.full_exits()),
            ms(stats.stall_ns()),
            grouped(stats.reaper.passes),
            ms(stats.reaper.delay_ns),
        ),
        _ => "no rings".into(),
    };
    format!(
        "watch: {:.1} s, round {}, {}, {} of {} pages left, {rings}, {} suspects",
        look.elapsed.as_secs_f64(),
        progress.round,
        progress.phase.name(),
        grouped(look.left()),
        grouped(progress.pages),
        grouped(stats.suspect_pages),
    )
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

/// `part` of `width` columns, between brackets.
fn bar(part: f64, width: usize) -> String {
    let full = (part.clamp(0.0, 1.0) * width as f64).round() as usize;
    format!("[{}{}]", "#".repeat(full), " ".repeat(width - full))
}

#[cfg(test)]
mod tests {
    use kvm_dirty_ring::Stats;

    use super::super::look::{Phase, Progress, Ring};
    use super::*;

    fn look(vcpus: usize, mode: Mode) -> Look {
        let mut stats = Stats::default();
        stats.vcpus.resize(vcpus, Default::default());
        for vcpu in &mut stats.vcpus {
            (vcpu.full_exits, vcpu.stall_ns) = (3, 1_500_000);
        }
        (stats.suspect_pages, stats.passes) = (12, 70);
        (stats.reaper.passes, stats.reaper.delay_ns) = (40, 2_500_000);
        (stats.resets, stats.entries) = (4, 10);
        Look {
            elapsed: Duration::from_millis(1234),
            progress: Progress {
                round: 2,
                pages: 2000,
                sent: 500,
                phase: Phase::Running,
            },
            mode,
            stats,
            rings: vec![
                Ring {
                    rate: 1234.5,
                    fill: 0.5
                };
                vcpus
            ],
        }
    }

    #[test]
    fn a_picture_shows_each_vcpu() {
        let wanted = "\
round 2, guest running [#####               ] 1,500 of 2,000 pages left
  vCPU    entries/s   full exits     stall ms  ring
     0        1,234            3         1.50  [##########          ]  50 %
     1        1,234            3         1.50  [##########          ]  50 %
   all        2,469            6         3.00
reaper: 40 passes, sleeps 2.50 ms, was 0.00 ms late
log: 70 passes, 4 resets of 2.5 entries
suspects: 12 pages";
        assert_eq!(picture(&look(2, Mode::Rings)), wanted);
    }

    #[test]
    fn a_picture_fits_into_a_terminal() {
        let picture = picture(&look(32, Mode::Rings));
        assert!(picture.contains("\nand 16 vCPUs more\n"), "{picture}");
        assert!(picture.lines().count() <= 24, "{picture}");
        assert!(picture.lines().all(|line| line.len() < 80), "{picture}");
    }

    #[test]
    fn what_was_drawn_is_taken_away() {
        let (text, drawn) = drawing(0, "one\ntwo\nthree", 24, 80);
        assert_eq!((text.as_str(), drawn), ("one\ntwo\nthree\n", 3));
        let (text, drawn) = drawing(3, "four\nfive", 24, 4);
        assert_eq!((text.as_str(), drawn), ("\x1b[3A\r\x1b[Jfou\nfiv\n", 2));
        let (text, drawn) = drawing(2, "six\nseven\neight", 3, 80);
        assert_eq!((text.as_str(), drawn), ("\x1b[2A\r\x1b[Jsix\nseven\n", 2));
        let (text, drawn) = drawing(2, "", 24, 80);
        assert_eq!((text.as_str(), drawn), ("\x1b[2A\r\x1b[J", 0));
        assert_eq!(drawing(0, "one", 0, 0), (String::new(), 0));
    }

    #[test]
    fn elsewhere_a_look_is_a_line() {
        let wanted = "watch: 1.2 s, round 2, guest running, 1,500 of 2,000 pages left, 2,469 \
                      entries/s, fullest ring 50 %, 6 full exits of 3.00 ms in all, 40 passes of \
                      the reaper, which sleeps 2.50 ms, 12 suspects";
        assert_eq!(line(&look(2, Mode::Rings)), wanted);
        let wanted = "watch: 1.2 s, round 2, guest running, 1,500 of 2,000 pages left, no rings, \
                      12 suspects";
        assert_eq!(line(&look(2, Mode::Bitmap)), wanted);
    }

    #[test]
    fn lines_come_more_and_more_rarely() {
        let mut view = View::Lines(Duration::ZERO);
        let (mut now, mut lines) = (Duration::ZERO, 0);
        while now < Duration::from_secs(3600) {
            now += view.interval();
            view = View::Lines(now);
            lines += 1;
        }
        assert!(lines < 400, "{lines}");
    }

    #[test]
    fn bars_stay_within_their_brackets() {
        for (part, wanted) in [
            (-1.0, "[    ]"),
            (0.5, "[##  ]"),
            (7.0, "[####]"),
            (f64::NAN, "[    ]"),
        ] {
            assert_eq!(bar(part, 4), wanted, "{part}");
        }
    }
}
