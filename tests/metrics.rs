// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the feature `metrics` publishes: that it is what stats say, described, and in the guide.

#[path = "common/scenario.rs"]
#[expect(dead_code, reason = "other tests ask more of a machine")]
mod scenario;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_dirty_ring::metrics::{describe, publish, publish_named};
use kvm_dirty_ring::pacing::Fixed;
use kvm_dirty_ring::sim::ResetFault;
use kvm_dirty_ring::{Reaper, Stats};
use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, Key, KeyName, Metadata, Recorder, SharedString,
    Unit, with_local_recorder,
};
use scenario::Machine;

/// By name and labels: what a counter or gauge stands at.
#[derive(Default, Clone)]
struct Board {
    values: Arc<Mutex<BTreeMap<String, f64>>>,
    described: Arc<Mutex<BTreeMap<String, (Unit, String)>>>,
}

/// One place on the board.
struct Place {
    board: Board,
    key: String,
}

impl CounterFn for Place {
    fn increment(&self, _: u64) {
        unreachable!("counts are absolute");
    }

    fn absolute(&self, value: u64) {
        let mut values = self.board.values.lock().unwrap();
        let counted = values.entry(self.key.clone()).or_default();
        // As recorders do: a counter never falls.
        *counted = counted.max(value as f64);
    }
}

impl GaugeFn for Place {
    fn increment(&self, _: f64) {
        unreachable!("gauges are set");
    }

    fn decrement(&self, _: f64) {
        unreachable!("gauges are set");
    }

    fn set(&self, value: f64) {
        let mut values = self.board.values.lock().unwrap();
        values.insert(self.key.clone(), value);
    }
}

impl Board {
    fn place(&self, key: &Key) -> Arc<Place> {
        let labels = key.labels().map(|l| format!("{}={}", l.key(), l.value()));
        let labels: Vec<_> = labels.collect();
        Arc::new(Place {
            board: self.clone(),
            key: format!("{}{{{}}}", key.name(), labels.join(",")),
        })
    }

    fn note(&self, key: KeyName, unit: Option<Unit>, help: SharedString) {
        let told = (unit.unwrap(), help.to_string());
        let before = self
            .described
            .lock()
            .unwrap()
            .insert(key.as_str().into(), told);
        assert_eq!(before, None, "{} is described twice", key.as_str());
    }

    fn values(&self) -> BTreeMap<String, f64> {
        self.values.lock().unwrap().clone()
    }
}

impl Recorder for Board {
    fn describe_counter(&self, key: KeyName, unit: Option<Unit>, help: SharedString) {
        assert!(key.as_str().ends_with("_total"));
        self.note(key, unit, help);
    }

    fn describe_gauge(&self, key: KeyName, unit: Option<Unit>, help: SharedString) {
        assert!(!key.as_str().ends_with("_total"));
        self.note(key, unit, help);
    }

    fn describe_histogram(&self, key: KeyName, _: Option<Unit>, _: SharedString) {
        panic!("{} is no histogram", key.as_str());
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        assert!(key.name().ends_with("_total"));
        Counter::from_arc(self.place(key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        assert!(!key.name().ends_with("_total"));
        Gauge::from_arc(self.place(key))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        panic!("{} is no histogram", key.name());
    }
}

/// What is to be on the board of a VM called `vm`.
fn expected(stats: &Stats, vm: &str) -> BTreeMap<String, f64> {
    let reaper = &stats.reaper;
    let of_vm = [
        ("passes_total", stats.passes),
        ("resets_total", stats.resets),
        ("short_resets_total", stats.short_resets),
        ("doubtful_resets_total", stats.doubtful_resets),
        ("failed_resets_total", stats.failed_resets),
        ("unknown_slot_entries_total", stats.unknown_slot_entries),
        ("out_of_range_entries_total", stats.out_of_range_entries),
        ("overruns_total", stats.overruns),
        ("missing_bitmaps_total", stats.missing_bitmaps),
        ("suspect_pages", stats.suspect_pages),
        ("slots_to_rearm", stats.slots_to_rearm),
        ("members", stats.working_set.members),
        ("members_joined_total", stats.working_set.joined),
        ("members_closed_total", stats.working_set.closed),
        ("refreshes_total", stats.working_set.refreshes),
        ("refresh_nanoseconds", stats.working_set.refresh_ns),
        ("refresh_owed", stats.working_set.refresh_owed.into()),
        ("working_set_useless", stats.working_set.useless.into()),
        ("reaper_looks_total", reaper.looks),
        ("reaper_woken_total", reaper.woken),
        ("reaper_passes_total", reaper.passes),
        ("reaper_entries_total", reaper.entries),
        ("reaper_pass_nanoseconds_total", reaper.pass_ns),
        ("reaper_delay_nanoseconds", reaper.delay_ns),
        ("reaper_lateness_nanoseconds", reaper.lateness_ns),
        ("reaper_saturated", reaper.saturated.into()),
    ];
    let mut board = BTreeMap::new();
    for (name, value) in of_vm {
        board.insert(format!("kvm_dirty_ring_{name}{{vm={vm}}}"), value as f64);
    }
    for (place, vcpu) in stats.vcpus.iter().enumerate() {
        let of_vcpu = [
            ("entries_total", vcpu.entries),
            ("full_exits_total", vcpu.full_exits),
            ("stall_nanoseconds_total", vcpu.stall_ns),
            ("soft_limit_entries", vcpu.soft_limit),
            ("limited_nanoseconds_total", vcpu.limited_ns),
            ("broken", vcpu.broken.into()),
            ("dirty_limit_pages", vcpu.dirty_limit.map_or(0, u64::from)),
        ];
        for (name, value) in of_vcpu {
            let key = format!("kvm_dirty_ring_{name}{{vm={vm},vcpu={place}}}");
            board.insert(key, value as f64);
        }
    }
    board
}

/// A machine with two vCPUs to which everything happened that is counted, each as often as no other.
fn eventful() -> Machine {
    let mut machine = Machine::new();
    let second = machine.vm.add_vcpu();
    let mut ring = machine.log.attach_ring(second.ring_memory()).unwrap();
    machine.write(0..20);
    (0..60).for_each(|page| second.write(scenario::RAM, page).unwrap());
    ring.on_full().unwrap();
    machine.ring.on_full().unwrap();
    machine.ring.on_full().unwrap();
    machine.vm.inject([ResetFault::Short { after: 1 }]);
    machine.write(0..10);
    machine.log.reap().unwrap();
    machine.log.set_dirty_limit(1, NonZeroU64::new(5)).unwrap();
    for page in 20..25 {
        machine.vm.inject([ResetFault::AtEnd]);
        machine.write([page]);
        machine.log.reap().unwrap();
    }
    for _ in 0..2 {
        machine.vm.inject([ResetFault::Error(libc::EPERM)]);
        machine.write([1]);
        machine.log.reap().unwrap_err();
    }
    for (raw, pages) in [(9, 100..103), (scenario::ROM.raw(), 110..114)] {
        for page in pages {
            machine.vcpu.garble_next(raw, 70);
            machine.write([page]);
            machine.log.reap().unwrap();
        }
    }
    machine
}

#[test]
fn what_is_published_is_what_stats_say() {
    let machine = eventful();
    let stats = machine.log.stats();
    assert_eq!((stats.short_resets, stats.failed_resets), (1, 2));
    assert_eq!(stats.doubtful_resets, 5);
    assert_eq!(
        (stats.unknown_slot_entries, stats.out_of_range_entries),
        (3, 4)
    );
    assert_eq!(stats.suspect_pages, 370);
    assert_eq!(
        stats.vcpus.iter().map(|v| v.full_exits).collect::<Vec<_>>(),
        [2, 1]
    );
    let board = Board::default();
    with_local_recorder(&board, || publish(&stats, "a"));
    assert_eq!(board.values(), expected(&stats, "a"));

    // Another VM beside it, of which nothing is known yet.
    let nothing = Machine::new().log.stats();
    with_local_recorder(&board, || publish(&nothing, "b"));
    let mut both = expected(&stats, "a");
    both.append(&mut expected(&nothing, "b"));
    assert_eq!(board.values(), both);

    // The same under the name that the log was given.
    let board_of_named = Board::default();
    let named = Machine::new().log;
    with_local_recorder(&board_of_named, || publish_named(&named.stats()));
    assert_eq!(board_of_named.values(), expected(&named.stats(), ""));
    let board_of_named = Board::default();
    named.set_name("c").unwrap();
    with_local_recorder(&board_of_named, || publish_named(&named.stats()));
    assert_eq!(board_of_named.values(), expected(&named.stats(), "c"));

    // Gauges fall, counters don't.
    machine.rearm();
    machine.log.reap().unwrap();
    let later = machine.log.stats();
    assert_eq!(later.suspect_pages, 0);
    with_local_recorder(&board, || publish(&later, "a"));
    both.append(&mut expected(&later, "a"));
    assert_eq!(board.values(), both);
}

/// Each migration has a reaper of its own, and counters that never fall.
#[test]
fn counters_go_on_with_the_next_reaper() {
    let machine = Machine::new();
    let board = Board::default();
    let mut looks = 0;
    for _ in 0..3 {
        let reaper = Reaper::spawn(&machine.log, Fixed::default()).unwrap();
        let start = Instant::now();
        while machine.log.stats().reaper.looks == looks {
            let patience = Duration::from_secs(60);
            assert!(start.elapsed() < patience, "the reaper never looks");
            std::thread::yield_now();
        }
        reaper.stop().unwrap();
        let stats = machine.log.stats();
        assert!(stats.reaper.looks > looks);
        looks = stats.reaper.looks;
        with_local_recorder(&board, || publish(&stats, "a"));
        assert_eq!(board.values(), expected(&stats, "a"));
    }
}

#[test]
fn each_is_described_and_in_the_guide() {
    let board = Board::default();
    with_local_recorder(&board, || {
        describe();
        publish(&eventful().log.stats(), "a");
    });
    let described = board.described.lock().unwrap().clone();
    let values = board.values();
    let published = values.keys().map(|key| key.split('{').next().unwrap());
    let published: BTreeSet<_> = published.collect();
    assert!(
        described
            .keys()
            .map(String::as_str)
            .eq(published.iter().copied())
    );
    for (name, (unit, help)) in &described {
        let is_time = name.contains("nanoseconds");
        assert_eq!(*unit == Unit::Nanoseconds, is_time, "{name}");
        assert!(help.ends_with('.'), "{name}: {help}");
    }
    let guide = include_str!("../docs/operations.md");
    let rows = guide
        .lines()
        .filter_map(|line| line.strip_prefix("| `kvm_dirty_ring_"));
    let rows = rows.filter(|row| row.contains("` | `vm`"));
    let names = rows.map(|row| format!("kvm_dirty_ring_{}", row.split('`').next().unwrap()));
    assert!(
        names.collect::<BTreeSet<_>>().iter().eq(published),
        "docs/operations.md"
    );
}
