// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One migration, measured.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvm_dirty_ring::Mode;
use serde::Serialize;

use super::arm::Arm;
use super::{BANDWIDTH_MIB, DOWNTIME};
use crate::cli::interrupt::go_on;
use crate::guest::memory::{GuestMemory, PAGE_SIZE};
use crate::machine::{GuestSlot, Machine, Writes};
use crate::migration::{Destination, Limits, Outcome, Rings, migrate};

/// How long the guest runs before anything counts.
const WARM_UP: Duration = Duration::from_millis(700);
/// How long it is watched while it is not tracked.
const QUIET: Duration = Duration::from_millis(500);
/// Between two looks whether all is well.
const LOOK: Duration = Duration::from_millis(50);
/// No guest takes as many, unless it is steered wrongly.
const MAX_ROUNDS: u32 = 15;
/// Where in a page no vCPU writes, in bytes.
const NOBODYS: u64 = PAGE_SIZE - 8;

/// A guest to be migrated.
pub trait Subject: Machine {
    /// Starts or stops the log of all that it writes, while it runs.
    fn set_tracked(&mut self, tracked: bool) -> Result<()>;

    /// A tracker that knows what it has written, and empties its rings.
    fn tracker(&self) -> Result<Rings>;

    /// Page stores of those vCPUs that are [measured], and the CPU time that they took for these; `None` where
    /// the clock is the measure.
    fn progress(&self) -> Result<(u64, Option<Duration>)>;
}

/// Which vCPUs show whether the guest is slowed down: those that write as fast as they can, or else all.
pub fn measured(writes: &[Writes]) -> Vec<usize> {
    let all = 0..writes.len();
    let busy: Vec<usize> = all.clone().filter(|&at| writes[at].chunk() == 0).collect();
    match busy.is_empty() {
        true => all.collect(),
        false => busy,
    }
}

/// How a migration came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, strum::Display)]
#[strum(serialize_all = "lowercase")]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// What was left fitted into the downtime.
    Ends,
    /// It was seen that it never would.
    Hopeless,
    /// Neither, after all the rounds that it was given.
    Bounded,
}

/// What came of a migration.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Which arm.
    pub arm: &'static str,
    /// Stores against those of the time before, when nothing was tracked; by CPU time on KVM, but for guests that
    /// don't write as fast as they can.
    pub speed: f64,
    /// Rounds sent while the guest ran.
    pub rounds: u32,
    /// How often all that was open was closed.
    pub refreshes: u32,
    /// Entries harvested; of rings only.
    pub entries: Option<u64>,
    /// Pages that stayed open at the last sync with the guest running.
    pub members: u64,
    /// Pages sent, each as often as it was.
    pub pages_sent: u64,
    /// From the first sync until the last page was sent.
    pub seconds: f64,
    /// For how long the guest was stopped in the end.
    pub downtime_ms: f64,
    /// How it ended.
    pub end: End,
    /// Pages that differ in the end.
    pub missed_pages: u64,
}

/// Migrates `guest`, which runs.
///
/// # Errors
/// What failed; or, soon after `interrupted` became true, that.
pub fn measure(guest: &mut impl Subject, arm: &Arm, interrupted: &AtomicBool) -> Result<Figures> {
    guest.set_tracked(false)?;
    let no_memory = "no memory for the copy of the guest";
    let destination = Destination::new(guest.slots(), GuestMemory::new).context(no_memory)?;
    destination.poison();
    guest.slots().iter().for_each(fill);
    wait(guest, WARM_UP, interrupted)?;
    let (before, begin) = (guest.progress()?, guest.now());
    wait(guest, QUIET, interrupted)?;
    let untracked = pace(before, guest.progress()?, guest.now() - begin);
    ensure!(untracked > 0.0, "the guest writes nothing");

    guest.set_tracked(true)?;
    let mut tracker = guest.tracker()?;
    let (before, entries) = (guest.progress()?, guest.log().stats().entries);
    let limits = Limits {
        bandwidth_mib: BANDWIDTH_MIB,
        max_rounds: MAX_ROUNDS,
        downtime: DOWNTIME,
        converge: false,
        places: arm.places(),
        break_after: None,
    };
    let outcome = migrate(
        guest,
        &mut tracker,
        &destination,
        &limits,
        interrupted,
        &mut (),
    );
    let outcome = outcome.context("the migration failed")?;
    let tracked = pace(before, guest.progress()?, outcome.running());
    let entries = guest.log().stats().entries - entries;
    let last = outcome.rounds.iter().rfind(|round| round.running);
    Ok(Figures {
        arm: arm.name,
        speed: tracked / untracked,
        rounds: outcome.rounds.len() as u32 - 1,
        refreshes: outcome.refreshes,
        entries: (arm.mode == Mode::Rings).then_some(entries),
        members: last.map_or(0, |round| round.members),
        pages_sent: outcome.pages_sent(),
        seconds: outcome.total.as_secs_f64(),
        downtime_ms: outcome.downtime.as_secs_f64() * 1e3,
        end: end(&outcome),
        missed_pages: outcome.mismatched_pages,
    })
}

fn end(outcome: &Outcome) -> End {
    match outcome {
        Outcome {
            converged: true, ..
        } => End::Ends,
        Outcome {
            hopeless: Some(_), ..
        } => End::Hopeless,
        _ => End::Bounded,
    }
}

/// Pages that the guest does not write must be something, too, or nobody would see that one was not sent.
fn fill(slot: &GuestSlot) {
    for page in 0..slot.memory.pages() {
        slot.memory.write_u64(page * PAGE_SIZE + NOBODYS, page + 1);
    }
}

fn wait(guest: &mut impl Subject, time: Duration, interrupted: &AtomicBool) -> Result<()> {
    let end = guest.now() + time;
    loop {
        go_on(interrupted)?;
        guest.check()?;
        let now = guest.now();
        if now >= end {
            return Ok(());
        }
        guest.wait_until(end.min(now + LOOK));
    }
}

/// Stores a second, of CPU time or else of `time`.
fn pace(
    (before, cpu_before): (u64, Option<Duration>),
    (after, cpu_after): (u64, Option<Duration>),
    time: Duration,
) -> f64 {
    let cpu = cpu_before
        .zip(cpu_after)
        .map(|(before, after)| after - before);
    (after - before) as f64 / cpu.unwrap_or(time).as_secs_f64()
}
