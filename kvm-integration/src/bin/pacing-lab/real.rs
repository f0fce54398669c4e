//! The run on real KVM.

use std::collections::BTreeSet;
use std::error::Error;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use kvm_integration::kvm_available;
use kvm_integration::lab::kvm::{KvmCell, LabError};
use kvm_integration::lab::{ArmResult, CellResult};

use crate::Report;
use crate::plan::Plan;
use crate::watchdog::Watchdog;

/// What setting up or taking down anything takes at most, on a machine with much else to do.
const LONGEST: Duration = Duration::from_secs(60);

/// Runs the plan, and reports cell by cell.
pub fn measure(
    plan: &Plan,
    interrupted: &AtomicBool,
    report: &mut Report<'_>,
) -> Result<(), Box<dyn Error>> {
    let kvm = kvm_available()?;
    let watchdog = Watchdog::start()?;
    let mut refused = BTreeSet::new();
    for (number, (cell, arms)) in plan.cells.iter().enumerate() {
        eprintln!("{}/{}: {cell}", number + 1, plan.cells.len());
        watchdog.allow(LONGEST, &cell.to_string());
        let mut running = KvmCell::start(&kvm, *cell, interrupted)?;
        let turn = running.turn(plan.slice);
        let mut results: Vec<_> = arms.iter().map(|arm| ArmResult::new(arm.name)).collect();
        for round in 0..plan.rounds {
            for place in 0..arms.len() {
                // No arm is always the one after the same other.
                let place = (place + round as usize) % arms.len();
                let (arm, result) = (&arms[place], &mut results[place]);
                if refused.contains(arm.name) {
                    continue;
                }
                let what = format!("{cell}, {}", arm.name);
                watchdog.allow(turn.warm_up + turn.measure + LONGEST, &what);
                match running.take_turn(arm, turn, false) {
                    Ok(outcome) => {
                        result.rounds.push(outcome.measured);
                        result.overruns += outcome.overruns;
                    }
                    Err(error @ LabError::Refused { .. }) => {
                        let cause = error.source().map(ToString::to_string);
                        eprintln!(
                            "SKIPPED {}: {error}: {}",
                            arm.name,
                            cause.unwrap_or_default()
                        );
                        refused.insert(arm.name);
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        watchdog.allow(LONGEST, &cell.to_string());
        drop(running);
        results.retain(|result| !result.rounds.is_empty());
        let arms = results;
        report(CellResult { cell: *cell, arms })?;
    }
    Ok(())
}
