// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `--migrations`: what a working set brings to whole migrations.

mod report;
mod result;
mod table;
mod targets;
#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use anyhow::{Error, Result};
use kvm_integration::Host;
use kvm_integration::cli::options::or;
use kvm_integration::cli::order::places;
use kvm_integration::cli::output::{self, Output, say};
use kvm_integration::lab::migrations::{Arm, Figures, Load, sim};
use strum::VariantArray;

use crate::options::Options;
use crate::table::{summary, verdicts};
use result::{GuestResult, Results};

/// What a quick run does.
const QUICK: [Load; 2] = [Load::HotSet, Load::Sweeps];

/// Runs what is asked for, and says what came of it. The exit status: 1 if a page was missed.
pub fn run(options: &Options, interrupted: &AtomicBool) -> Result<ExitCode> {
    let json = options.json.as_deref().map(Output::to).transpose()?;
    let loads = loads(options)?;
    let host = Host::detect();
    let results = match options.sim {
        true => {
            say("simulated, in virtual time\n")?;
            simulate(&loads, interrupted)?
        }
        false => {
            say(&format!("{host}\n"))?;
            measure(&loads, options.quick, interrupted)?
        }
    };
    say(&table::figures(&results.guests).to_string())?;
    say(&table::remarks(&results))?;
    let judged = targets::verdicts(&results);
    say(&format!("### {}\n", summary(&judged, &[])))?;
    say(&verdicts(&judged).to_string())?;
    if let Some(json) = json {
        let report = report::json(options.sim, &host, &results, &judged);
        json.write(&format!("{report:#}\n"))?;
    }
    Ok(output::status(results.missed_pages()))
}

fn loads(options: &Options) -> Result<Vec<Load>> {
    let named = options.workloads.iter();
    let named = named.map(|name| name.parse().map_err(Error::msg));
    let default = if options.quick {
        &QUICK[..]
    } else {
        Load::VARIANTS
    };
    Ok(or(&named.collect::<Result<Vec<Load>>>()?, default))
}

/// Migrates each guest by each arm, which take turns in changing order.
fn migrate(
    loads: &[Load],
    mut migrate: impl FnMut(Load, &Arm) -> Result<Figures>,
) -> Result<Vec<GuestResult>> {
    let guest = |(number, &load): (usize, &Load)| {
        let mut arms = [const { None }; Arm::ALL.len()];
        for place in places(Arm::ALL.len(), number) {
            let arm = &Arm::ALL[place];
            eprintln!("{}/{}: {load}, {}", number + 1, loads.len(), arm.name);
            arms[place] = Some(migrate(load, arm)?);
        }
        let arms = arms.into_iter().flatten().collect();
        Ok(GuestResult { load, arms })
    };
    loads.iter().enumerate().map(guest).collect()
}

fn simulate(loads: &[Load], interrupted: &AtomicBool) -> Result<Results> {
    let run = |load, arm: &Arm| sim::run(load, arm, interrupted);
    let guests = migrate(loads, run)?;
    Ok(Results {
        guests,
        ..Results::default()
    })
}

#[cfg(tiny_guest)]
fn measure(loads: &[Load], quick: bool, interrupted: &AtomicBool) -> Result<Results> {
    use std::time::Duration;

    use kvm_dirty_ring::RingEntries;
    use kvm_integration::cli::watchdog::Watchdog;
    use kvm_integration::host::bystanders::Bystanders;
    use kvm_integration::kvm_available;
    use kvm_integration::lab::migrations::kvm::{last_sync, run};

    /// What a migration takes at most, on a machine with much else to do.
    const LONGEST: Duration = Duration::from_secs(120);
    let kvm = kvm_available()?;
    let watchdog = Watchdog::start()?;
    let bystanders = Bystanders::watch();
    let guests = migrate(loads, |load, arm| {
        watchdog.allow(LONGEST, &format!("{load}, {}", arm.name));
        run(&kvm, load, arm, interrupted)
    })?;
    watchdog.allow(LONGEST, "the last sync");
    let last_sync = || last_sync(&kvm, 8, RingEntries::new(65_536)?, interrupted);
    Ok(Results {
        guests,
        last_sync: (!quick).then(last_sync).transpose()?,
        others: bystanders.and_then(|bystanders| bystanders.share()),
    })
}

#[cfg(not(tiny_guest))]
fn measure(_: &[Load], _: bool, _: &AtomicBool) -> Result<Results> {
    anyhow::bail!("{}: choose --sim", kvm_integration::host::NO_GUEST)
}
