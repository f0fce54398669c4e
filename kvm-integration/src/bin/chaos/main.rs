// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Torments guests and their dirty logs, and looks whether a page gets lost:
//! `cargo run --release --bin chaos -- --help`.
//!
//! Exit status: 0 if all was well, 1 if a page was missed, or an entry taken for a wrong slot's, 2 for a
//! usage error or where an episode could not come to its end, 130 if interrupted.

mod child;
mod episodes;
mod options;
mod report;

use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use kvm_integration::cli::interrupt::go_on;
use kvm_integration::cli::output;
use kvm_integration::cli::progress::bar;
use kvm_integration::cli::watchdog::Watchdog;
use kvm_integration::storm::Storm;

use episodes::{Backend, Chaos};
use options::Options;
use report::Report;

/// What an episode takes at most, on a machine with much else to do: a second, as a rule.
const LONGEST: Duration = Duration::from_secs(120);

/// Failing episodes after which more would show nothing new.
const ENOUGH: u64 = 10;

fn main() -> ExitCode {
    let options = Options::parse();
    if !Storm::can_stop() {
        return child::run();
    }
    output::run(|interrupted| run(&options, interrupted))
}

fn run(options: &Options, interrupted: &AtomicBool) -> Result<ExitCode> {
    let (backend, why) = Backend::choose(options.backend, options.mode.into())?;
    options.teller.tell(&why)?;
    let chaos = Chaos::new(backend, options.seed);
    let mut report = Report::new(&chaos, options.seed);
    let watchdog = Watchdog::start()?;
    let bar = bar(None, "{spinner} {msg}");
    let start = Instant::now();
    for number in options.numbers() {
        let is_over = options.time().is_some_and(|time| start.elapsed() >= time);
        if is_over || go_on(interrupted).is_err() || report.failures() == ENOUGH {
            break;
        }
        let again = options.again(number);
        watchdog.allow(LONGEST, &format!("episode {number} ({again})"));
        let begin = Instant::now();
        let episode = chaos.episode(number);
        let episode = episode.with_context(|| format!("episode {number} did not end ({again})"))?;
        if let Some(complaint) = report.add(number, begin.elapsed(), &episode) {
            let seconds = start.elapsed().as_secs_f64();
            // Stays, on a terminal or not.
            bar.suspend(|| eprintln!("{seconds:.1} s: {complaint} ({again})"));
        }
        bar.set_message(report.progress(start.elapsed()));
        bar.tick();
    }
    drop(bar);
    report.end(&chaos, start.elapsed());
    options.teller.tell(&report.table())?;
    options.teller.end(&report)?;
    go_on(interrupted)?;
    Ok(output::status(report.failures()))
}
