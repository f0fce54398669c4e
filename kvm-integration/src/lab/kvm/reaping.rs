//! Who empties the rings while an arm has its turn.

use std::sync::Arc;

use kvm_dirty_ring::error::ReaperError;
use kvm_dirty_ring::{DirtyLog, Priority, Reaper};

use super::error::LabError;
use crate::lab::arm::Arm;
use crate::shape::Shape;
use crate::shape::full::FullExits;
use crate::shape::qemu::{Counts, QemuReaper};

/// The thread's name, by which its CPU time is found.
pub(super) const NAME: &str = "lab-reaper";

/// Low among the real-time priorities, and before every thread that is none.
const FIFO: Priority = Priority::Fifo(10);

/// An arm's reaper. Dropping it stops it.
#[derive(Debug)]
pub(super) enum Reaping {
    /// There is none.
    Nobody,
    /// The crate's.
    Own(Reaper),
    /// One of QEMU's shape.
    Qemu(QemuReaper),
}

impl Reaping {
    pub(super) fn start(
        arm: &Arm,
        log: &DirtyLog,
        full_exits: &Arc<FullExits>,
        cpus: &[usize],
    ) -> Result<Self, LabError> {
        full_exits.set_shape(arm.shape);
        let Some(policy) = arm.policy else {
            return Ok(Self::Nobody);
        };
        if arm.shape == Shape::AllRings {
            let reaper = QemuReaper::spawn(NAME, log, full_exits, policy(), cpus);
            return reaper
                .map(Self::Qemu)
                .map_err(LabError::os("starting a thread"));
        }
        let mut builder = Reaper::builder().name(NAME).cpus(cpus.iter().copied());
        if arm.fifo {
            builder = builder.priority(FIFO);
        }
        let arm = arm.name;
        builder
            .spawn(log, policy())
            .map(Self::Own)
            .map_err(|source| match source {
                source @ ReaperError::Scheduling { .. } => LabError::Refused { arm, source },
                source => LabError::Reaper { arm, source },
            })
    }

    pub(super) fn counts(&self) -> Counts {
        match self {
            Self::Nobody => Counts::default(),
            Self::Own(reaper) => {
                let stats = reaper.stats();
                Counts {
                    wakeups: stats.looks,
                    passes: stats.passes,
                    pass_ns: stats.pass_ns,
                    delay_ns: stats.delay_ns,
                }
            }
            Self::Qemu(reaper) => reaper.counts(),
        }
    }

    pub(super) fn take_error(&self) -> Option<ReaperError> {
        match self {
            Self::Nobody => None,
            Self::Own(reaper) => reaper.take_error(),
            Self::Qemu(reaper) => reaper.take_error(),
        }
    }

    /// Whether it can't keep up with the guest.
    pub(super) fn is_saturated(&self) -> bool {
        matches!(self, Self::Own(reaper) if reaper.stats().saturated)
    }
}
