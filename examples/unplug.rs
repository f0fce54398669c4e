// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that is unplugged during a migration. The thread that serves the operator's request must not remove the slot by itself: the
//! migration's thread may have pages of it in its sets, and read its memory. So it sends the request to the migration's thread,
//! which removes the slot between two rounds and answers; then the memory may be unmapped.
//!
//! ```sh
//! cargo run --example unplug
//! ```
//!
//! `guest` simulates what is below a VMM; all else a VMM does the same way.

mod guest;

use std::error::Error;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use guest::{Connection, Exit, Guest, Load, Memory, Vcpu};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{DirtyLog, DirtyPages, GuestMap, Reaper, SlotId, VcpuRing};

type Failure = Box<dyn Error + Send + Sync>;

const RAM_PAGES: u64 = 1500;
const DIMM: SlotId = SlotId::new(0, 1);
const DIMM_PAGES: u64 = 500;

/// "Remove this slot", and where to send the answer.
struct Unplug {
    slot: SlotId,
    done: Sender<()>,
}

/// What the migration's thread has.
struct Migration<'a> {
    log: &'a DirtyLog,
    guest: &'a Guest,
    /// Where the slots are.
    map: GuestMap,
    /// Found by a sync and not sent yet.
    found: DirtyPages,
    requests: Receiver<Unplug>,
}

impl Migration<'_> {
    /// The only place that syncs, and between its calls the only one that removes slots.
    fn round(&mut self, memory: &Memory, link: &Connection) -> Result<u64, Failure> {
        while let Ok(request) = self.requests.try_recv() {
            self.unplug(request)?;
        }
        self.log.sync(&mut self.found)?;
        let pages = self.found.page_count();
        for range in self.map.ranges(self.found.part(), 256)? {
            link.send(memory, &range);
        }
        Ok(pages)
    }

    /// The guest has given the memory up: what is in it goes nowhere.
    fn unplug(&mut self, request: Unplug) -> Result<(), Failure> {
        let retired = self.log.retire_slot(request.slot)?;
        self.guest.delete_slot(request.slot); // KVM_SET_USER_MEMORY_REGION, of no size
        self.log.finish_slot(&retired)?;
        // Another slot may have the id from now on, and these pages would be taken for its own.
        self.found.clear_slot(request.slot);
        let left = self.map.regions().iter().copied();
        self.map = GuestMap::new(left.filter(|region| region.slot != request.slot))?;
        // A requester that has gone does not mind.
        let _ = request.done.send(());
        Ok(())
    }
}

fn main() -> Result<(), Failure> {
    let map = guest::map([(0, 0, RAM_PAGES), (1, RAM_PAGES, DIMM_PAGES)]);
    let guest = Guest::with_map(1024, &map); // KVM_CREATE_VM
    let log = guest.dirty_log(); // DirtyLog::enable(&vm_fd, ...)
    for region in map.regions() {
        log.add_slot(region.slot, region.pages)?;
        log.mark_dirty(region.slot, 0, region.pages)?; // The destination has nothing yet.
    }
    guest.create_slots(); // KVM_SET_USER_MEMORY_REGION
    let vcpu = guest.create_vcpu(Load::new(0, RAM_PAGES / 2)); // KVM_CREATE_VCPU
    let ring = log.attach_ring(vcpu.vcpu.ring_memory())?; // log.attach_vcpu(&vcpu_fd)
    let vcpu = thread::spawn(move || run_vcpu(vcpu, ring));
    let reaper = Reaper::spawn(&log, Adaptive::default())?;

    let (requests, arrive) = mpsc::channel();
    let operator = thread::spawn(move || unplug_later(&requests));
    let (memory, copy) = (guest.memory(), Memory::of(&map).into());
    let link = Connection::new(&copy);
    let mut migration = Migration {
        log: &log,
        guest: &guest,
        map,
        found: DirtyPages::new(),
        requests: arrive,
    };
    for round in 0.. {
        let pages = migration.round(&memory, &link)?;
        let slots = migration.map.regions().len();
        println!("round {round}: {pages} pages of {slots} slots");
        if operator.is_finished() {
            break;
        }
    }
    operator.join().expect("the operator's thread panicked")?;

    guest.kick(); // a signal to the vCPU's thread
    vcpu.join().expect("the vCPU's thread panicked")?;
    let pages = migration.round(&memory, &link)?;
    println!("the last {pages} pages, with the guest stopped");
    reaper.stop()?;
    assert_eq!(migration.map.regions().len(), 1, "the slot is still there");
    assert!(copy.equals(&memory, &migration.map), "the copy differs");
    println!("the memory that is left is equal, byte by byte");

    // The id is free, for a DIMM of another size.
    log.add_slot(DIMM, 2 * DIMM_PAGES)?;
    log.sync(&mut migration.found)?;
    assert!(!migration.found.runs().any(|run| run.slot == DIMM));
    Ok(())
}

/// The thread that serves the VMM's interface. The guest has agreed to the unplug.
fn unplug_later(requests: &Sender<Unplug>) -> Result<(), Failure> {
    thread::sleep(Duration::from_millis(100));
    let (done, is_done) = mpsc::channel();
    requests.send(Unplug { slot: DIMM, done })?;
    is_done.recv()?;
    println!("the slot is gone: its memory may be unmapped"); // munmap
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
