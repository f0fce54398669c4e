// SPDX-License-Identifier: Apache-2.0 OR MIT
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

use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Parser;
use kvm_dirty_ring::error::LimitError;
use kvm_dirty_ring::{Limiter, Mode};
use kvm_integration::GuestMemory;
use kvm_integration::cli::output;
use kvm_integration::migration::{Destination, Limits, Observer, Outcome, Rings, migrate};

use backend::Backend;
use options::Options;
use progress::Bars;
use report::Report;
use watch::Watch;

fn main() -> ExitCode {
    let options = Options::parse();
    output::run(|interrupted| {
        let outcome = run(&options, interrupted)?;
        Ok(output::status(outcome.mismatched_pages))
    })
}

fn run(options: &Options, interrupted: &AtomicBool) -> Result<Outcome> {
    options.check_memory()?;
    let (backend, why) = Backend::choose(options.backend)?;
    options.teller.tell(&why)?;
    let mut machine = backend.start(&options.setup())?;
    let limits = Limits {
        bandwidth_mib: options.bandwidth_mib,
        max_rounds: options.max_rounds,
        downtime: Duration::from_millis(options.downtime_ms),
        converge: options.converge,
        places: options.working_set,
        break_after: options.break_after,
    };
    let destination = Destination::new(machine.slots(), GuestMemory::new)?;
    let log = machine.log().clone();
    options.teller.tell(&backend.tell_mode(log.mode()))?;
    let mut rings = Rings::start(&log, options.pacing.make())?;
    let limiter = match options.converge {
        true if log.mode() == Mode::Bitmap => bail!(LimitError::Bitmap),
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

    let report = Report {
        options,
        backend: backend.name(),
        mode: log.mode(),
        stats: log.stats(),
        outcome: &outcome,
    };
    options.teller.tell(&report.table())?;
    options.teller.end(&report.json())?;
    Ok(outcome)
}
