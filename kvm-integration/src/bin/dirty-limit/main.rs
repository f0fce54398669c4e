// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Holds a guest on real KVM to dirty limits, and shows how well they hold: `cargo run --release --bin dirty-limit -- --help`.
//!
//! Exit status: 0 if each limit held as well as was asked for, 1 if not, 2 for a usage error or
//! where something that is needed is missing, 130 if interrupted.

mod measure;
mod options;
mod report;

use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use kvm_integration::cli::output;
use kvm_integration::cli::watchdog::Watchdog;

use options::Options;
use report::Report;

fn main() -> ExitCode {
    let options = Options::parse();
    output::run(|interrupted| run(&options, interrupted))
}

fn run(options: &Options, interrupted: &AtomicBool) -> Result<ExitCode> {
    let watchdog = Watchdog::start()?;
    let mut report = Report::new(options);
    options.teller.tell(&report.head())?;
    for limit in options.limits() {
        // A guest that is not limited comes to its end at once, others when they are woken.
        let longest = Duration::from_secs(60 + 2 * options.seconds);
        watchdog.allow(longest, &format!("the guest with the limit {limit:?}"));
        let measured = measure::run(options, limit, interrupted)?;
        options.teller.tell(&report.add(&measured))?;
    }
    options.teller.end(&report)?;
    Ok(ExitCode::from(u8::from(!report.holds)))
}
