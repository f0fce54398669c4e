// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The run itself.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Result;
use kvm_integration::cli::order::places;
use kvm_integration::cli::progress::bar;
use kvm_integration::cli::watchdog::Watchdog;
use kvm_integration::guestperf::kvm::KvmCell;
use kvm_integration::guestperf::{ArmResult, Cell, CellResult};
use kvm_integration::host::bystanders::Bystanders;
use kvm_integration::kvm_available;
use kvm_ioctls::Kvm;

use crate::plan::Plan;

/// What anything takes on top of what it should, on a machine with much else to do: so much, and
/// more for guests so large.
const SLACK: Duration = Duration::from_secs(90);
const SLACK_OF_A_MIB: Duration = Duration::from_millis(20);

const LOOK: &str = "[{bar:40}] {pos:>3} / {len} migrations, {eta} left: {msg}";

/// Takes in what came of a guest.
pub type Report<'a> = dyn FnMut(CellResult) -> Result<()> + 'a;

/// Runs the plan, and reports guest by guest.
pub fn measure(plan: &Plan, interrupted: &AtomicBool, report: &mut Report<'_>) -> Result<()> {
    // Now, not after hours.
    for cell in &plan.cells {
        KvmCell::check_memory(cell)?;
    }
    let run = Run {
        plan,
        kvm: kvm_available()?,
        interrupted,
        watchdog: Watchdog::start()?,
    };
    let minutes = plan.duration().as_secs_f64() / 60.0;
    let guests = plan.cells.len();
    eprintln!("{guests} guests, {minutes:.1} minutes or less");
    for (number, cell) in (1..).zip(&plan.cells) {
        eprintln!("{number}/{guests}: {cell}");
        report(run.cell(cell)?)?;
    }
    Ok(())
}

struct Run<'a> {
    plan: &'a Plan,
    kvm: Kvm,
    interrupted: &'a AtomicBool,
    watchdog: Watchdog,
}

impl Run<'_> {
    fn cell(&self, cell: &Cell) -> Result<CellResult> {
        let Plan { arms, repeat, .. } = self.plan;
        let slack = SLACK + SLACK_OF_A_MIB * cell.memory_mib as u32;
        self.watchdog.allow(slack, &cell.to_string());
        let mut guest = KvmCell::new(&self.kvm, cell, self.interrupted)?;
        let bystanders = Bystanders::watch();
        let bar = bar(Some(u64::from(*repeat) * arms.len() as u64), LOOK);
        let mut results: Vec<_> = arms
            .iter()
            .map(|arm| ArmResult {
                arm: arm.name,
                migrations: Vec::new(),
            })
            .collect();
        for round in 0..*repeat as usize {
            for place in places(arms.len(), round) {
                let arm = &arms[place];
                bar.set_message(arm.name);
                let longest = self.plan.longest(cell) + slack;
                self.watchdog
                    .allow(longest, &format!("{cell}, {}", arm.name));
                let migration = guest.migrate(arm, self.plan.quiet, &self.plan.limits)?;
                results[place].migrations.push(migration);
                bar.inc(1);
            }
        }
        drop(bar);
        self.watchdog.allow(slack, &cell.to_string());
        drop(guest);
        Ok(CellResult {
            cell: *cell,
            others: bystanders.and_then(|bystanders| bystanders.share()),
            arms: results,
        })
    }
}
