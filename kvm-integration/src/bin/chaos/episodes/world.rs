// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an episode needs of the backend that runs the guest.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use kvm_dirty_ring::sim::ResetFault;
use kvm_dirty_ring::{DirtyLog, SlotId};

use super::fault::Counts;
use super::ledger::Instance;
use super::plan::Kind;

/// Entries of a vCPU's list at the most.
pub const LONGEST_LIST: usize = 1 << 14;

/// What their number is a multiple of: the stores of an emulated guest between two exits, few enough
/// for KVM to look for a full ring in time.
pub const CHUNK: u32 = 32;

/// Time between two tries of a vCPU whose broken ring can't be emptied any more.
pub(super) const STAYS_OUT: Duration = Duration::from_millis(1);

/// A machine that is being tormented.
pub trait World {
    /// Its log.
    fn log(&self) -> &DirtyLog;

    /// Gives it a slot, all pages protected. It is in the log already.
    fn add_slot(&self, slot: &Arc<Instance>) -> Result<()>;

    /// Takes a slot away. No vCPU that stores to it may run, nor may resets be written in.
    fn remove_slot(&self, id: SlotId) -> Result<()>;

    /// Protects all pages of a slot anew. No vCPU may run.
    fn rearm_slot(&self, id: SlotId) -> Result<()>;

    /// Makes a vCPU, attaches its ring, and lets it run.
    fn start_vcpu(&self, job: Job) -> Result<Box<dyn Vcpu>>;

    /// Lets a reset go wrong, if that can be had.
    fn inject(&self, fault: ResetFault) -> Result<()>;

    /// Lets the guest write inside resets, or no longer: none does once this has returned.
    fn write_in_resets(&self, on: bool) {
        let _ = on;
    }
}

/// What a vCPU is to do.
pub struct Job {
    pub index: u32,
    pub kind: Kind,
    /// The addresses of the pages to store to, over and over.
    pub list: Vec<u64>,
    /// One full exit in so many, the first among them, ends its pass between harvest and reset; 0: none. On slow hosts there
    /// is hardly a second.
    pub abandons: u64,
    pub counts: Arc<Counts>,
}

/// A running vCPU. Dropping it stops it.
pub trait Vcpu {
    /// Asks it to leave the guest.
    fn request_pause(&self);

    /// Waits until it has; false if it has ended instead.
    fn wait_paused(&self) -> bool;

    /// Lets it run again.
    fn resume(&self);

    /// The thread's id in the kernel.
    fn tid(&self) -> libc::pid_t;

    /// Stops it for good, and closes it.
    fn stop(self: Box<Self>) -> Result<()>;

    /// Makes its next entry name a page that is none; false if that can't be had.
    fn garble_next(&self, pick: u64) -> bool {
        let _ = pick;
        false
    }
}
