//! Pages that stay open, on the simulated kernel: what is reported of them, and what the kernel is asked for.

#[allow(dead_code, reason = "what other scenarios need, too")]
#[path = "common/scenario.rs"]
mod scenario;

use std::io;

use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::sim::{BitmapFault, ResetFault, SimConfig, SimVcpu, SimVm};
use kvm_dirty_ring::{
    DirtyLog, DirtyPages, Kernel, LastPages, Mode, Run, VcpuRing, WorkingSet, WorkingSetStats,
};
use scenario::{ALL_RAM, RAM, run};

/// One vCPU, and one slot.
struct Machine {
    vm: SimVm,
    log: DirtyLog,
    vcpu: SimVcpu,
    _ring: VcpuRing,
    dirty: DirtyPages,
}

impl Machine {
    fn new(change: impl FnOnce(&mut SimConfig)) -> Self {
        let mut config = SimConfig::default();
        change(&mut config);
        let vm = SimVm::new(config);
        let log = vm.dirty_log();
        log.add_slot(RAM, ALL_RAM.pages).unwrap();
        vm.create_slot(RAM, ALL_RAM.pages);
        let vcpu = vm.add_vcpu();
        let ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        Self {
            vm,
            log,
            vcpu,
            _ring: ring,
            dirty: DirtyPages::new(),
        }
    }

    fn with_rings(places: u64) -> Self {
        let machine = Self::new(|_| ());
        machine.log.set_working_set(Some(WorkingSet::new(places)));
        machine
    }

    /// With a bitmap, in which the pages of `members` are members.
    fn with_bitmap(members: impl IntoIterator<Item = u64> + Clone) -> Self {
        let mut machine = Self::new(|config| config.mode = Mode::Bitmap);
        machine.log.set_working_set(Some(WorkingSet::new(0)));
        for _ in 0..2 {
            machine.write(members.clone());
            machine.sync();
        }
        let joined = members.into_iter().count() as u64;
        assert_eq!(machine.stats().members, joined, "they have not joined");
        machine
    }

    fn write(&self, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            self.vcpu.write(RAM, page).unwrap();
        }
    }

    /// The members and the others that a sync reports.
    fn sync(&mut self) -> [Vec<Run>; 2] {
        self.log.sync(&mut self.dirty).unwrap();
        let parts = [self.dirty.members(), self.dirty.others()];
        let counts = parts.each_ref().map(|part| part.page_count());
        assert_eq!(
            self.dirty.page_count(),
            counts[0] + counts[1],
            "counted twice"
        );
        parts.map(|part| part.runs().collect())
    }

    fn stats(&self) -> WorkingSetStats {
        self.log.stats().working_set
    }

    /// The pages whose bits the kernel has.
    fn kernel_bits(&self) -> Vec<u64> {
        let mut words = [0; 5];
        self.vm.read_bitmap(RAM, ALL_RAM.pages, &mut words).unwrap();
        let pages = 0..ALL_RAM.pages;
        pages
            .filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 == 1)
            .collect()
    }
}

/// It has its bit in a shard, by a pass that had it protected, and is open by now.
#[test]
fn what_was_collected_before_it_joined_is_no_other() {
    let mut machine = Machine::with_rings(0);
    machine.write([5, 6]);
    machine.log.reap().unwrap();
    machine.write([5]);
    assert_eq!(machine.sync(), [vec![run(RAM, 5, 1)], vec![run(RAM, 6, 1)]]);
    // Nothing is logged of it any more.
    machine.write([5, 6]);
    assert_eq!(machine.log.reap().unwrap(), 1);
    assert_eq!(machine.sync(), [vec![run(RAM, 5, 1)], vec![run(RAM, 6, 1)]]);
}

/// The log may be on already, and then nothing is protected.
#[test]
fn a_start_of_what_is_tracked_keeps_members() {
    let mut machine = Machine::with_rings(1);
    machine.write([5]);
    machine.sync();
    machine.log.start_tracking(RAM, || Ok(())).unwrap();
    let all_others = vec![run(RAM, 0, 5), run(RAM, 6, ALL_RAM.pages - 6)];
    assert_eq!(machine.sync(), [vec![run(RAM, 5, 1)], all_others]);
    machine.write([5]);
    assert_eq!(
        machine.sync(),
        [vec![run(RAM, 5, 1)], vec![]],
        "it was lost"
    );
}

/// A stop does, once nothing is logged any more: the start that follows protects everything.
#[test]
fn a_stop_ends_membership() {
    let mut machine = Machine::with_rings(1);
    machine.write([5]);
    machine.sync();
    let switch = |on| {
        machine.vm.set_logged(RAM, on);
        Ok(())
    };
    machine.log.stop_tracking(RAM, || switch(false)).unwrap();
    assert_eq!(machine.stats().members, 0);
    machine.log.start_tracking(RAM, || switch(true)).unwrap();
    assert_eq!(machine.sync(), [vec![], vec![ALL_RAM]]);
    machine.log.set_working_set(None);
    machine.write([5]);
    assert_eq!(machine.sync(), [vec![], vec![run(RAM, 5, 1)]]);
    assert_eq!(machine.sync(), [vec![], vec![]]);
}

/// A stop that fails may have left the log on: nothing is known to be protected by the start that follows.
#[test]
fn a_failed_stop_keeps_members() {
    let mut machine = Machine::with_rings(1);
    machine.write([5]);
    machine.sync();
    let fail = || Err(io::Error::from_raw_os_error(12));
    machine.log.stop_tracking(RAM, fail).unwrap_err();
    assert_eq!(machine.stats().members, 1);
    machine.log.start_tracking(RAM, || Ok(())).unwrap();
    machine.sync();
    machine.write([5]);
    assert_eq!(
        machine.sync(),
        [vec![run(RAM, 5, 1)], vec![]],
        "it was lost"
    );
}

/// The pages of a slot that could not be protected are suspect, and its members are what they were.
#[test]
fn a_failed_refresh_keeps_members() {
    let mut machine = Machine::with_rings(2);
    machine.write([5, 6]);
    machine.sync();
    let fail = |_| Err(io::Error::from_raw_os_error(12));
    let error = machine.log.refresh(fail).unwrap_err();
    assert!(
        matches!(error, SlotError::Protect { slot: RAM, .. }),
        "{error}"
    );
    let stats = machine.stats();
    assert_eq!((stats.members, stats.closed, stats.refreshes), (2, 0, 0));
    for _ in 0..2 {
        assert_eq!(machine.sync(), [vec![], vec![ALL_RAM]]);
    }
    let vm = machine.vm.clone();
    let protect = |slot| {
        vm.rearm_slot(slot);
        Ok(())
    };
    assert_eq!(machine.log.refresh(protect).unwrap(), 1);
    let stats = machine.stats();
    assert_eq!((stats.members, stats.closed, stats.refreshes), (0, 2, 1));
    assert_eq!(machine.sync(), [vec![], vec![ALL_RAM]]);
    assert_eq!(machine.sync(), [vec![], vec![]]);
}

/// A refresh of bits that fails half-way has cleared the first and not the second: both stay members.
#[test]
fn a_failed_clearing_keeps_members() {
    let mut machine = Machine::with_bitmap([5, 6]);
    machine.vm.inject_bitmap([BitmapFault {
        after: 1,
        error: 12,
    }]);
    machine
        .log
        .refresh(|_| panic!("no slot needs it"))
        .unwrap_err();
    assert_eq!(machine.kernel_bits(), [6]);
    assert_eq!(machine.stats().members, 2);
    for _ in 0..2 {
        assert_eq!(
            machine.sync(),
            [vec![run(RAM, 5, 2)], vec![]],
            "they were lost"
        );
    }
    assert_eq!(machine.log.refresh(|_| Ok(())).unwrap(), 1);
    assert_eq!(machine.kernel_bits(), [0u64; 0]);
    assert_eq!(machine.sync(), [vec![], vec![run(RAM, 5, 2)]]);
    assert_eq!(machine.sync(), [vec![], vec![]]);
}

/// Its last sync is the only chance to send them.
#[test]
fn members_of_a_slot_that_goes_are_others() {
    let mut machine = Machine::with_rings(1);
    machine.write([5]);
    machine.sync();
    let retired = machine.log.retire_slot(RAM).unwrap();
    assert_eq!(machine.sync(), [vec![], vec![run(RAM, 5, 1)]]);
    assert_eq!(machine.stats().members, 0, "it holds places");
    // It is kept after all, and they are open still.
    machine.log.keep_slot(&retired).unwrap();
    machine.write([5]);
    assert_eq!(machine.sync(), [vec![run(RAM, 5, 1)], vec![]]);
}

/// That is what members are for: their pages stay writable.
#[test]
fn bits_of_members_are_left() {
    let mut machine = Machine::with_bitmap([5]);
    machine.write([6]);
    for _ in 0..2 {
        assert_eq!(machine.sync()[0], [run(RAM, 5, 1)]);
        assert_eq!(machine.kernel_bits(), [5], "they were cleared");
    }
}

/// Pages in a shard, in the ring, of members, marked by devices, and those of a sync that failed: a last sync has all of
/// them, again and again, and so has the sync that follows, which protects them.
#[test]
fn a_last_sync_takes_nothing() {
    let mut machine = Machine::with_rings(1);
    machine.write([1, 2]);
    machine.log.reap().unwrap();
    machine.vm.inject([ResetFault::Error(12)]);
    machine.write([3]);
    machine.log.reap().unwrap_err();
    machine.write([4]);
    machine.log.mark_dirty(RAM, 5, 1).unwrap();
    let resets = machine.log.stats().resets;
    // There would be places.
    machine.log.set_working_set(Some(WorkingSet::new(10)));
    let mut last = LastPages::new();
    for _ in 0..2 {
        machine.log.last_sync(&mut last).unwrap();
        assert!(last.runs().eq([run(RAM, 1, 5)]), "some were taken");
    }
    assert_eq!(machine.log.stats().resets, resets, "pages were protected");
    assert_eq!(machine.stats().joined, 1, "pages were left open");
    machine.log.set_working_set(Some(WorkingSet::new(1)));
    assert_eq!(machine.sync(), [vec![run(RAM, 1, 1)], vec![run(RAM, 2, 4)]]);
    machine.write([2, 3, 4]);
    assert_eq!(machine.sync(), [vec![run(RAM, 1, 1)], vec![run(RAM, 2, 3)]]);
    assert_eq!(machine.sync(), [vec![run(RAM, 1, 1)], vec![]]);
}

/// Nor what a refresh has closed, and no sync has reported yet.
#[test]
fn a_last_sync_takes_nothing_that_waits() {
    let mut machine = Machine::with_rings(1);
    machine.write([5]);
    machine.sync();
    let protect = |slot| {
        machine.vm.rearm_slot(slot);
        Ok(())
    };
    machine.log.refresh(protect).unwrap();
    let mut last = LastPages::new();
    for _ in 0..2 {
        machine.log.last_sync(&mut last).unwrap();
        assert!(last.runs().eq([run(RAM, 5, 1)]), "it was taken");
    }
    assert_eq!(machine.sync(), [vec![], vec![run(RAM, 5, 1)]]);
    assert_eq!(machine.sync(), [vec![], vec![]]);
}

/// The same of a bitmap.
#[test]
fn a_last_sync_takes_no_bits() {
    let mut machine = Machine::with_bitmap([5]);
    machine.write([6]);
    let mut last = LastPages::new();
    for _ in 0..2 {
        machine.log.last_sync(&mut last).unwrap();
        assert!(last.runs().eq([run(RAM, 5, 2)]), "some were taken");
    }
    assert_eq!(machine.kernel_bits(), [5, 6], "they were cleared");
    assert_eq!(machine.sync(), [vec![run(RAM, 5, 1)], vec![run(RAM, 6, 1)]]);
    assert_eq!(machine.sync(), [vec![run(RAM, 5, 1)], vec![]]);
}

/// A kernel that goes by what it has logged puts a page whose entry was made void into one batch with the one before, and
/// is stopped before it has protected the two.
#[test]
fn a_batch_that_ends_with_a_void_entry_is_suspect_where_the_kernel_ignores_it() {
    let mut machine = Machine::new(|config| config.ignores_voids = true);
    machine.log.set_working_set(Some(WorkingSet::new(1)));
    machine.write([6]);
    machine.sync();
    machine.write([5, 6]);
    machine.vm.inject([ResetFault::AtEnd]);
    machine.sync();
    assert_eq!(machine.log.stats().doubtful_resets, 1);
    machine.write([5]);
    machine.sync();
    assert!(machine.dirty.contains(RAM, 5), "it was lost");
}

/// A void entry of a slot that goes is left in the ring by a reset that falls short. A kernel that goes by what it has logged
/// would recycle it in one batch with entries of a new and smaller slot of that id, which it then forgets.
#[test]
fn no_void_entry_outlives_its_slot() {
    let mut machine = Machine::new(|config| config.ignores_voids = true);
    machine.log.set_working_set(Some(WorkingSet::new(1)));
    machine.write([120]);
    // Neither the reset of each nor its repetition recycles anything.
    machine.vm.inject([ResetFault::Short { after: 0 }; 4]);
    let retired = machine.log.retire_slot(RAM).unwrap();
    machine.vm.delete_slot(RAM);
    machine.log.finish_slot(&retired).unwrap();
    machine.log.add_slot(RAM, 100).unwrap();
    machine.vm.create_slot(RAM, 100);
    for _ in 0..2 {
        machine.write([99]);
        machine.sync();
        assert!(machine.dirty.contains(RAM, 99), "it was lost");
    }
}
