// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Events of the feature `tracing`: which there are, what they say, and that a subscriber which is
//! slow, panics or asks back harms nobody.

#[path = "common/ear.rs"]
mod ear;
#[path = "common/scenario.rs"]
mod scenario;

use std::cell::Cell;
use std::io;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ear::{Listening, PATIENCE, Told, lock, names};
use kvm_dirty_ring::error::ReaperError;
use kvm_dirty_ring::pacing::{Fixed, Observation, Pacing};
use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVm};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Kernel, Reaper, Stats};
use scenario::{Machine, RAM, ROM, run};
use tracing::Level;

#[test]
fn a_full_exit_is_told_on_its_own_thread() {
    let listening = Listening::new();
    let mut machine = Machine::new();
    let second = machine.vm.add_vcpu();
    let mut ring = machine.log.attach_ring(second.ring_memory()).unwrap();
    assert_eq!((machine.ring.index(), ring.index()), (0, 1));
    (0..60).for_each(|page| second.write(RAM, page).unwrap());
    ring.on_full().unwrap();
    machine.ring.on_full().unwrap();
    let told = listening.take();
    assert_eq!(names(&told), ["kvm_dirty_ring_full"; 2]);
    for (told, (vcpu, entries)) in told.iter().zip([(1, 60), (0, 0)]) {
        assert_eq!(told.level, Level::DEBUG);
        assert_eq!((told.count("vcpu"), told.count("entries")), (vcpu, entries));
        let stall = machine.log.stats().vcpus[vcpu as usize].stall_ns;
        assert_eq!(told.count("ns"), stall);
    }
}

#[test]
fn passes_and_syncs_are_told() {
    let listening = Listening::new();
    let mut machine = Machine::new();
    let second = machine.vm.add_vcpu();
    let _ring = machine.log.attach_ring(second.ring_memory()).unwrap();
    machine.write(0..3);
    second.write(RAM, 9).unwrap();
    assert_eq!(machine.log.reap().unwrap(), 4);
    let told = listening.take();
    let (vcpu, pass) = ("kvm_dirty_ring_reap_vcpu", "kvm_dirty_ring_reap");
    assert_eq!(names(&told), [vcpu, vcpu, pass]);
    for (told, (vcpu, entries)) in told.iter().zip([(0, 3), (1, 1)]) {
        assert_eq!(told.level, Level::TRACE);
        assert_eq!((told.count("vcpu"), told.count("entries")), (vcpu, entries));
    }
    assert_eq!((told[2].level, told[2].count("entries")), (Level::DEBUG, 4));
    assert!(told[2].count("ns") > 0);

    machine.write([5]);
    assert_eq!(machine.log.reap_rings(&[false, true]).unwrap(), 0);
    assert_eq!(names(&listening.take()), [vcpu, pass]);
    machine.sync();
    let told = listening.take();
    assert_eq!(names(&told), ["kvm_dirty_ring_flush"; 2]);
    assert_eq!(told[0].fields["finished"], "false");
    assert_eq!(told[1].fields["finished"], "true");
    assert_eq!(told[1].count("pages"), 5);
    assert!(told[1].count("ns") > 0);
}

/// An event of its own shows that a slot has so many suspects that it pays to re-arm it.
#[test]
fn an_event_shows_where_a_rearming_pays() {
    for (suspects, slots) in [
        (Stats::REARM_PAYS_FROM - 1, None),
        (Stats::REARM_PAYS_FROM, Some(1)),
    ] {
        let vm = SimVm::new(SimConfig::default());
        let log = vm.dirty_log();
        log.add_slot(RAM, 4000).unwrap();
        vm.create_slot(RAM, 4000);
        let vcpu = vm.add_vcpu();
        let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        let listening = Listening::new();
        vm.inject([ResetFault::Short { after: 1 }]);
        (0..suspects).for_each(|page| vcpu.write(RAM, page).unwrap());
        log.reap().unwrap();
        let told = listening.take();
        let pays = told
            .iter()
            .find(|told| told.name == "kvm_dirty_ring_rearm_pays");
        assert_eq!(pays.map(|told| told.count("slots")), slots, "{told:?}");
    }
}

/// Each is emitted once, at the end of the call that met it, with what is suspect by then.
#[test]
fn what_goes_wrong_is_told_once() {
    let listening = Listening::new();
    let mut machine = Machine::new();
    let expect = |machine: &Machine, name, count, pages| {
        let told = listening.take();
        let warnings: Vec<_> = told
            .iter()
            .filter(|told| told.level == Level::WARN)
            .collect();
        assert_eq!(warnings.len(), 2, "{told:?}");
        assert_eq!(
            (warnings[0].name, warnings[0].count("count")),
            (name, count)
        );
        assert_eq!(warnings[1].name, "kvm_dirty_ring_suspects");
        assert_eq!(warnings[1].count("pages"), pages);
        if name == "kvm_dirty_ring_overrun" {
            // For good.
            return;
        }
        machine.rearm();
        let told = listening.take();
        assert_eq!(names(&told), ["kvm_dirty_ring_rearmed"; 2]);
        let slots = told
            .iter()
            .map(|t| (t.count("address_space"), t.count("slot")));
        assert!(slots.eq([(0, 0), (1, 2)]), "{told:?}");
    };
    machine.vm.inject([ResetFault::Short { after: 1 }]);
    machine.write(0..10);
    machine.log.reap().unwrap();
    expect(&machine, "kvm_dirty_ring_short_reset", 1, 10);

    // The page, and 63 about it. The other vCPU's ring was never harvested.
    machine.vm.inject([ResetFault::AtEnd]);
    machine.write([0]);
    machine.log.reap().unwrap();
    expect(&machine, "kvm_dirty_ring_doubtful_reset", 1, 64);

    machine.vm.inject([ResetFault::Error(libc::EPERM)]);
    machine.write(20..30);
    machine.ring.on_full().unwrap_err();
    expect(&machine, "kvm_dirty_ring_failed_reset", 1, 0);

    for (raw, page, name) in [
        (7, 0, "kvm_dirty_ring_unknown_slot"),
        (ROM.raw(), 70, "kvm_dirty_ring_out_of_range"),
    ] {
        machine.vcpu.garble_next(raw, page);
        machine.write([5]);
        machine.sync();
        expect(&machine, name, 1, 370);
        machine.sync();
    }

    machine.vcpu.ignore_soft_limit(true);
    machine.write(100..170);
    machine.vcpu.ignore_soft_limit(false);
    machine.sync();
    expect(&machine, "kvm_dirty_ring_overrun", 1, 370);

    // Nothing is emitted twice.
    machine.sync();
    machine.log.reap().unwrap();
    let retired = machine.log.retire_slot(ROM).unwrap();
    machine.vm.delete_slot(ROM);
    machine.log.finish_slot(&retired).unwrap();
    let told = listening.take();
    assert!(told.iter().all(|told| told.level > Level::WARN), "{told:?}");
}

thread_local! {
    /// Whether this thread is inside a reset, with its signals blocked if the kernel is KVM.
    static RESETS: Cell<bool> = const { Cell::new(false) };
    /// Whether this thread's events are to be asked about.
    static ASKED: Cell<bool> = const { Cell::new(false) };
}

/// The simulated kernel, which knows who is inside a reset.
struct Watched(SimVm);

impl Kernel for Watched {
    fn reset(&self) -> io::Result<kvm_dirty_ring::Recycled> {
        RESETS.set(true);
        let result = self.0.reset();
        RESETS.set(false);
        result
    }
}

/// While a subscriber takes its time over any event, everybody else can do anything; and it can ask.
#[test]
fn an_event_holds_nobody_up() {
    let listening = Listening::new();
    let mut config = SimConfig::default();
    config.ring_entries = 64;
    config.reserved = 4;
    let vm = SimVm::new(config);
    let log = DirtyLog::with_kernel(Box::new(Watched(vm.clone())), 64);
    for (slot, pages) in [(RAM, 300), (ROM, 70)] {
        log.add_slot(slot, pages).unwrap();
        vm.create_slot(slot, pages);
    }
    let vcpu = vm.add_vcpu();
    let mut ring = log.attach_ring(vcpu.ring_memory()).unwrap();

    // Another vCPU, which stops on a full ring whenever it is asked to, and then a sync.
    let (ask, asked) = mpsc::sync_channel::<()>(0);
    let (answer, answered) = mpsc::channel::<()>();
    let other = vm.add_vcpu();
    let mut others_ring = log.attach_ring(other.ring_memory()).unwrap();
    let others_log = log.clone();
    let helper = thread::spawn(move || {
        let mut dirty = DirtyPages::new();
        for () in asked {
            other.write(RAM, 250).unwrap();
            others_ring.on_full().unwrap();
            others_log.sync(&mut dirty).unwrap();
            others_log.rearmed(RAM).unwrap();
            others_log.reap().unwrap();
            // Nobody waits for it where it has taken too long.
            let _ = answer.send(());
        }
    });
    let (ask, answered) = (Mutex::new(ask), Mutex::new(answered));
    let (hooks_log, heard) = (log.clone(), Arc::new(Mutex::new(Vec::new())));
    let hooks_heard = Arc::clone(&heard);
    let held_up = Arc::<Mutex<Vec<_>>>::default();
    let hooks_held_up = Arc::clone(&held_up);
    listening.hook(move |told| {
        if !ASKED.get() {
            return;
        }
        lock(&hooks_heard).push((told.name, RESETS.get()));
        let mut rings = Vec::new();
        hooks_log.observe(&mut rings);
        if rings.len() != hooks_log.stats().vcpus.len() {
            lock(&hooks_held_up).push("a look");
        }
        lock(&ask).send(()).unwrap();
        // Returning lets the others go on.
        if lock(&answered).recv_timeout(PATIENCE).is_err() {
            lock(&hooks_held_up).push(told.name);
            ASKED.set(false);
        }
    });

    ASKED.set(true);
    let mut dirty = DirtyPages::new();
    (0..60).for_each(|page| vcpu.write(RAM, page).unwrap());
    ring.on_full().unwrap();
    vcpu.write(RAM, 1).unwrap();
    log.reap().unwrap();
    log.sync(&mut dirty).unwrap();
    vm.inject([ResetFault::Short { after: 0 }]);
    vcpu.write(ROM, 2).unwrap();
    let retired = log.retire_slot(ROM).unwrap();
    vm.delete_slot(ROM);
    log.finish_slot(&retired).unwrap();
    vm.rearm_slot(RAM);
    log.rearmed(RAM).unwrap();
    ASKED.set(false);

    let held_up = core::mem::take(&mut *lock(&held_up));
    assert!(held_up.is_empty(), "{held_up:?} holds others up");
    let heard = core::mem::take(&mut *lock(&heard));
    for name in [
        "kvm_dirty_ring_full",
        "kvm_dirty_ring_reap_vcpu",
        "kvm_dirty_ring_reap",
        "kvm_dirty_ring_flush",
        "kvm_dirty_ring_short_reset",
        "kvm_dirty_ring_suspects",
        "kvm_dirty_ring_rearmed",
    ] {
        assert!(
            heard.iter().any(|(heard, _)| *heard == name),
            "{name}: {heard:?}"
        );
    }
    assert!(heard.iter().all(|(_, resets)| !resets), "{heard:?}");
    drop(listening);
    helper.join().unwrap();
}

/// A subscriber that panics in an event loses the event, and nothing else.
#[test]
fn a_subscriber_that_panics_loses_no_page() {
    let listening = Listening::new();
    listening.hook(|_| {
        // Not through the hook of panics: it would say so a hundred times. Its payload is leaked, so
        // it takes no memory.
        std::panic::resume_unwind(Box::new(()));
    });
    let mut machine = Machine::new();
    let reaper = Reaper::spawn(&machine.log, Fixed::new(Duration::from_millis(1))).unwrap();
    listening.wait_for_state("wakeup");
    machine.write(0..60);
    machine.ring.on_full().unwrap();
    machine.vm.inject([ResetFault::Short { after: 1 }]);
    machine.write([100, 110]);
    machine.log.reap().unwrap();
    machine.write([200]);
    assert!(machine.sync().contains(&run(RAM, 200, 1)));
    machine.rearm();
    assert!(reaper.is_running());
    reaper.stop().unwrap();
    machine.sync();
    assert_eq!(machine.sync(), []);
    machine.write([7]);
    assert_eq!(machine.sync(), [run(RAM, 7, 1)]);
}

/// Looks when it is kicked, or so it asks.
struct Sleepy;

impl Pacing for Sleepy {
    fn decide(&mut self, _: &Observation<'_>, reap: &mut [bool]) -> Duration {
        reap.fill(true);
        Duration::from_secs(10)
    }
}

/// Panics.
struct Wrong;

impl Pacing for Wrong {
    fn decide(&mut self, _: &Observation<'_>, _: &mut [bool]) -> Duration {
        std::panic::resume_unwind(Box::new(()))
    }
}

#[test]
fn the_life_of_a_reaper_is_told() {
    let listening = Listening::new();
    let mut machine = Machine::new();
    let reaper = Reaper::spawn(&machine.log, Sleepy).unwrap();
    listening.wait_for_state("wakeup");
    let told = listening.take();
    let at = |state| {
        let found = told
            .iter()
            .position(|told| told.fields.get("state") == Some(&state));
        found.unwrap_or_else(|| panic!("{told:?}"))
    };
    let (init, wakeup) = (at("init".to_owned()), at("wakeup".to_owned()));
    assert!(init < wakeup);
    let levels = [init, wakeup].map(|at| told[at].level);
    assert_eq!(levels, [Level::DEBUG, Level::TRACE]);
    assert_eq!(told[wakeup].count("rings"), 1);
    assert!(told[wakeup].count("delay_ns") > 1_000_000_000);

    let kick = |reason: &'static str| {
        move |told: &Told| {
            told.name == "kvm_dirty_ring_reaper_kick" && told.fields["reason"] == reason
        }
    };
    machine.write([3]);
    machine.ring.on_full().unwrap();
    listening.wait_for("a kick by a full ring", kick("full"));
    reaper.pause();
    listening.wait_for_state("pause");
    reaper.resume();
    listening.wait_for_state("resume");
    listening.wait_for("a kick by an order", kick("order"));
    reaper.set_policy(Wrong);
    listening.wait_for_state("policy");
    listening.wait_for("an error", |told| {
        let error = told.fields.get("error").map_or("", String::as_str);
        told.name == "kvm_dirty_ring_reaper_error"
            && told.level == Level::WARN
            && error.contains("policy")
    });
    assert!(matches!(reaper.take_error(), Some(ReaperError::Policy(_))));
    reaper.stop().unwrap();
    listening.wait_for_state("end");
}

/// The event alone must show why KVM refused: a VM that is gone, or a filter.
#[test]
fn a_reset_that_fails_is_told_with_its_reason() {
    let listening = Listening::new();
    let machine = Machine::new();
    machine.vm.inject([ResetFault::Error(libc::EPERM)]);
    machine.write([3]);
    let reaper = Reaper::spawn(&machine.log, Sleepy).unwrap();
    let reason = io::Error::from_raw_os_error(libc::EPERM).to_string();
    listening.wait_for("an error with its reason", |told| {
        let error = told.fields.get("error").map_or("", String::as_str);
        told.name == "kvm_dirty_ring_reaper_error" && error.ends_with(&reason)
    });
    drop(reaper);
}

/// Events of two VMs in one process have two names, whatever thread they come from.
#[test]
fn each_event_has_the_name_of_its_vm() {
    let listening = Listening::new();
    let mut machine = Machine::new();
    machine.sync();
    let nameless = listening.take();
    assert!(
        nameless.iter().all(|told| !told.fields.contains_key("vm")),
        "{nameless:?}"
    );
    machine.log.set_name("vm-7").unwrap();
    let refused = machine.log.set_name("vm-8").unwrap_err();
    assert!(refused.to_string().contains("vm-7"), "{refused}");
    assert_eq!(machine.log.stats().vm.as_deref(), Some("vm-7"));

    let reaper = Reaper::spawn(&machine.log, Sleepy).unwrap();
    listening.wait_for_state("wakeup");
    machine.write([3]);
    machine.ring.on_full().unwrap();
    reaper.pause();
    reaper.resume();
    reaper.set_policy(Wrong);
    listening.wait_for("an error", |told| {
        told.name == "kvm_dirty_ring_reaper_error"
    });
    reaper.stop().unwrap();
    machine.vm.inject([ResetFault::Short { after: 1 }]);
    machine.write(0..10);
    machine.log.reap().unwrap();
    machine.sync();
    machine.rearm();
    machine
        .log
        .refresh(|slot| {
            machine.vm.rearm_slot(slot);
            Ok(())
        })
        .unwrap();
    let told = listening.take();
    for told in &told {
        let vm = told.fields.get("vm").map(String::as_str);
        assert_eq!(vm, Some("vm-7"), "{told:?}");
    }
    let mut kinds = names(&told);
    kinds.sort_unstable();
    kinds.dedup();
    // The reaper's four, and what a pass, a sync, a full exit, a fault and its end tell.
    assert!(kinds.len() >= 10, "{kinds:?}");

    let other = Machine::new();
    other.log.set_name("vm-8").unwrap();
    other.log.reap().unwrap();
    assert_eq!(listening.take()[0].fields["vm"], "vm-8");
}

/// Under its whole name, or in a row of such as begin alike.
#[test]
fn each_event_is_in_the_guide() {
    let guide = include_str!("../docs/operations.md");
    let source = include_str!("../src/observe/trace.rs");
    let names = source.split("\"kvm_dirty_ring_").skip(1);
    let names: Vec<_> = names.map(|rest| rest.split('"').next().unwrap()).collect();
    assert!(names.len() > 10, "{names:?}");
    for name in names {
        let named = ["`kvm_dirty_ring_", "`_"].iter();
        let mut named = named.map(|start| format!("{start}{name}`"));
        assert!(named.any(|named| guide.contains(&named)), "{name}");
    }
}
