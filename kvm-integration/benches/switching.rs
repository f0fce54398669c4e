// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What it costs to start and to stop tracking, and what tracking costs the guest, on real KVM.
//!
//! `cargo bench --bench switching`. A native guest of one vCPU stores to page after page of 1 GiB, and
//! of 4 GiB, all of which are there; each time its log is switched while it runs.

fn main() {
    #[cfg(tiny_guest)]
    if let Err(error) = x86::run() {
        // Without KVM there is nothing to measure, which is not a failure of what is measured.
        eprintln!("switching SKIPPED: {error}");
    }
}

#[cfg(tiny_guest)]
mod x86 {
    use std::error::Error;
    use std::io;
    use std::sync::Arc;
    use std::thread::sleep;
    use std::time::{Duration, Instant};

    use kvm_dirty_ring::{DirtyLog, DirtyPages, RingEntries, SlotId};
    use kvm_integration::{
        Action, Exit, GuestMemory, Host, Load, Mode, PAGE_SIZE, TinyVm, VcpuThread, kvm_available,
    };

    const GPA: u64 = 4 << 30;
    const ENTRIES: u32 = 65536;
    const SLOT: SlotId = SlotId::new(0, 1);
    const GIB: u64 = (1 << 30) / PAGE_SIZE;
    /// The vCPU's list is no longer than that, and it goes round.
    const LISTED: u64 = 1 << 20;

    type Result<T> = std::result::Result<T, Box<dyn Error>>;

    pub fn run() -> Result<()> {
        let full = std::env::args().any(|argument| argument == "--bench");
        let (sizes, samples) = match full {
            true => (&[GIB, 4 * GIB][..], 7),
            false => (&[GIB / 64][..], 2),
        };
        let kvm = kvm_available()?;
        println!("{}, medians of {samples}", Host::detect());
        println!();
        println!("| log | memory | stop, ms | start, ms | first sync, ms |");
        println!("|---|---:|---:|---:|---:|");
        let mut speeds = Vec::new();
        for bitmap in [false, true] {
            for &pages in sizes {
                let mode = if bitmap { "bitmap" } else { "rings" };
                let guest = Guest::start(&kvm, bitmap, pages)?;
                let [stop, start, sync] = guest.switch(samples)?;
                let gib = pages as f64 / GIB as f64;
                println!("| {mode} | {gib} GiB | {stop:.2} | {start:.2} | {sync:.2} |");
                if pages == sizes[0] {
                    let second = Duration::from_millis(if full { 1000 } else { 10 });
                    speeds.push((mode, guest.speeds(second)?));
                }
            }
        }
        println!();
        println!(
            "| log | stores/s untracked | synced each 100 ms | never synced | stopped again |"
        );
        println!("|---|---:|---:|---:|---:|");
        for (mode, speeds) in speeds {
            print!("| {mode} ");
            speeds.iter().for_each(|speed| print!("| {speed:.0} "));
            println!("|");
        }
        Ok(())
    }

    struct Guest {
        vm: TinyVm,
        log: DirtyLog,
        vcpu: VcpuThread,
    }

    impl Guest {
        /// One that has stored to each page once, and is not tracked.
        fn start(kvm: &kvm_ioctls::Kvm, bitmap: bool, pages: u64) -> Result<Self> {
            let vm = TinyVm::new(kvm)?;
            let log = match bitmap {
                true => DirtyLog::enable_bitmap(vm.vm_fd())?,
                false => DirtyLog::enable(vm.vm_fd(), RingEntries::new(ENTRIES)?)?,
            };
            log.add_slot(SLOT, pages)?;
            let memory = Arc::new(GuestMemory::new(pages)?);
            vm.add_slot(1, GPA, memory, true)?;
            let list = (0..pages.min(LISTED)).map(|page| GPA + page * PAGE_SIZE);
            let vcpu = vm.create_vcpu(0, &Load::new(Mode::Native, list.collect()))?;
            let mut ring = log.attach_vcpu(vcpu.fd())?;
            let handler = move |exit| match exit {
                Exit::RingFull => match ring.on_full() {
                    Ok(()) => Action::Continue,
                    Err(error) => Action::Fail(error.into()),
                },
                _ => Action::Continue,
            };
            let vcpu = VcpuThread::spawn(vcpu, handler)?;
            let guest = Self { vm, log, vcpu };
            guest.set(false)?;
            guest.wait_for_a_pass()?;
            Ok(guest)
        }

        fn wait_for_a_pass(&self) -> Result<()> {
            let goal = self.vcpu.passes() + 2;
            while self.vcpu.passes() < goal {
                if self.vcpu.ended() {
                    return Err("the vCPU has ended".into());
                }
                sleep(Duration::from_millis(1));
            }
            Ok(())
        }

        /// Milliseconds that it took.
        fn set(&self, on: bool) -> Result<f64> {
            let set = || self.vm.set_logged(1, on).map_err(io::Error::other);
            let start = Instant::now();
            match on {
                true => self.log.start_tracking(SLOT, set)?,
                false => self.log.stop_tracking(SLOT, set)?,
            }
            Ok(start.elapsed().as_secs_f64() * 1e3)
        }

        /// Milliseconds that a stop, a start, and the sync after it take; medians. At each start all
        /// pages are mapped for writing.
        fn switch(&self, samples: usize) -> Result<[f64; 3]> {
            let mut times = [const { Vec::new() }; 3];
            let mut dirty = DirtyPages::new();
            self.set(true)?;
            for _ in 0..samples {
                self.log.sync(&mut dirty)?;
                sleep(Duration::from_millis(100));
                times[0].push(self.set(false)?);
                self.wait_for_a_pass()?;
                times[1].push(self.set(true)?);
                let start = Instant::now();
                self.log.sync(&mut dirty)?;
                times[2].push(start.elapsed().as_secs_f64() * 1e3);
            }
            self.set(false)?;
            Ok(times.map(|mut times| {
                times.sort_by(f64::total_cmp);
                times[times.len() / 2]
            }))
        }

        /// Stores a second: untracked, tracked with syncs and without, untracked again.
        fn speeds(&self, time: Duration) -> Result<[f64; 4]> {
            let mut dirty = DirtyPages::new();
            // A stop leaves pages protected: the guest faults on each once more.
            self.wait_for_a_pass()?;
            let untracked = self.speed(time, || Ok(()))?;
            self.set(true)?;
            let synced = self.speed(time, || Ok(self.log.sync(&mut dirty)?))?;
            let never = self.speed(time, || Ok(()))?;
            self.set(false)?;
            self.wait_for_a_pass()?;
            let stopped = self.speed(time, || Ok(()))?;
            Ok([untracked, synced, never, stopped])
        }

        /// Stores a second, with `each` done ten times meanwhile.
        fn speed(&self, time: Duration, mut each: impl FnMut() -> Result<()>) -> Result<f64> {
            let (start, before) = (Instant::now(), self.vcpu.progress());
            for _ in 0..10 {
                each()?;
                sleep(time / 10);
            }
            let stores = self.vcpu.progress() - before;
            Ok(stores as f64 / start.elapsed().as_secs_f64())
        }
    }
}
