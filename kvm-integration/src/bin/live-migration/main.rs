//! Migrates a live guest from one piece of memory to another, by way of its dirty rings, and
//! proves that nothing got lost: `live-migration --help`.
//!
//! Exit status: 0 if both sides are equal, 1 if not, 2 for a usage error or where something that
//! is needed is missing, 130 if interrupted.

mod backend;
mod options;
mod progress;
mod report;

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use kvm_integration::interrupt::{INTERRUPTED, watch_signals};
use kvm_integration::migration::{Destination, Limits, MigrationError, Outcome, Rings, migrate};

use options::Options;
use progress::Bars;
use report::Report;

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(outcome) => ExitCode::from(status(outcome.mismatched_pages)),
        Err(error) => {
            if let Some(MigrationError::Interrupted) = error.downcast_ref() {
                eprintln!("interrupted");
                return ExitCode::from(INTERRUPTED);
            }
            eprint!("error: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::from(2)
        }
    }
}

/// Nobody may take silence for success.
#[derive(Debug, thiserror::Error)]
#[error("the result could not be written: see where the output goes")]
struct Unwritten(#[source] io::Error);

/// The exit status of a migration that came to its end.
fn status(mismatched_pages: u64) -> u8 {
    u8::from(mismatched_pages > 0)
}

fn run(options: &Options) -> Result<Outcome, Box<dyn Error>> {
    let interrupted = watch_signals()?;
    options.check_memory()?;
    let (backend, why) = backend::choose(options.backend)?;
    // With --json nothing but the object is for stdout.
    let say = |text: &str| match options.json {
        true => writeln!(io::stderr(), "{text}").map_err(Unwritten),
        false => writeln!(io::stdout(), "{text}").map_err(Unwritten),
    };
    say(&why)?;
    let setup = options.setup();
    let mut machine = backend.start(&setup)?;
    let limits = Limits {
        bandwidth_mib: options.bandwidth_mib,
        max_rounds: options.max_rounds,
        downtime: Duration::from_millis(options.downtime_ms),
    };
    let destination = Destination::new(machine.slots())?;
    let log = machine.log().clone();
    let mut rings = Rings::start(&log, options.pacing.make())?;
    let mut bars = Bars::default();
    let outcome = migrate(
        &mut *machine,
        &mut rings,
        &destination,
        &limits,
        &interrupted,
        &mut bars,
    )?;
    drop(bars);
    drop(machine);

    let report = Report::new(options, backend.name(), &outcome, &log.stats());
    say(&report.table(&outcome))?;
    if options.json {
        writeln!(io::stdout(), "{}", report.json()?).map_err(Unwritten)?;
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
