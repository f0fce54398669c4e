// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How fast a guest dirties its memory, vCPU by vCPU and all together, second by second: what a VMM
//! wants to know before it begins a migration.
//!
//! ```sh
//! cargo run --example dirty_rate_meter
//! ```
//!
//! The rates are those of rings' entries: first writes to pages since they were protected. Beside
//! them is what a sync finds each second, in which a page counts once, however often it was
//! protected meanwhile: never more than the entries, in the long run.
//!
//! `guest` simulates what is below a VMM; all else a VMM does the same way.

mod guest;

use std::error::Error;
use std::thread;
use std::time::{Duration, Instant};

use guest::{Exit, Guest, Load, Vcpu};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{DirtyPages, RateMeter, Rates, Reaper, SlotId, VcpuRing};

const RAM: SlotId = SlotId::new(0, 0);
const PAGES: u64 = 65_536;
const SECONDS: u32 = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let guest = Guest::new(1024, RAM, PAGES); // KVM_CREATE_VM
    let log = guest.dirty_log(); // DirtyLog::enable(&vm_fd, ...)
    log.add_slot(RAM, PAGES)?;
    guest.create_slots(); // KVM_SET_USER_MEMORY_REGION
    let mut vcpus = Vec::new();
    // Of three vCPUs two write to the same pages; the third is all but idle.
    for (first_page, burst) in [(0, 20), (0, 20), (40_000, 1)] {
        let load = Load {
            first_page,
            pages: 20_000,
            burst,
            rest: Duration::from_millis(5),
        };
        let vcpu = guest.create_vcpu(load); // KVM_CREATE_VCPU
        let ring = log.attach_ring(vcpu.vcpu.ring_memory())?; // log.attach_vcpu(&vcpu_fd)
        vcpus.push(thread::spawn(move || run_vcpu(vcpu, ring)));
    }
    let reaper = Reaper::spawn(&log, Adaptive::default())?;

    // At one go, for an operator who asks: it blocks meanwhile.
    let rates = Rates::measure(&log, Duration::from_millis(200)).ok_or("no rings")?;
    println!("at first, {:.0} pages/s", rates.vm.last);

    let mut dirty = DirtyPages::new();
    let mut meter = RateMeter::default();
    let start = Instant::now();
    meter.sample(&log, start.elapsed());
    let mut found = 0;
    println!("pages/s   vCPU 0   vCPU 1   vCPU 2   the VM     mean   synced");
    let mut last = Instant::now();
    for _ in 0..SECONDS {
        thread::sleep(Duration::from_secs(1));
        let rates = meter.sample(&log, start.elapsed()).ok_or("no rings")?;
        log.sync(&mut dirty)?;
        let seconds = last.elapsed().as_secs_f64();
        last = Instant::now();
        print!("       ");
        for vcpu in &rates.vcpus {
            print!(" {:>8.0}", vcpu.last);
        }
        let synced = dirty.page_count() as f64 / seconds;
        println!(
            " {:>8.0} {:>8.0} {synced:>8.0}",
            rates.vm.last, rates.vm.mean
        );
        assert!(rates.vm.last > 0.0 && rates.vcpus.len() == 3);
        found += dirty.page_count();
    }

    guest.kick(); // a signal to each vCPU's thread
    let mut writes = Vec::new();
    for vcpu in vcpus {
        writes.push(vcpu.join().expect("a vCPU's thread panicked")?);
    }
    log.sync(&mut dirty)?;
    found += dirty.page_count();
    reaper.stop()?;

    // Compare the meter with the true count of the guest.
    let entries: Vec<_> = log.stats().vcpus.iter().map(|vcpu| vcpu.entries).collect();
    println!("in all: {found} pages, from {entries:?} entries, from {writes:?} writes");
    assert!(found > 0 && found <= entries.iter().sum());
    for (&entries, writes) in entries.iter().zip(writes) {
        assert!(entries > 0 && entries <= writes);
    }
    Ok(())
}

/// A vCPU's thread. How often the guest wrote.
fn run_vcpu(mut vcpu: Vcpu, mut ring: VcpuRing) -> Result<u64, FullError> {
    loop {
        // ioctl KVM_RUN
        match vcpu.run() {
            Exit::DirtyRingFull => ring.on_full()?,
            Exit::Kicked => return Ok(vcpu.writes),
        }
    }
}
