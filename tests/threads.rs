// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Real threads: passes beside each other, and a whole migration at full speed.

#[path = "common/over.rs"]
mod over;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, RwLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::pacing::Fixed;
use kvm_dirty_ring::sim::{ResetPhase, SimConfig, SimVcpu, SimVm, WriteError};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Mode, Reaper, SlotId, VcpuRing};
use over::Over;

const RAM: SlotId = SlotId::new(0, 0);
/// The slot that comes and goes.
const HOTPLUG: SlotId = SlotId::new(0, 1);
const RAM_PAGES: u64 = 400;
/// How long a test waits for what must come: never reached on a machine that gets on.
const PATIENCE: Duration = Duration::from_secs(60);

/// SplitMix64: random enough, and the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (bits ^ (bits >> 31)) % limit
    }
}

/// The copy of a migration: each page's version when it was copied.
#[derive(Default)]
struct Copy {
    pages: BTreeMap<SlotId, Vec<u64>>,
    dirty: DirtyPages,
}

struct Machine {
    vm: SimVm,
    log: DirtyLog,
    stop: AtomicBool,
    copy: Mutex<Copy>,
    /// The second slot's size. Devices hold it while they write, so that the slot stays.
    hotplug: RwLock<Option<u64>>,
}

impl Machine {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn run_vcpu(&self, vcpu: &SimVcpu, mut ring: VcpuRing, mut random: Random) {
        while self.goes_on() {
            let (slot, size) = match random.below(4) {
                0 => (HOTPLUG, 200),
                _ => (RAM, RAM_PAGES),
            };
            match vcpu.write(slot, random.below(size)) {
                Ok(()) | Err(WriteError::NoSuchPage { .. }) => {}
                Err(WriteError::RingFull) => ring.on_full().unwrap(),
                Err(error) => panic!("{error}"),
            }
            if random.below(64) == 0 {
                thread::yield_now();
            }
        }
    }

    fn run_device(&self, mut random: Random) {
        while self.goes_on() {
            let hotplug = self.hotplug.read().unwrap();
            let (slot, size) = match *hotplug {
                Some(size) if random.below(2) == 0 => (HOTPLUG, size),
                _ => (RAM, RAM_PAGES),
            };
            let page = random.below(size);
            assert!(self.vm.device_write(slot, page));
            self.log.mark_dirty(slot, page, 1).unwrap();
            drop(hotplug);
            thread::yield_now();
        }
    }

    /// The slot's life, over and over, at another size each time. It ends alive.
    fn run_hotplug(&self, vcpus: &[SimVcpu], mut random: Random) {
        loop {
            let size = 1 + random.below(200);
            self.log.add_slot(HOTPLUG, size).unwrap();
            // The copies of a slot and of its successor are not to be mixed up.
            let mut copy = self.copy.lock().unwrap();
            copy.pages.insert(HOTPLUG, vec![0; size as usize]);
            self.vm.create_slot(HOTPLUG, size);
            drop(copy);
            *self.hotplug.write().unwrap() = Some(size);
            thread::sleep(Duration::from_micros(random.below(2_000)));
            if !self.goes_on() {
                return;
            }
            *self.hotplug.write().unwrap() = None;
            let retired = self.log.retire_slot(HOTPLUG).unwrap();
            let mut copy = self.copy.lock().unwrap();
            copy.pages.remove(&HOTPLUG);
            self.vm.delete_slot(HOTPLUG);
            drop(copy);
            // Deleting a slot makes every vCPU leave the guest.
            vcpus.iter().for_each(SimVcpu::exit);
            self.log.finish_slot(&retired).unwrap();
        }
    }

    fn migrate(&self) {
        let copy = &mut *self.copy.lock().unwrap();
        self.log.sync(&mut copy.dirty).unwrap();
        for run in copy.dirty.runs() {
            if let Some(pages) = copy.pages.get_mut(&run.slot) {
                for page in run.first_page..run.first_page + run.pages {
                    pages[page as usize] = self.vm.version(run.slot, page).unwrap();
                }
            }
        }
    }

    fn assert_copied(&self) {
        let copy = self.copy.lock().unwrap();
        assert_eq!(copy.pages.len(), 2);
        for (&slot, pages) in &copy.pages {
            for (page, &version) in pages.iter().enumerate() {
                let truth = self.vm.version(slot, page as u64);
                assert_eq!(truth, Some(version), "slot {slot} page {page}");
            }
        }
    }
}

fn migrate_under_load(mode: Mode, seed: u64) {
    let mut config = SimConfig::default();
    config.mode = mode;
    config.ring_entries = 32;
    config.reserved = 8;
    config.pml = [0, 8][seed as usize % 2];
    config.first_index = u32::MAX - 1000;
    let vm = SimVm::new(config);
    let machine = Machine {
        log: vm.dirty_log(),
        stop: AtomicBool::new(false),
        copy: Mutex::default(),
        hotplug: RwLock::new(None),
        vm,
    };
    let (vm, log) = (&machine.vm, &machine.log);
    log.add_slot(RAM, RAM_PAGES).unwrap();
    vm.create_slot(RAM, RAM_PAGES);
    let ram = vec![0; RAM_PAGES as usize];
    machine.copy.lock().unwrap().pages.insert(RAM, ram);
    let vcpus: Vec<SimVcpu> = (0..3).map(|_| vm.add_vcpu()).collect();
    let reaper = Reaper::spawn(log, Fixed::new(Duration::from_millis(1))).unwrap();
    // A window in which every kind of thread gets to run inside a reset.
    vm.on_reset(|_| thread::yield_now());

    let random = |n| Random(seed << 8 | n);
    let (machine, vcpus) = (&machine, &vcpus[..]);
    thread::scope(|scope| {
        for (n, vcpu) in (0..).zip(vcpus) {
            let ring = log.attach_ring(vcpu.ring_memory()).unwrap();
            scope.spawn(move || machine.run_vcpu(vcpu, ring, random(n)));
        }
        scope.spawn(|| machine.run_device(random(10)));
        scope.spawn(|| machine.run_hotplug(vcpus, random(11)));
        scope.spawn(|| {
            while machine.goes_on() {
                machine.migrate();
            }
        });
        let _over = Over(&machine.stop);
        thread::sleep(Duration::from_millis(150));
        let start = Instant::now();
        while mode == Mode::Rings && log.stats().full_exits() == 0 {
            assert!(start.elapsed() < PATIENCE, "no ring is ever full");
            thread::sleep(Duration::from_millis(1));
        }
    });
    vcpus.iter().for_each(SimVcpu::exit);
    // The reaper still runs.
    machine.migrate();
    machine.assert_copied();
    reaper.stop().unwrap();

    let stats = log.stats();
    let used = stats.full_exits() > 0 && stats.entries > 0;
    assert_eq!(used, mode == Mode::Rings, "{stats:?}");
    let faults = [
        stats.short_resets,
        stats.unknown_slot_entries,
        stats.out_of_range_entries,
        stats.overruns,
    ];
    assert_eq!(faults, [0; 4], "{stats:?}");
}

#[test]
fn a_migration_under_load_loses_no_write() {
    for seed in 0..24 {
        println!("seed {seed}");
        migrate_under_load(Mode::Rings, seed);
    }
}

#[test]
fn a_migration_by_bitmap_under_load_loses_no_write() {
    for seed in 0..24 {
        println!("seed {seed}");
        migrate_under_load(Mode::Bitmap, seed);
    }
}

/// A pass has harvested a page and waits in its reset. The page is not protected yet: a sync that
/// begins now has to report it, and must not return before the reset has.
#[test]
fn a_sync_waits_for_the_pass_that_has_its_pages() {
    for phase in [ResetPhase::Begin, ResetPhase::Recycled] {
        let vm = SimVm::new(SimConfig::default());
        let log = vm.dirty_log();
        log.add_slot(RAM, RAM_PAGES).unwrap();
        vm.create_slot(RAM, RAM_PAGES);
        let vcpu = vm.add_vcpu();
        let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        vcpu.write(RAM, 7).unwrap();

        let (inside, is_inside) = mpsc::channel();
        let (go_on, may_go_on) = mpsc::channel::<()>();
        vm.on_reset(move |now| {
            if now == phase {
                // Only the first reset has somebody who listens.
                let _ = inside.send(());
                let _ = may_go_on.recv();
            }
        });
        thread::scope(|scope| {
            let pass = scope.spawn(|| log.reap().unwrap());
            is_inside.recv_timeout(PATIENCE).expect("a reset");
            let sync = scope.spawn(|| {
                let mut dirty = DirtyPages::new();
                log.sync(&mut dirty).unwrap();
                (dirty, vm.version(RAM, 7))
            });
            // Long enough for a sync that does not wait.
            thread::sleep(Duration::from_millis(50));
            let early = sync.is_finished();
            // Silent.
            vcpu.write(RAM, 7).unwrap();
            drop(go_on);
            assert_eq!(pass.join().unwrap(), 1);
            let (dirty, copied) = sync.join().unwrap();
            assert!(!early);
            assert!(dirty.contains(RAM, 7));
            assert_eq!(copied, Some(2));
        });
    }
}

/// A slot's removal ends only when no pass can mistake the slot's entries for a successor's.
#[test]
fn a_new_slot_waits_for_passes_that_do_not_know_it() {
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    log.add_slot(RAM, RAM_PAGES).unwrap();
    vm.create_slot(RAM, RAM_PAGES);
    let vcpu = vm.add_vcpu();
    let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    vcpu.write(RAM, 7).unwrap();
    let (inside, is_inside) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    vm.on_reset(move |now| {
        if now == ResetPhase::Begin {
            let _ = inside.send(());
            let _ = may_go_on.recv();
        }
    });
    thread::scope(|scope| {
        let pass = scope.spawn(|| log.reap().unwrap());
        is_inside.recv_timeout(PATIENCE).expect("a reset");
        let add = scope.spawn(|| log.add_slot(HOTPLUG, 10).unwrap());
        thread::sleep(Duration::from_millis(50));
        assert!(!add.is_finished());
        drop(go_on);
        pass.join().unwrap();
        add.join().unwrap();
    });
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    assert!(dirty.contains(RAM, 7));
}
