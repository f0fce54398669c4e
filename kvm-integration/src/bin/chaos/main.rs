//! Torments guests and their dirty logs, and looks whether a page gets lost:
//! `cargo run --release --bin chaos -- --help`.
//!
//! Exit status: 0 if all was well, 1 if a page was missed, or an entry taken for a wrong slot's, 2 for a
//! usage error or where an episode could not come to its end, 130 if interrupted.

mod backend;
mod child;
mod options;
mod progress;
mod report;

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use kvm_integration::chaos::{Chaos, ChaosError};
use kvm_integration::interrupt::watch_signals;
use kvm_integration::output::{exit_status, fail, say, say_aside};
use kvm_integration::storm::Storm;
use kvm_integration::watchdog::Watchdog;

use options::Options;
use progress::Bar;
use report::Report;

/// What an episode takes at most, on a machine with much else to do: a second, as a rule.
const LONGEST: Duration = Duration::from_secs(120);

/// Failing episodes after which more would tell nothing new.
const ENOUGH: usize = 10;

fn main() -> ExitCode {
    let options = Options::parse();
    if !Storm::can_stop() {
        return child::run();
    }
    let interrupted = match watch_signals() {
        Ok(interrupted) => interrupted,
        Err(error) => return fail(&error),
    };
    exit_status(run(&options, &interrupted), &interrupted)
}

/// An episode could not come to its end.
#[derive(Debug, thiserror::Error)]
#[error("episode {number} did not end ({})", options.again(*number))]
struct Unended {
    number: u64,
    options: Options,
    source: ChaosError,
}

fn run(options: &Options, interrupted: &AtomicBool) -> Result<ExitCode, Box<dyn Error>> {
    let (backend, why) = backend::choose(options.backend)?;
    // With --json nothing but the object is for stdout.
    let tell = if options.json { say_aside } else { say };
    tell(&why)?;
    let chaos = Chaos::new(backend, options.seed);
    let mut report = Report::new(&chaos, options.seed);
    let watchdog = Watchdog::start()?;
    let bar = Bar::new();
    let start = Instant::now();
    for number in options.numbers() {
        let is_over = options.time().is_some_and(|time| start.elapsed() >= time);
        // Relaxed: nothing comes with it.
        if is_over || interrupted.load(Ordering::Relaxed) || report.failures() == ENOUGH {
            break;
        }
        let again = options.again(number);
        watchdog.allow(LONGEST, &format!("episode {number} ({again})"));
        let begin = Instant::now();
        let episode = chaos.episode(number).map_err(|source| Unended {
            number,
            options: options.clone(),
            source,
        })?;
        if let Some(complaint) = report.add(number, begin.elapsed(), &episode) {
            let seconds = start.elapsed().as_secs_f64();
            bar.above(&format!("{seconds:.1} s: {complaint} ({again})"));
        }
        bar.show(start.elapsed(), &report);
    }
    drop(bar);
    report.end(&chaos, start.elapsed());
    tell(&report.table())?;
    if options.json {
        say(&report.json()?)?;
    }
    if interrupted.load(Ordering::Relaxed) {
        return Err("interrupted".into());
    }
    Ok(ExitCode::from(u8::from(!report.is_well())))
}
