//! Holds a guest on real KVM to dirty limits, and shows how well they hold: `cargo run --release --bin dirty-limit -- --help`.
//!
//! Exit status: 0 if each limit held as well as was asked for, 1 if not, 2 for a usage error or
//! where something that is needed is missing, 130 if interrupted.

mod measure;
mod options;
mod report;

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Parser;
use kvm_integration::interrupt::watch_signals;
use kvm_integration::output::{exit_status, fail, say, say_aside};
use kvm_integration::watchdog::Watchdog;

use options::Options;
use report::Report;

fn main() -> ExitCode {
    let options = Options::parse();
    let interrupted = match watch_signals() {
        Ok(interrupted) => interrupted,
        Err(error) => return fail(&error),
    };
    exit_status(run(&options, &interrupted), &interrupted)
}

fn run(options: &Options, interrupted: &AtomicBool) -> Result<ExitCode, Box<dyn Error>> {
    // With --json nothing but the object is for stdout.
    let tell = if options.json { say_aside } else { say };
    let watchdog = Watchdog::start()?;
    let mut report = Report::new(options);
    tell(&report.head())?;
    for limit in options.limits() {
        // A guest that is not limited comes to its end at once, others when they are woken.
        let longest = Duration::from_secs(60 + 2 * options.seconds);
        watchdog.allow(longest, &format!("the guest with the limit {limit:?}"));
        let measured = measure::run(options, limit, interrupted)?;
        tell(&report.add(&measured))?;
    }
    if options.json {
        say(&report.json()?)?;
    }
    Ok(ExitCode::from(u8::from(!report.holds())))
}
