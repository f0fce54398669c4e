// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A live migration by pre-copy: send all memory, then in rounds what was written meanwhile; when
//! the rest can be sent within the downtime, stop the guest and send it.
//!
//! ```sh
//! cargo run --example precopy
//! ```
//!
//! `guest` simulates what is below a VMM, and the link to the destination; all else a VMM does the
//! same way.

mod guest;

use std::error::Error;
use std::thread;
use std::time::{Duration, Instant};

use guest::{Exit, Guest, Link, Load, Vcpu};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{DirtyPages, Reaper, Run, SlotId, VcpuRing};

const RAM: SlotId = SlotId::new(0, 0);
const PAGES: u64 = 8192;
/// What the link takes, in pages a millisecond: 80 MB/s.
const SPEED: u64 = 20;
/// For how long the guest may stand still, in milliseconds.
const DOWNTIME: u64 = 10;
/// Rounds after which the guest is stopped, whatever is left. A guest may write faster than the
/// link takes; a VMM would slow it down, or give up.
const MOST_ROUNDS: u32 = 30;

fn main() -> Result<(), Box<dyn Error>> {
    // Small rings, of which a burst fills one sooner than any policy can look.
    let guest = Guest::new(128, RAM, PAGES); // KVM_CREATE_VM
    let log = guest.dirty_log(); // DirtyLog::enable(&vm_fd, ...)
    log.add_slot(RAM, PAGES)?;
    guest.create_slots(); // KVM_SET_USER_MEMORY_REGION

    let mut vcpus = Vec::new();
    for number in 0..4 {
        let load = Load {
            first_page: number * 2048,
            pages: 400,
            burst: 80,
            rest: Duration::from_millis(25 * (1 + number)),
        };
        let vcpu = guest.create_vcpu(load); // KVM_CREATE_VCPU
        let ring = log.attach_ring(vcpu.vcpu.ring_memory())?; // log.attach_vcpu(&vcpu_fd)
        vcpus.push(thread::spawn(move || run_vcpu(vcpu, ring)));
    }
    let reaper = Reaper::spawn(&log, Adaptive::default())?;

    let memory = guest.memory();
    let mut link = Link::new(PAGES, SPEED);
    let mut dirty = DirtyPages::new();
    println!("round   dirty   sent in   full exits so far");
    let table = |round: &str, pages: u64, time: Duration| {
        let exits = log.stats().full_exits();
        println!(
            "{round:>5} {pages:>7} {:>6} ms {exits:>9}",
            time.as_millis()
        );
    };

    // Everything is sent, so what was written up to here need not be reported again.
    log.sync(&mut dirty)?;
    let everything = Run {
        slot: RAM,
        first_page: 0,
        pages: PAGES,
    };
    table("0", PAGES, link.send(&memory, [everything]));

    for round in 1.. {
        log.sync(&mut dirty)?;
        let rest = dirty.page_count();
        if rest <= DOWNTIME * SPEED || round == MOST_ROUNDS {
            break;
        }
        table(&round.to_string(), rest, link.send(&memory, dirty.runs()));
    }

    // The guest stands still from here on.
    let stopped = Instant::now();
    guest.kick(); // a signal to each vCPU's thread
    for vcpu in vcpus {
        vcpu.join().expect("a vCPU's thread panicked")?;
    }
    // What the last sync has reported is not sent yet; the final one adds what came after it.
    table("stop", dirty.page_count(), link.send(&memory, dirty.runs()));
    log.sync(&mut dirty)?;
    table(
        "final",
        dirty.page_count(),
        link.send(&memory, dirty.runs()),
    );
    println!(
        "the guest stood still for {} ms",
        stopped.elapsed().as_millis()
    );
    reaper.stop()?;

    assert!(
        link.destination == memory.read(0, PAGES),
        "the copy differs"
    );
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
