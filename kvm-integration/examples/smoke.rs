//! Checks the tiny guest itself, on real KVM: `smoke [vCPUs]`.
//!
//! Each workload runs in each mode; pausing must stand still, resuming must go on, and each listed
//! page must end with just the stamp its progress promises. Then one vCPU fills a dirty ring.

#[cfg(target_arch = "x86_64")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    smoke::main()
}

#[cfg(not(target_arch = "x86_64"))]
fn main() {
    println!("skipped: the tiny guest is x86-64 code");
}

#[cfg(target_arch = "x86_64")]
mod smoke {
    use std::collections::HashMap;
    use std::error::Error;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread::sleep;
    use std::time::{Duration, Instant};

    use kvm_bindings::{kvm_dirty_gfn, kvm_enable_cap};
    use kvm_integration::program::{split_stamp, stamp_offset};
    use kvm_integration::{
        Action, Exit, GuestMemory, Host, Load, Mode, PAGE_SIZE, Region, TinyVcpu, TinyVm,
        VcpuThread, Workload, kvm_available, pause_all,
    };
    use kvm_ioctls::Kvm;
    use memmap2::MmapOptions;

    const REGIONS: [Region; 2] = [
        Region {
            gpa: 1 << 30,
            pages: 8192,
        },
        Region {
            gpa: 100 << 30,
            pages: 8192,
        },
    ];
    const PAUSES: usize = 100;

    pub fn main() -> Result<(), Box<dyn Error>> {
        let vcpus = std::env::args().nth(1).map_or(Ok(2), |arg| arg.parse())?;
        let kvm = kvm_available()?;
        println!("{}, {vcpus} vCPUs", Host::detect());
        for (mode, chunk) in [(Mode::Native, 0), (Mode::Native, 128), (Mode::Emulated, 32)] {
            for workload in Workload::ALL {
                run(&kvm, workload, mode, chunk, vcpus)?;
            }
        }
        fill_ring(&kvm)?;
        println!("ok");
        Ok(())
    }

    fn wait(what: &str, mut until: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !until() {
            assert!(Instant::now() < deadline, "30 s went by without {what}");
            sleep(Duration::from_micros(50));
        }
    }

    /// Gives the machine both regions, logged, as slots 1 and 2.
    fn add_slots(vm: &TinyVm) -> Result<Vec<Arc<GuestMemory>>, Box<dyn Error>> {
        let add = |(id, region): (u32, &Region)| {
            let memory = Arc::new(GuestMemory::new(region.pages)?);
            vm.add_slot(id, region.gpa, Arc::clone(&memory), true)?;
            Ok(memory)
        };
        (1..).zip(&REGIONS).map(add).collect()
    }

    fn run(
        kvm: &Kvm,
        workload: Workload,
        mode: Mode,
        chunk: u32,
        vcpus: u32,
    ) -> Result<(), Box<dyn Error>> {
        let vm = TinyVm::new(kvm)?;
        let memory = add_slots(&vm)?;
        let pages = REGIONS.iter().map(|region| region.pages).sum();
        let length = workload.covering_length(pages, vcpus, chunk);
        let exits = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let mut lists = Vec::new();
        let mut threads = Vec::new();
        for index in 0..vcpus {
            let list = workload.addresses(1, index, vcpus, &REGIONS, length);
            let load = Load::new(mode, list.clone()).chunk(chunk).pass_exits();
            lists.push(list);
            let exits = Arc::clone(&exits);
            threads.push(VcpuThread::spawn(
                vm.create_vcpu(index, &load)?,
                move |exit| {
                    exits[usize::from(exit == Exit::PassDone)].fetch_add(1, Ordering::Relaxed);
                    Action::Continue
                },
            )?);
        }

        let stores = |threads: &[VcpuThread]| threads.iter().map(VcpuThread::progress).sum::<u64>();
        wait("a pass of every vCPU", || {
            threads
                .iter()
                .all(|thread| thread.passes() > 0 || thread.ended())
        });
        if let Some(ended) = threads.iter().position(VcpuThread::ended) {
            return threads
                .swap_remove(ended)
                .join()
                .map(drop)
                .map_err(Into::into);
        }
        let (before, start) = (stores(&threads), Instant::now());
        sleep(Duration::from_millis(300));
        let rate = (stores(&threads) - before) as f64 / start.elapsed().as_secs_f64();

        let mut slowest = Duration::ZERO;
        for round in 0..PAUSES {
            let start = Instant::now();
            assert!(pause_all(&threads), "a vCPU ended by itself");
            slowest = slowest.max(start.elapsed());
            let still: Vec<u64> = threads.iter().map(VcpuThread::progress).collect();
            let twin = &threads[round % threads.len()];
            twin.interrupt();
            assert!(twin.pause(), "a vCPU ended by itself");
            sleep(Duration::from_micros(200));
            let now: Vec<u64> = threads.iter().map(VcpuThread::progress).collect();
            assert_eq!(still, now, "a paused vCPU went on");
            threads.iter().for_each(VcpuThread::resume);
            wait("progress after resuming", || {
                threads.iter().for_each(VcpuThread::interrupt);
                threads
                    .iter()
                    .zip(&still)
                    .all(|(thread, still)| thread.progress() > *still)
            });
        }
        let stopped: Result<Vec<TinyVcpu>, _> = threads.into_iter().map(VcpuThread::stop).collect();
        for (vcpu, list) in stopped?.iter().zip(&lists) {
            check_stamps(vcpu, list, &memory);
        }
        for (id, memory) in (1..).zip(&memory) {
            let log = vm.vm_fd().get_dirty_log(id, memory.bytes() as usize)?;
            let dirty: u32 = log.iter().map(|word| word.count_ones()).sum();
            assert_eq!(u64::from(dirty), memory.pages(), "every page was stored to");
        }
        println!(
            "{workload:12} {mode:?} chunk {chunk:3}: {:7.3} M stores/s, {} chunk and {} pass \
             exits, slowest pause {slowest:?}",
            rate / 1e6,
            exits[0].load(Ordering::Relaxed),
            exits[1].load(Ordering::Relaxed),
        );
        Ok(())
    }

    /// Each page's stamp must be that of the last store to it, up to the one step of stores that
    /// may not have been reported yet.
    fn check_stamps(vcpu: &TinyVcpu, list: &[u64], memory: &[Arc<GuestMemory>]) {
        let (stores, length) = (vcpu.progress().stores(), list.len() as u64);
        let step = vcpu.registers().expect("a stopped vCPU has registers").rbx;
        let last_of = |stores: u64| -> HashMap<u64, u64> {
            let from = stores.saturating_sub(length);
            (from..stores)
                .map(|n| (list[(n % length) as usize], n / length + 1))
                .collect()
        };
        let (least, most) = (last_of(stores), last_of(stores + step));
        for (gpa, pass) in least {
            let (region, memory) = REGIONS
                .iter()
                .zip(memory)
                .find(|(region, _)| {
                    (region.gpa..region.gpa + region.pages * PAGE_SIZE).contains(&gpa)
                })
                .expect("a listed page is in a region");
            let stamp = memory.read_u64(gpa - region.gpa + stamp_offset(vcpu.index()));
            let (index, found) = split_stamp(stamp).expect("a listed page has a stamp");
            assert_eq!(index, vcpu.index());
            let wanted = pass..=most[&gpa];
            assert!(
                wanted.contains(&found),
                "{gpa:#x} has stamp {found}, not {wanted:?}"
            );
        }
    }

    /// With a ring of 1,024 entries a native vCPU must leave at the soft limit, and the entries
    /// must be its list.
    fn fill_ring(kvm: &Kvm) -> Result<(), Box<dyn Error>> {
        const ENTRIES: usize = 1024;
        const CAP_DIRTY_LOG_RING: u32 = 192;
        const DIRTY: u32 = 1;

        let vm = TinyVm::new(kvm)?;
        let bytes = ENTRIES * size_of::<kvm_dirty_gfn>();
        vm.vm_fd().enable_cap(&kvm_enable_cap {
            cap: CAP_DIRTY_LOG_RING,
            args: [bytes as u64, 0, 0, 0],
            ..Default::default()
        })?;
        add_slots(&vm)?;
        let list = Workload::Walk.addresses(1, 0, 1, &REGIONS, 8192);
        let vcpu = vm.create_vcpu(0, &Load::new(Mode::Native, list))?;
        let ring = MmapOptions::new()
            .offset(64 * PAGE_SIZE)
            .len(bytes)
            .map_raw(vcpu.fd())?;
        let thread = VcpuThread::spawn(vcpu, |exit| match exit {
            Exit::RingFull => Action::Stop,
            other => Action::Fail(format!("an exit was not asked for: {other:?}").into()),
        })?;
        let vcpu = thread.join()?;
        let mut found = 0;
        for n in 0..ENTRIES {
            // SAFETY: the mapping holds ENTRIES entries, and its vCPU runs no more, so that nobody
            // writes it.
            let entry = unsafe { ring.as_ptr().cast::<kvm_dirty_gfn>().add(n).read_volatile() };
            if entry.flags & DIRTY != 0 {
                assert_eq!((entry.slot, entry.offset, found), (1, n as u64, n));
                found += 1;
            }
        }
        // 64 entries are reserved, and 512 more where the CPU buffers dirty addresses itself.
        println!(
            "ring full at {found} of {ENTRIES}, progress {}",
            vcpu.progress().stores()
        );
        assert!(
            found == ENTRIES - 64 || found == ENTRIES - 576,
            "full at {found} entries"
        );
        Ok(())
    }
}
