// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A discrete-event simulation of rings, vCPUs and the reaper: the policies themselves, driven by
//! the crate's own pacer, in virtual time.
//!
//! It is for what real KVM on a small host can't show: hundreds of vCPUs, each with a core of its
//! own, and the same run again and again. It uses no clock, no thread and no chance: a
//! [`Scenario`] and an arm decide everything.
//!
//! What is modelled: vCPUs log at the rates of a [`Load`], and stop when their ring is full; full
//! exits and the reaper make passes that take the time that [`Costs`] says, as the crate makes
//! them (four at a time, no harvest beside a reset, resets that are shared) or as QEMU does (one
//! lock); the reaper wakes up late, looks, decides, and is woken by full exits, as the crate's does.
//! What is not: vCPUs that compete for cores with one another or with the reaper, other than by
//! the reaper's [`Lateness`] and loads that run in slices; what passes and faults do to one
//! another's caches and locks inside the kernel.

mod clock;
pub mod constants;
mod costs;
mod demand;
mod gate;
mod lateness;
mod load;
mod machine;
mod outcome;
mod queue;
mod reaper;
mod recording;
mod scenario;
mod sight;
#[cfg(test)]
mod tests;
mod vcpu;

use kvm_dirty_ring::pacing::Pacing;

pub use costs::{Costs, Guest};
pub use lateness::Lateness;
pub use load::Load;
pub use outcome::{FullExit, Outcome, RingTotals};
pub use recording::{MOST_VCPUS, Recording};
pub use scenario::Scenario;

use super::{Arm, Shape};
use machine::Machine;

/// What an arm makes of a scenario. Its reaper is as late as the scenario says, or, if it is a
/// `SCHED_FIFO` thread, as [`Lateness::FIFO`].
pub fn run(scenario: &Scenario, arm: &Arm) -> Outcome {
    let mut scenario = scenario.clone();
    if arm.fifo {
        scenario.lateness = Lateness::FIFO;
    }
    run_policy(&scenario, arm.shape, arm.policy.map(|policy| policy()))
}

/// What a policy makes of it; `None` for no reaper at all.
pub fn run_policy(scenario: &Scenario, shape: Shape, policy: Option<Box<dyn Pacing>>) -> Outcome {
    Machine::new(scenario, shape, policy).run()
}
