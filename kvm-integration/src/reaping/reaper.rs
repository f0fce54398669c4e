// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A reaper in either shape.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use kvm_dirty_ring::error::ReaperError;
use kvm_dirty_ring::pacing::Pacing;
use kvm_dirty_ring::{Priority, Reaper};

use super::Shape;
use super::full_exit::FullExits;
use super::qemu_reaper::{Counts, QemuReaper};
use crate::host::cpu_time::cpu_time;
use crate::host::storm::thread_named;

/// Reapers so far: each has a name of its own, by which its CPU time is found.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// The thread that empties rings before they are full. Dropping it stops it.
#[derive(Debug)]
pub(crate) struct Reaping {
    who: Who,
    tid: libc::pid_t,
}

#[derive(Debug)]
enum Who {
    Own(Reaper),
    Qemu(QemuReaper),
}

impl Reaping {
    /// Starts it on some of these CPUs, and has full exits served in its shape. In QEMU's shape
    /// no priority is asked for.
    pub(crate) fn start(
        full_exits: &Arc<FullExits>,
        shape: Shape,
        policy: Box<dyn Pacing>,
        priority: Priority,
        cpus: &[usize],
    ) -> Result<Self> {
        full_exits.set_shape(shape);
        let name = format!("reaper-{}", STARTED.fetch_add(1, Ordering::Relaxed));
        let who = match shape {
            Shape::OwnRing => {
                let reaper = Reaper::builder().name(&name).cpus(cpus.iter().copied());
                Who::Own(reaper.priority(priority).spawn(full_exits.log(), policy)?)
            }
            Shape::AllRings => Who::Qemu(QemuReaper::spawn(&name, full_exits, policy, cpus)?),
        };
        let tid = thread_named(&name).context("the reaper's thread can't be found")?;
        Ok(Self { who, tid })
    }

    pub(crate) fn counts(&self) -> Counts {
        match &self.who {
            Who::Own(reaper) => {
                let stats = reaper.stats();
                Counts {
                    wakeups: stats.looks,
                    passes: stats.passes,
                    pass_ns: stats.pass_ns,
                    delay_ns: stats.delay_ns,
                }
            }
            Who::Qemu(reaper) => reaper.counts(),
        }
    }

    /// CPU time that it has taken.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        cpu_time(self.tid)
    }

    /// What went wrong since somebody asked.
    pub(crate) fn take_error(&self) -> Option<ReaperError> {
        match &self.who {
            Who::Own(reaper) => reaper.take_error(),
            Who::Qemu(reaper) => reaper.take_error(),
        }
    }

    /// Whether it can't keep up with the guest.
    pub(crate) fn is_saturated(&self) -> bool {
        matches!(&self.who, Who::Own(reaper) if reaper.stats().saturated)
    }

    /// Stops it, after the pass under way.
    pub(crate) fn stop(self) -> Result<(), ReaperError> {
        match self.who {
            Who::Own(reaper) => reaper.stop(),
            Who::Qemu(reaper) => reaper.stop(),
        }
    }
}
