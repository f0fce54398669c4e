// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The whole of the crate in one page: enable the log, add a slot, attach the vCPUs, start a
//! reaper, let the guest write, and ask which pages it has written.
//!
//! ```sh
//! cargo run --example quickstart
//! ```
//!
//! `guest` simulates what is below a VMM; all that is in this file, a VMM does the same way.

mod guest;

use std::collections::BTreeSet;
use std::error::Error;
use std::thread;
use std::time::Duration;

use guest::{Exit, Guest, Load, Vcpu};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{DirtyPages, Reaper, SlotId, VcpuRing};

const RAM: SlotId = SlotId::new(0, 0);
const PAGES: u64 = 10_000;

fn main() -> Result<(), Box<dyn Error>> {
    let guest = Guest::new(1024, RAM, PAGES); // KVM_CREATE_VM

    // Before the first vCPU. In a VMM: DirtyLog::enable(&vm_fd, RingEntries::new(1024)?)?
    let log = guest.dirty_log();

    // Add the slot to the log before you create it in KVM.
    log.add_slot(RAM, PAGES)?;
    guest.create_slots(); // KVM_SET_USER_MEMORY_REGION with KVM_MEM_LOG_DIRTY_PAGES

    let mut threads = Vec::new();
    for number in 0..2 {
        let load = Load {
            first_page: 1000 + number * 5000,
            pages: 500,
            burst: 10,
            rest: Duration::from_millis(5),
        };
        let vcpu = guest.create_vcpu(load); // KVM_CREATE_VCPU
        // In a VMM: log.attach_vcpu(&vcpu_fd)?
        let ring = log.attach_ring(vcpu.vcpu.ring_memory())?;
        threads.push(thread::spawn(move || run_vcpu(vcpu, ring)));
    }

    // From now on rings are emptied before they are full.
    let reaper = Reaper::spawn(&log, Adaptive::default())?;
    thread::sleep(Duration::from_millis(200));

    // What has the guest written so far? It goes on meanwhile, and its pages may be read now: what
    // is written after this comes with the next sync.
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty)?;
    println!("while it runs: {} pages", dirty.page_count());
    for run in dirty.runs().take(5) {
        let end = run.first_page + run.pages;
        println!("  slot {}, pages {} .. {end}", run.slot, run.first_page);
    }
    println!("  ...");

    // And since then? With the vCPUs stopped, the answer is complete.
    let before: BTreeSet<_> = dirty.pages().collect();
    thread::sleep(Duration::from_millis(100));
    guest.kick(); // a signal to each vCPU's thread
    for thread in threads {
        thread.join().expect("a vCPU's thread panicked")?;
    }
    log.sync(&mut dirty)?;
    println!("since then: {} pages", dirty.page_count());
    reaper.stop()?;

    // Every page that holds something was reported.
    let memory = guest.memory();
    for page in 0..PAGES {
        let written = memory.read(page, 1).iter().any(|&byte| byte != 0);
        let reported = dirty.contains(RAM, page) || before.contains(&(RAM, page));
        assert!(reported || !written, "page {page} was lost");
    }
    println!("every page that was written was reported");
    println!("{:#?}", log.stats());
    Ok(())
}

/// A vCPU's thread.
fn run_vcpu(mut vcpu: Vcpu, mut ring: VcpuRing) -> Result<(), FullError> {
    loop {
        // ioctl KVM_RUN, then `exit_reason` of its struct kvm_run.
        match vcpu.run() {
            Exit::DirtyRingFull => ring.on_full()?,
            Exit::Kicked => return Ok(()),
        }
    }
}
