//! Migrates a live guest from one piece of memory to another, by way of its dirty rings, and
//! proves that nothing got lost: `cargo run --release --bin live-migration -- --help`.
//!
//! Exit status: 0 if both sides are equal, 1 if not, 2 for a usage error or where something that
//! is needed is missing, 130 if interrupted.

mod backend;
mod options;
mod progress;
mod report;
mod watch;

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Parser;
use kvm_dirty_ring::error::LimitError;
use kvm_dirty_ring::{Limiter, Mode};
use kvm_integration::interrupt::watch_signals;
use kvm_integration::migration::{Destination, Limits, Observer, Outcome, Rings, migrate};
use kvm_integration::output::{exit_status, fail, say, say_aside};

use options::Options;
use progress::Bars;
use report::Report;
use watch::Watch;

fn main() -> ExitCode {
    let options = Options::parse();
    let interrupted = match watch_signals() {
        Ok(interrupted) => interrupted,
        Err(error) => return fail(&error),
    };
    let result = run(&options, &interrupted);
    let status = result.map(|outcome| ExitCode::from(status(outcome.mismatched_pages)));
    exit_status(status, &interrupted)
}

/// The exit status of a migration that came to its end.
fn status(mismatched_pages: u64) -> u8 {
    u8::from(mismatched_pages > 0)
}

fn run(options: &Options, interrupted: &AtomicBool) -> Result<Outcome, Box<dyn Error>> {
    options.check_memory()?;
    let (backend, why) = backend::choose(options.backend)?;
    // With --json nothing but the object is for stdout.
    let tell = if options.json { say_aside } else { say };
    tell(&why)?;
    let setup = options.setup();
    let mut machine = backend.start(&setup)?;
    let limits = Limits {
        bandwidth_mib: options.bandwidth_mib,
        max_rounds: options.max_rounds,
        downtime: Duration::from_millis(options.downtime_ms),
        converge: options.converge,
    };
    let destination = Destination::new(machine.slots())?;
    let log = machine.log().clone();
    tell(&backend.tell_mode(log.mode()))?;
    let mut rings = Rings::start(&log, options.pacing.make())?;
    let limiter = match options.converge {
        true if log.mode() == Mode::Bitmap => return Err(LimitError::Bitmap.into()),
        true => Some(Limiter::spawn(&log, machine.kick())?),
        false => None,
    };
    let mut observer: Box<dyn Observer> = match options.watch {
        true => Box::new(Watch::start(&log)?),
        false => Box::new(Bars::default()),
    };
    let outcome = migrate(
        &mut *machine,
        &mut rings,
        &destination,
        &limits,
        interrupted,
        &mut *observer,
    )?;
    drop(observer);
    drop(machine);
    limiter.map_or(Ok(()), Limiter::stop)?;

    let report = Report::new(options, backend.name(), &outcome, &log);
    tell(&report.table(&outcome))?;
    if options.json {
        say(&report.json()?)?;
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_page_that_differs_is_a_failure() {
        assert_eq!([0, 1, 256, u64::MAX].map(status), [0, 1, 1, 1]);
    }
}
