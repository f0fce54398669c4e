// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The run on real KVM.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Result;
use kvm_dirty_ring::error::ReaperError;
use kvm_integration::cli::order::places;
use kvm_integration::cli::watchdog::Watchdog;
use kvm_integration::host::bystanders::Bystanders;
use kvm_integration::kvm_available;
use kvm_integration::lab::kvm::KvmCell;
use kvm_integration::lab::{Arm, ArmResult, Cell, CellResult};
use kvm_ioctls::Kvm;

use crate::plan::Plan;
use crate::run::{Report, Skipped};

/// What setting up or taking down anything takes at most, on a machine with much else to do.
const LONGEST: Duration = Duration::from_secs(60);

/// Runs the plan, and reports guest by guest. Arms that this machine refuses are skipped.
pub fn measure(
    plan: &Plan,
    interrupted: &AtomicBool,
    report: &mut Report<'_>,
) -> Result<Vec<Skipped>> {
    let kvm = kvm_available()?;
    let mut run = Run {
        plan,
        kvm,
        interrupted,
        watchdog: Watchdog::start()?,
        skipped: Vec::new(),
    };
    let start = Instant::now();
    let minutes = plan.duration().as_secs_f64() / 60.0;
    let guests = plan.cells.len();
    eprintln!("{guests} guests, at least {minutes:.1} minutes");
    for (number, (cell, arms)) in plan.cells.iter().enumerate() {
        let gone = start.elapsed().as_secs();
        eprintln!("{}/{guests}, {gone} s: {cell}", number + 1);
        report(run.cell(cell, arms)?)?;
    }
    Ok(run.skipped)
}

struct Run<'a> {
    plan: &'a Plan,
    kvm: Kvm,
    interrupted: &'a AtomicBool,
    watchdog: Watchdog,
    skipped: Vec<Skipped>,
}

impl Run<'_> {
    fn cell(&mut self, cell: &Cell, arms: &[Arm]) -> Result<CellResult> {
        self.watchdog.allow(LONGEST, &cell.to_string());
        let mut guest = KvmCell::start(&self.kvm, *cell, self.interrupted)?;
        let bystanders = Bystanders::watch();
        let mut results: Vec<_> = arms.iter().map(|arm| ArmResult::new(arm.name)).collect();
        let rounds = self.plan.rounds;
        for round in 0..rounds + u32::from(self.plan.drawn) {
            for place in places(arms.len(), round as usize) {
                let sampled = round == rounds;
                self.turn(cell, &mut guest, &arms[place], sampled, &mut results[place])?;
            }
        }
        self.watchdog.allow(LONGEST, &cell.to_string());
        drop(guest);
        results.retain(|result| !result.rounds.is_empty());
        Ok(CellResult {
            workload: cell.pattern.to_string(),
            vcpus: cell.vcpus,
            ring_entries: cell.ring_entries,
            arms: results,
            others: bystanders.and_then(|bystanders| bystanders.share()),
            reset_load: None,
        })
    }

    fn turn(
        &mut self,
        cell: &Cell,
        guest: &mut KvmCell<'_>,
        arm: &Arm,
        sampled: bool,
        result: &mut ArmResult,
    ) -> Result<()> {
        if self.skipped.iter().any(|skipped| skipped.arm == arm.name) {
            return Ok(());
        }
        let turn = guest.turn(arm, self.plan.slice);
        let what = format!("{cell}, {}", arm.name);
        self.watchdog.allow(turn.total() + LONGEST, &what);
        let outcome = match guest.take_turn(arm, turn, sampled) {
            Ok(outcome) => outcome,
            Err(error) if is_refused(&error) => {
                let why = format!("{error:#}");
                let skipped = Skipped { arm: arm.name, why };
                eprintln!("SKIPPED {}: {}", skipped.arm, skipped.why);
                self.skipped.push(skipped);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        match sampled {
            // Sampling takes a little of what is measured.
            true => result.samples = outcome.samples,
            false => result.rounds.push(outcome.measured),
        }
        result.overruns += outcome.overruns;
        result.saturated += u32::from(outcome.saturated);
        Ok(())
    }
}

/// Whether the operating system does not let the reaper run as the arm wants it.
fn is_refused(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref();
    matches!(error, Some(ReaperError::Scheduling { .. }))
}
