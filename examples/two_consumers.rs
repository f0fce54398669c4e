// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A backup of a running guest, beside its migration. The first sync after a write returns the page, and no later one: two threads
//! that sync would each miss what the other one takes. So one thread syncs, and merges what it finds into a set for each consumer, which
//! takes its set whenever it is ready for it.
//!
//! ```sh
//! cargo run --example two_consumers
//! ```
//!
//! `guest` simulates what is below a VMM; all else a VMM does the same way.

mod guest;

use std::error::Error;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use guest::{Exit, Guest, Link, Load, Vcpu};
use kvm_dirty_ring::error::{FullError, SyncError};
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{DirtyLog, DirtyPages, Reaper, SlotId, VcpuRing};

const RAM: SlotId = SlotId::new(0, 0);
const PAGES: u64 = 2048;

/// What each consumer has not taken yet.
struct FanOut {
    log: DirtyLog,
    consumers: Vec<Mutex<DirtyPages>>,
}

impl FanOut {
    fn new(log: &DirtyLog, consumers: usize) -> Self {
        Self {
            log: log.clone(),
            consumers: (0..consumers).map(|_| Mutex::default()).collect(),
        }
    }

    /// The only place that syncs. After an error the pages come with the next call.
    fn sync(&self, found: &mut DirtyPages) -> Result<(), SyncError> {
        self.log.sync(found)?;
        for consumer in &self.consumers {
            let mut set = consumer.lock().unwrap_or_else(PoisonError::into_inner);
            if !set.merge(found) {
                // Those that have it already will have it twice, which does no harm.
                self.log.put_back(found)?;
                return Err(SyncError::NoMemory);
            }
        }
        Ok(())
    }

    /// Exchanges the consumer's set for an empty one: all that it has not taken of the syncs up to now. What is written from here
    /// on comes with a later one, so these pages may be read. What the consumer fails to copy, it merges into its next set.
    fn take(&self, consumer: usize, pages: &mut DirtyPages) {
        pages.clear();
        let mut set = self.consumers[consumer]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut *set, pages);
    }

    /// Slots are gone: no consumer is to take pages of them for pages of another slot with that id.
    fn drop_removed(&self) {
        for consumer in &self.consumers {
            let mut set = consumer.lock().unwrap_or_else(PoisonError::into_inner);
            self.log.clear_removed(&mut set);
        }
    }
}

/// The consumers.
const MIGRATION: usize = 0;
const BACKUP: usize = 1;

fn main() -> Result<(), Box<dyn Error>> {
    let guest = Guest::new(1024, RAM, PAGES); // KVM_CREATE_VM
    let log = guest.dirty_log(); // DirtyLog::enable(&vm_fd, ...)
    log.add_slot(RAM, PAGES)?;
    log.mark_dirty(RAM, 0, PAGES)?; // Neither of them has anything yet.
    guest.create_slots(); // KVM_SET_USER_MEMORY_REGION
    let vcpu = guest.create_vcpu(Load::new(0, 500)); // KVM_CREATE_VCPU
    let ring = log.attach_ring(vcpu.vcpu.ring_memory())?; // log.attach_vcpu(&vcpu_fd)
    let vcpu = thread::spawn(move || run_vcpu(vcpu, ring));
    let reaper = Reaper::spawn(&log, Adaptive::default())?;

    let memory = guest.memory();
    let fan_out = FanOut::new(&log, 2);
    // The backup's disk is slower than the migration's link, and takes its time between two rounds.
    let (mut link, mut disk) = (Link::new(PAGES, 40), Link::new(PAGES, 10));
    let (mut found, mut pages) = (DirtyPages::new(), DirtyPages::new());
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut pages = DirtyPages::new();
            for round in 0..3 {
                fan_out.take(BACKUP, &mut pages);
                println!("backup, round {round}: {} pages", pages.page_count());
                disk.send(&memory, pages.runs());
                thread::sleep(Duration::from_millis(30));
            }
        });
        for round in 0..8 {
            fan_out.sync(&mut found)?;
            fan_out.take(MIGRATION, &mut pages);
            println!("migration, round {round}: {} pages", pages.page_count());
            link.send(&memory, pages.runs());
        }
        Ok::<_, SyncError>(())
    })?;

    // The guest stops. The last sync is for both.
    guest.kick(); // a signal to the vCPU's thread
    vcpu.join().expect("the vCPU's thread panicked")?;
    fan_out.sync(&mut found)?;
    for (consumer, to) in [(MIGRATION, &mut link), (BACKUP, &mut disk)] {
        fan_out.take(consumer, &mut pages);
        println!(
            "the last {} pages of consumer {consumer}",
            pages.page_count()
        );
        to.send(&memory, pages.runs());
    }
    reaper.stop()?;

    let original = memory.read(0, PAGES);
    assert!(link.destination == original, "the migration's copy differs");
    assert!(disk.destination == original, "the backup's copy differs");
    println!("both copies are equal to the original, byte by byte");

    // The memory is unplugged: no set may keep pages for the next slot of that id.
    log.mark_dirty(RAM, 0, 1)?;
    fan_out.sync(&mut found)?;
    let retired = log.retire_slot(RAM)?;
    guest.delete_slot(RAM); // KVM_SET_USER_MEMORY_REGION of no size
    log.finish_slot(&retired)?;
    fan_out.drop_removed();
    for consumer in [MIGRATION, BACKUP] {
        fan_out.take(consumer, &mut pages);
        assert_eq!(pages.page_count(), 0, "pages of a slot that is gone");
    }
    Ok(())
}

/// A vCPU's thread.
fn run_vcpu(mut vcpu: Vcpu, mut ring: VcpuRing) -> Result<(), FullError> {
    loop {
        // ioctl KVM_RUN
        match vcpu.run() {
            Exit::DirtyRingFull => ring.on_full()?,
            Exit::Kicked => return Ok(()),
        }
    }
}
