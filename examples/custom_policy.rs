// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A pacing policy of one's own: when the reaper empties the rings. It is shown beside two of the
//! crate's, under the same load.
//!
//! ```sh
//! cargo run --example custom_policy
//! ```
//!
//! A full exit stops a vCPU until its ring is empty; a pass protects its pages anew, and the guest
//! faults on each of them again. A good policy has few of both. What none of them can do is lose a
//! page, which is checked. (On a machine as small as this simulated one, figures mean little:
//! compare policies by `pacing-lab`, on KVM.)
//!
//! `guest` simulates what is below a VMM; all else a VMM does the same way.

mod guest;

use std::error::Error;
use std::thread;
use std::time::Duration;

use guest::{Exit, Guest, Load, Vcpu, page_size};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::pacing::{Adaptive, Fixed, Observation, Pacing};
use kvm_dirty_ring::{DirtyPages, Reaper, SlotId, VcpuRing};

const RAM: SlotId = SlotId::new(0, 0);
const PAGES: u64 = 8192;

/// Looks every so often, and empties a ring that is fuller than a share of what it takes.
struct WhenFullerThan {
    percent: u64,
    look: Duration,
}

impl Pacing for WhenFullerThan {
    // Pure: no clock, no lock, no allocation. So it can be tested with numbers alone.
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        for (ring, reap) in seen.rings.iter().zip(reap) {
            *reap = ring.waiting * 100 > ring.soft_limit * self.percent;
        }
        self.look
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("policy              entries   full exits   passes    looks");
    let ours = WhenFullerThan {
        percent: 60,
        look: Duration::from_millis(2),
    };
    run("WhenFullerThan 60%", ours)?;
    run("Fixed 50 ms", Fixed::new(Duration::from_millis(50)))?;
    run("Adaptive", Adaptive::default())?;
    println!("under each of them, the copy was equal to the original");
    Ok(())
}

/// Runs a guest for a while under `policy`, and shows what came of it.
fn run(name: &str, policy: impl Pacing + 'static) -> Result<(), Box<dyn Error>> {
    let guest = Guest::new(1024, RAM, PAGES); // KVM_CREATE_VM
    let log = guest.dirty_log(); // DirtyLog::enable(&vm_fd, ...)
    log.add_slot(RAM, PAGES)?;
    guest.create_slots(); // KVM_SET_USER_MEMORY_REGION
    let mut vcpus = Vec::new();
    // Two vCPUs, one of which writes much more than the other.
    for (number, burst) in [(0, 100), (1, 5)] {
        let load = Load {
            first_page: number * PAGES / 2,
            pages: PAGES / 2,
            burst,
            rest: Duration::from_millis(3),
        };
        let vcpu = guest.create_vcpu(load); // KVM_CREATE_VCPU
        let ring = log.attach_ring(vcpu.vcpu.ring_memory())?; // log.attach_vcpu(&vcpu_fd)
        vcpus.push(thread::spawn(move || run_vcpu(vcpu, ring)));
    }

    let reaper = Reaper::spawn(&log, policy)?;
    thread::sleep(Duration::from_millis(500));

    guest.kick(); // a signal to each vCPU's thread
    for vcpu in vcpus {
        vcpu.join().expect("a vCPU's thread panicked")?;
    }
    let (stats, reaped) = (log.stats(), reaper.stats());
    // A policy that panics or asks for the impossible is replaced, and `stop` returns that error.
    reaper.stop()?;
    println!(
        "{name:<19} {:>7} {:>12} {:>8} {:>8}",
        stats.entries,
        stats.full_exits(),
        reaped.passes,
        reaped.looks
    );

    // One sync at the end has every page that was written since the begin.
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty)?;
    let memory = guest.memory();
    let mut copy = vec![0; PAGES as usize * page_size()];
    for run in dirty.runs() {
        let bytes = memory.read(run.first_page, run.pages);
        copy[run.first_page as usize * page_size()..][..bytes.len()].copy_from_slice(&bytes);
    }
    assert!(copy == memory.read(0, PAGES), "{name}: the copy differs");
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
