//! Compares pacing policies side by side: `pacing-lab --help`.
//!
//! Exit status: 0 if it ran, 2 for a usage error or where something that is needed is missing, 130
//! if interrupted.

mod options;
mod plan;
#[cfg(target_arch = "x86_64")]
mod real;
mod table;
#[cfg(target_arch = "x86_64")]
mod watchdog;

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;
use kvm_integration::Host;
use kvm_integration::lab::CellResult;
use signal_hook::consts::{SIGINT, SIGTERM};

use options::Options;

/// As a shell reports the end by SIGINT.
const INTERRUPTED: u8 = 130;

/// Nobody may take silence for success.
#[derive(Debug, thiserror::Error)]
#[error("the result could not be written: see where the output goes")]
struct Unwritten(#[source] io::Error);

fn main() -> ExitCode {
    let options = Options::parse();
    let interrupted = match watch_signals() {
        Ok(interrupted) => interrupted,
        Err(error) => return fail(&error),
    };
    match run(&options, &interrupted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupted.load(Ordering::Relaxed) => {
            eprintln!("interrupted");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => fail(&*error),
    }
}

fn fail(error: &dyn Error) -> ExitCode {
    eprint!("error: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprint!(": {error}");
        cause = error.source();
    }
    eprintln!();
    ExitCode::from(2)
}

fn run(options: &Options, interrupted: &AtomicBool) -> Result<(), Box<dyn Error>> {
    let plan = plan::Plan::new(options);
    say(&format!("{}\n", Host::detect()))?;
    let mut results = Vec::new();
    let mut report = |result: CellResult| {
        let text = table::table(&result);
        results.push(result);
        say(&text)
    };
    measure(&plan, interrupted, &mut report)
}

fn say(text: &str) -> Result<(), Unwritten> {
    writeln!(io::stdout(), "{text}").map_err(Unwritten)
}

type Report<'a> = dyn FnMut(CellResult) -> Result<(), Unwritten> + 'a;

#[cfg(target_arch = "x86_64")]
fn measure(
    plan: &plan::Plan,
    interrupted: &AtomicBool,
    report: &mut Report<'_>,
) -> Result<(), Box<dyn Error>> {
    real::measure(plan, interrupted, report)
}

#[cfg(not(target_arch = "x86_64"))]
fn measure(_: &plan::Plan, _: &AtomicBool, _: &mut Report<'_>) -> Result<(), Box<dyn Error>> {
    Err("the guest is x86-64 code and this machine is not".into())
}

/// A flag that SIGINT or SIGTERM sets.
fn watch_signals() -> io::Result<Arc<AtomicBool>> {
    let interrupted = Arc::<AtomicBool>::default();
    for signal in [SIGINT, SIGTERM] {
        // In this order: only a second signal finds the flag set, and ends the program at once.
        let flag = || Arc::clone(&interrupted);
        signal_hook::flag::register_conditional_shutdown(signal, INTERRUPTED.into(), flag())?;
        signal_hook::flag::register(signal, flag())?;
    }
    Ok(interrupted)
}
