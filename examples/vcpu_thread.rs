// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vCPU's thread for kvm-ioctls, whole: full rings, kicks, limits, and all vCPUs parked for the last sync.
//!
//! ```sh
//! cargo run --example vcpu_thread
//! ```
//!
//! The module `kick` (`examples/kick/`) is to be copied; here is how it is used: two vCPUs write on a real KVM, a few rounds copy what they write, and
//! once they are parked the last sync completes the copy. Without `/dev/kvm` it says so, and does nothing;
//! `KVM_REQUIRED=1` makes that an error.

mod kick;
mod tiny_vm;

use std::num::NonZeroU64;
use std::thread::sleep;
use std::time::Duration;

use kick::{Failure, VcpuThread, park_all};
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{DirtyLog, DirtyPages, Limiter, Reaper, RingEntries};
use kvm_ioctls::Kvm;
use tiny_vm::{TinyVm, has_written};

const VCPUS: u64 = 2;
const PAGES: u64 = 4096;

fn main() -> Result<(), Failure> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) if std::env::var_os("KVM_REQUIRED").is_some_and(|value| value == "1") => {
            return Err(error.into());
        }
        Err(error) => {
            eprintln!("vcpu_thread SKIPPED: this example needs KVM, and /dev/kvm: {error}");
            return Ok(());
        }
    };
    let vm = TinyVm::new(&kvm, VCPUS, PAGES)?;
    let (log, vcpus) = start(&vm)?;
    migrate(&vm, &log, &vcpus)?;
    for (vcpu, _ring) in park_all(&log, &vcpus)?.stop()? {
        println!("to be sent with its registers: {:?}", vcpu.get_mp_state()?);
    }
    Ok(())
}

/// Has the log enabled, and the vCPUs run.
pub fn start(vm: &TinyVm) -> Result<(DirtyLog, Vec<VcpuThread>), Failure> {
    // Bitmaps, where this kernel has no rings.
    let log = DirtyLog::enable_auto(vm.fd(), RingEntries::new(1024)?)?;
    vm.add_memory(&log)?;
    let vcpus = (0..VCPUS).map(|index| {
        let fd = vm.create_vcpu(index)?;
        let ring = log.attach_vcpu(&fd)?;
        let thread = VcpuThread::spawn(fd, ring, |exit| match has_written(&exit) {
            true => Ok(()),
            false => Err(format!("the guest left by {exit:x?}").into()),
        });
        Ok(thread?)
    });
    let vcpus = vcpus.collect::<Result<_, Failure>>()?;
    Ok((log, vcpus))
}

/// Copies the guest's memory while the guest runs, and completes the copy.
fn migrate(vm: &TinyVm, log: &DirtyLog, vcpus: &[VcpuThread]) -> Result<(), Failure> {
    let reaper = Reaper::spawn(log, Adaptive::default())?;
    let kicks: Vec<_> = vcpus.iter().map(VcpuThread::kicker).collect();
    let limiter = Limiter::spawn(log, move |vcpu| kicks[vcpu]())?;
    let mut copy = vm.read_all()?;
    let mut dirty = DirtyPages::new();
    for round in 0..4 {
        if round == 2 && log.mode() == kvm_dirty_ring::Mode::Rings {
            // It outruns the link, say.
            log.set_dirty_limits(NonZeroU64::new(2_000))?;
        }
        sleep(Duration::from_millis(200));
        log.sync(&mut dirty)?;
        println!("round {round}: {} pages", dirty.page_count());
        copy_into(&mut copy, vm, &dirty)?;
    }

    let parked = park_all(log, vcpus)?;
    log.sync(&mut dirty)?;
    println!("the last: {} pages", dirty.page_count());
    copy_into(&mut copy, vm, &dirty)?;
    let equal = copy == vm.read_all()?;
    // The migration has failed, say: the guest goes on. Had it not, then `parked.stop()`, and the vCPUs' state.
    drop(parked);
    limiter.stop()?;
    reaper.stop()?;
    match equal {
        true => println!("the copy is equal to the guest's memory"),
        false => return Err("the copy differs".into()),
    }
    Ok(())
}

fn copy_into(copy: &mut [u8], vm: &TinyVm, dirty: &DirtyPages) -> Result<(), Failure> {
    for run in dirty.runs() {
        let (at, bytes) = vm.read(run)?;
        copy[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    Ok(())
}
