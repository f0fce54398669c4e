// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an entry costs from a full ring to protected pages, on real KVM: the crate's share of it,
//! harvesting, and the kernel's, the reset ioctl.
//!
//! `cargo bench --bench end-to-end`. A native guest dirties a batch of pages and stands still while
//! the ring is emptied by a thread on another core.

fn main() {
    #[cfg(tiny_guest)]
    if let Err(error) = x86::run() {
        // Without KVM there is nothing to measure, which is not a failure of what is measured.
        eprintln!("end-to-end SKIPPED: {error}");
    }
}

#[cfg(tiny_guest)]
mod x86 {
    use std::error::Error;
    use std::sync::Arc;
    use std::time::Instant;

    use kvm_dirty_ring::{DirtyLog, DirtyPages, RingEntries, SlotId};
    use kvm_integration::{
        Action, Exit, GuestMemory, Host, Load, Mode, PAGE_SIZE, TinyVm, VcpuThread, kvm_available,
    };

    /// Guest-physical address of the pages.
    const GPA: u64 = 4 << 30;
    const ENTRIES: u32 = 65536;
    const BATCHES: [u64; 6] = [16, 64, 256, 1024, 4096, 16384];

    pub fn run() -> Result<(), Box<dyn Error>> {
        let full = std::env::args().any(|argument| argument == "--bench");
        let samples = if full { 51 } else { 2 };
        let kvm = kvm_available()?;
        println!("{}, medians of {samples}", Host::detect());
        println!();
        println!("| pages | batch | harvest, ns/entry | reset, ns/entry | the crate's share |");
        println!("|---|---:|---:|---:|---:|");
        for (name, stride) in [("side by side", 1), ("65 apart", 65)] {
            for batch in BATCHES {
                let (harvest, reset) = measure(&kvm, batch, stride, samples)?;
                println!(
                    "| {name} | {batch} | {harvest:.1} | {reset:.1} | {:.1} % |",
                    100.0 * harvest / (harvest + reset)
                );
            }
        }
        Ok(())
    }

    /// Nanoseconds an entry, for the harvest and for the reset of `batch` pages.
    fn measure(
        kvm: &kvm_ioctls::Kvm,
        batch: u64,
        stride: u64,
        samples: usize,
    ) -> Result<(f64, f64), Box<dyn Error>> {
        let pages = batch * stride;
        let vm = TinyVm::new(kvm)?;
        let log = DirtyLog::enable(vm.vm_fd(), RingEntries::new(ENTRIES)?)?;
        log.add_slot(SlotId::new(0, 1), pages)?;
        vm.add_slot(1, GPA, Arc::new(GuestMemory::prefaulted(pages)?), true)?;
        let list = (0..batch).map(|i| GPA + i * stride * PAGE_SIZE).collect();
        let vcpu = vm.create_vcpu(0, &Load::new(Mode::Native, list).pass_exits())?;
        let mut ring = log.attach_vcpu(vcpu.fd())?;
        let thread = VcpuThread::spawn(vcpu, |exit| match exit {
            Exit::PassDone => Action::Pause,
            _ => Action::Continue,
        })?;
        let (mut harvests, mut resets) = (Vec::new(), Vec::new());
        for sample in 0..=samples {
            if !thread.wait_paused() {
                thread.join()?;
                return Err("the vCPU has ended".into());
            }
            let start = Instant::now();
            let taken = ring.harvest_and_stop();
            let harvested = Instant::now();
            log.reap()?;
            let reset = harvested.elapsed();
            if u64::from(taken) != batch {
                return Err(format!("{taken} entries instead of {batch}").into());
            }
            if sample > 0 {
                let per_entry = |time: std::time::Duration| time.as_nanos() as f64 / batch as f64;
                harvests.push(per_entry(harvested - start));
                resets.push(per_entry(reset));
            }
            thread.resume();
        }
        thread.stop()?;
        let mut dirty = DirtyPages::new();
        log.sync(&mut dirty)?;
        if dirty.page_count() != batch {
            return Err("the sync found other pages than were written".into());
        }
        Ok((median(&mut harvests), median(&mut resets)))
    }

    fn median(values: &mut [f64]) -> f64 {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }
}
