// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A live migration as a VMM with several connections makes it: rounds of guest-address ranges, which sender threads take from
//! one iterator; a device with a log of its own, by guest address, as those of vhost and VFIO; `Convergence` says when to stop.
//!
//! - Ranges go across slots that adjoin in the guest: the other side need not have the same slots.
//! - A device's log is fetched *before* each sync, and once more when the device has stopped.
//! - What a message costs beside its pages counts: many short ranges are sent slower than the same pages in one.
//!
//! ```sh
//! cargo run --example migration_service
//! ```
//!
//! `guest` simulates what is below a VMM; all else a VMM does the same way.

mod guest;

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use guest::{Connection, Exit, Guest, Load, Memory, Vcpu, page_size};
use kvm_dirty_ring::convergence::{Convergence, Decision, Extent, Observation, Terms};
use kvm_dirty_ring::error::{FullError, GuestMapError, SlotError};
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{
    DirtyLog, DirtyPages, DirtyPart, GuestMap, LastPages, Reaper, VcpuRing, WorkingSet,
};

/// The most pages of one message.
const AT_ONCE: u64 = 256;
/// For so long the guest may be stopped.
const DOWNTIME: Duration = Duration::from_millis(50);
/// After so many rounds it is stopped, whatever is left.
const MOST_ROUNDS: u32 = 30;
/// Bytes of a page in the device's log, whatever the host's are.
const DEVICE_PAGE: u64 = 4096;

/// A device that writes guest memory by itself, and logs where.
struct Device {
    log: Vec<AtomicU64>,
    stop: AtomicBool,
}

impl Device {
    fn run(&self, memory: &Memory, first_page: u64) {
        for number in 1.. {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let page = first_page + number * 7 % 300;
            memory.write(page, number);
            let logged = page * page_size() as u64 / DEVICE_PAGE;
            // Release: the thread that reads the bit also sees what was written.
            self.log[logged as usize / 64].fetch_or(1 << (logged % 64), Ordering::Release);
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Marks what the device has written since the last time.
    fn mark(&self, log: &DirtyLog, map: &GuestMap) -> Result<(), SlotError> {
        // Acquire: pairs with the release above.
        let words = self.log.iter().map(|word| word.swap(0, Ordering::Acquire));
        let words: Vec<_> = words.collect();
        let nowhere = log.mark_guest_words(map, 0, DEVICE_PAGE, &words)?;
        assert_eq!(nowhere, 0, "the device wrote where no memory is");
        Ok(())
    }
}

/// What sends a round.
struct Sender {
    map: GuestMap,
    memory: Arc<Memory>,
    connections: Vec<Connection>,
}

impl Sender {
    /// How much it is: a run for each message.
    fn extent(&self, part: DirtyPart<'_>) -> Result<Extent, GuestMapError> {
        let pages = part.page_count();
        let runs = self.map.ranges(part, AT_ONCE)?.count() as u64;
        Ok(Extent { pages, runs })
    }

    /// Sends the part, by all connections at once. How long it took.
    fn send(&self, part: DirtyPart<'_>) -> Result<Duration, GuestMapError> {
        let start = Instant::now();
        let ranges = Mutex::new(self.map.ranges(part, AT_ONCE)?);
        let next = || ranges.lock().unwrap().next();
        thread::scope(|scope| {
            for connection in &self.connections {
                scope.spawn(|| {
                    while let Some(range) = next() {
                        connection.send(&self.memory, &range);
                    }
                });
            }
        });
        Ok(start.elapsed())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // Two slots that adjoin, and one behind a hole.
    let map = guest::map([(0, 0, 1000), (1, 1000, 1000), (2, 4096, 500)]);
    let guest = Guest::with_map(1024, &map); // KVM_CREATE_VM
    let log = guest.dirty_log(); // DirtyLog::enable(&vm_fd, ...)
    for region in map.regions() {
        log.add_slot(region.slot, region.pages)?;
        // The other side has nothing yet. A VMM that calls `start_tracking` here has it all marked by that.
        log.mark_dirty(region.slot, 0, region.pages)?;
    }
    guest.create_slots(); // KVM_SET_USER_MEMORY_REGION

    let mut vcpus = Vec::new();
    for first_page in [0, 900] {
        let mut load = Load::new(first_page, 600);
        load.rest = Duration::from_millis(10);
        let vcpu = guest.create_vcpu(load); // KVM_CREATE_VCPU
        let ring = log.attach_ring(vcpu.vcpu.ring_memory())?; // log.attach_vcpu(&vcpu_fd)
        vcpus.push(thread::spawn(move || run_vcpu(vcpu, ring)));
    }
    let memory = guest.memory();
    let words = memory.pages() * page_size() as u64 / DEVICE_PAGE / 64 + 1;
    let device = Arc::new(Device {
        log: (0..words).map(|_| AtomicU64::new(0)).collect(),
        stop: AtomicBool::new(false),
    });
    let device_thread = thread::spawn({
        let (device, memory) = (Arc::clone(&device), Arc::clone(&memory));
        move || device.run(&memory, 4096)
    });
    let reaper = Reaper::spawn(&log, Adaptive::default())?;

    let destination = Arc::new(Memory::of(&map));
    let sender = Sender {
        map: map.clone(),
        memory: Arc::clone(&memory),
        connections: vec![Connection::new(&destination); 4],
    };
    let mut dirty = DirtyPages::new();
    let mut terms = Terms::new(0.0, DOWNTIME);
    let mut convergence = Convergence::new();
    for round in 0.. {
        device.mark(&log, &map)?;
        log.sync(&mut dirty)?;
        let others = sender.extent(dirty.others())?;
        let seen = Observation::new(terms, others, sender.extent(dirty.members())?);
        let decision = convergence.decide(&seen);
        println!("round {round}: {others:?}, {decision:?}");
        // What gets no better by itself is stopped all the same: another VMM would slow the guest down.
        if round > 0 && decision != Decision::GoOn || round == MOST_ROUNDS {
            break;
        }
        let took = sender.send(dirty.others())?;
        if round == 0 {
            // Long ranges: how fast the link is. Pages that are written all the time stay open from now on.
            terms.pages_per_second = others.pages as f64 / took.as_secs_f64();
            let places = terms.places();
            log.set_working_set(Some(WorkingSet::new(places).at_most(places)));
        } else {
            // Short ones: what each costs beside its pages.
            terms.learn_run_cost(others, took);
        }
    }

    let stopped = Instant::now();
    guest.kick(); // a signal to each vCPU's thread
    for vcpu in vcpus {
        vcpu.join().expect("a vCPU's thread panicked")?;
    }
    device.stop.store(true, Ordering::Relaxed);
    device_thread.join().expect("the device's thread panicked");
    device.mark(&log, &map)?;
    // What the sync before has found is still to be sent: with the rest, so that no page is sent twice.
    log.put_back(&dirty)?;
    let mut last = LastPages::new();
    log.last_sync(&mut last)?;
    let took = sender.send(last.part())?;
    let (pages, downtime) = (last.page_count(), stopped.elapsed());
    println!("stopped for {downtime:.1?}: {pages} pages in {took:.1?}");
    reaper.stop()?;

    assert!(destination.equals(&memory, &map), "the copy differs");
    println!("the copy is equal to the original, byte by byte");
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
