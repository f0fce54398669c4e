// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages that stay open: sent once, and never lost.

use kvm_dirty_ring::sim::{SimConfig, SimVcpu};
use kvm_dirty_ring::{Mode, VcpuRing};

use super::*;

const PAGES: u64 = 400;
/// What the guest writes over and over: its first pages.
const HOT: u64 = 100;
/// How often between two syncs.
const TIMES: u64 = 5;

/// A guest of one vCPU, which runs when it is looked after and when it is paused, and at no other time.
struct Scripted {
    vm: SimVm,
    log: DirtyLog,
    slots: Vec<GuestSlot>,
    vcpu: SimVcpu,
    _ring: VcpuRing,
    stores: u64,
    /// Whether it writes other pages, too: one between two syncs.
    is_all_hot: bool,
}

impl Scripted {
    fn new(config: SimConfig) -> Self {
        let vm = SimVm::new(config);
        let log = vm.dirty_log();
        let id = SlotId::new(0, 4);
        log.add_slot(id, PAGES).unwrap();
        vm.create_slot(id, PAGES);
        let vcpu = vm.add_vcpu();
        let ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        let memory = Arc::new(GuestMemory::new(PAGES).unwrap());
        let region = Region {
            gpa: 0,
            pages: PAGES,
        };
        Self {
            vm,
            log,
            slots: vec![GuestSlot { id, region, memory }],
            vcpu,
            _ring: ring,
            stores: 0,
            is_all_hot: false,
        }
    }

    fn store(&mut self, page: u64) {
        self.stores += 1;
        let (slot, stores) = (&self.slots[0], self.stores);
        let store = || slot.memory.write_u64(page * PAGE_SIZE, stores);
        self.vcpu.write_with(slot.id, page, store).unwrap();
    }

    fn run(&mut self) {
        for _ in 0..TIMES {
            (0..HOT).for_each(|page| self.store(page));
            self.vcpu.exit();
            self.log.reap().unwrap();
        }
        if !self.is_all_hot {
            self.store(PAGES - 1 - self.stores % 50);
            self.vcpu.exit();
        }
    }
}

impl Machine for Scripted {
    fn log(&self) -> &DirtyLog {
        &self.log
    }

    fn kick(&self) -> crate::machine::Kick {
        Box::new(|_| ())
    }
}

impl Guest for Scripted {
    fn slots(&self) -> &[GuestSlot] {
        &self.slots
    }

    fn stores(&self) -> u64 {
        self.stores
    }

    fn check(&mut self) -> Result<()> {
        self.run();
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        self.run();
        Ok(())
    }

    fn resume(&mut self) {}

    fn protect(&mut self, slot: SlotId) -> Result<()> {
        self.vm.rearm_slot(slot);
        Ok(())
    }
}

/// Of rings, of rings whose kernel does not look at void entries, and of bitmaps.
fn configs() -> [SimConfig; 3] {
    let mut configs = [0; 3].map(|_| SimConfig::default());
    configs[1].ignores_voids = true;
    configs[2].mode = Mode::Bitmap;
    configs
}

fn with(places: Places) -> Limits {
    Limits {
        places,
        max_rounds: 8,
        downtime: Duration::ZERO,
        ..LIMITS
    }
}

#[test]
fn what_is_written_all_the_time_is_logged_and_sent_once() {
    let migrate = |places| {
        let mut guest = Scripted::new(SimConfig::default());
        let outcome = run(&mut guest, &with(places));
        assert_eq!(outcome.mismatched_pages, 0);
        (outcome, guest.log.stats().entries)
    };
    let (off, entries_off) = migrate(Places::Off);
    let (on, entries_on) = migrate(Places::Pages(HOT));
    assert!(
        entries_on * 4 < entries_off,
        "{entries_on} of {entries_off}"
    );
    assert!(on.pages_sent() < off.pages_sent());
    assert!(on.rounds.len() <= off.rounds.len());
    assert!(off.rounds.iter().all(|round| round.members == 0));
    let open: Vec<u64> = on.rounds.iter().map(|round| round.members).collect();
    let [_, open @ .., last] = &open[..] else {
        panic!("{open:?}");
    };
    assert!(open.iter().all(|&members| members >= HOT), "{open:?}");
    assert_eq!(*last, 0);
    assert!(on.rounds.last().unwrap().pages >= HOT);
}

#[test]
fn all_arrives_in_each_kind_of_log() {
    for (kind, config) in configs().into_iter().enumerate() {
        for places in [0, 1, 30, HOT, PAGES] {
            let mut guest = Scripted::new(config.clone());
            let outcome = run(&mut guest, &with(Places::Pages(places)));
            assert_eq!(outcome.mismatched_pages, 0, "{kind}: {places}");
            let joined = guest.log.stats().working_set.joined;
            assert!(
                joined > 0,
                "{kind}: nothing stayed open, with {places} places"
            );
        }
    }
}

#[test]
fn what_stays_open_beside_running_vcpus_arrives() {
    for config in configs() {
        let mut machine = SimMachine::with(&busy_setup(), config).unwrap();
        let limits = Limits {
            bandwidth_mib: 100,
            max_rounds: 4,
            downtime: Duration::from_millis(5),
            places: Places::Auto,
            ..LIMITS
        };
        let outcome = run(&mut machine, &limits);
        assert_eq!(outcome.mismatched_pages, 0, "{outcome:?}");
    }
}

/// All that it has left open does not fit, whatever else does.
#[test]
fn a_refresh_closes_what_does_not_fit_and_is_made_once_if_it_takes_too_long() {
    for config in configs() {
        let mode = config.mode;
        let mut guest = Scripted::new(config);
        guest.is_all_hot = true;
        let outcome = run(&mut guest, &with(Places::Pages(PAGES)));
        let closed = guest.log.stats().working_set.closed;
        assert!(outcome.refreshes > 0 && closed > 0, "{mode}: {outcome:?}");
        let stopped = !outcome.refreshing.is_zero();
        assert_eq!(stopped, mode == Mode::Rings);
        // No pause but none fits into this downtime.
        assert!(!stopped || outcome.refreshes == 1, "{outcome:?}");
        assert_eq!(outcome.mismatched_pages, 0, "{mode}");
    }
}

#[test]
fn a_guest_without_hope_is_said_to_be_and_sent_at_once() {
    let outcome = run(&mut Scripted::new(SimConfig::default()), &with(Places::Off));
    assert!(!outcome.converged && outcome.hopeless.is_some());
    // Two rounds that brought nothing, after the one that sent all.
    let running = outcome.rounds.iter().filter(|round| round.running);
    assert_eq!(running.count(), 3);
}
