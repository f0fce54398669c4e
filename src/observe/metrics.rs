// SPDX-License-Identifier: Apache-2.0 OR MIT
//! [`Stats`] as metrics, for recorders of the crate metrics 0.24 (feature `metrics`).
//!
//! The VMM publishes them when it calls [`publish`], on a thread of its choice. It costs vCPUs and the reaper nothing. Counters are
//! those of [`Stats`] and only rise; gauges are current values.
//!
//! | metric | labels | is |
//! |---|---|---|
//! | `kvm_dirty_ring_passes_total` | `vm` | [`Stats::passes`] |
//! | `kvm_dirty_ring_resets_total` | `vm` | [`Stats::resets`] |
//! | `kvm_dirty_ring_short_resets_total` | `vm` | [`Stats::short_resets`] |
//! | `kvm_dirty_ring_doubtful_resets_total` | `vm` | [`Stats::doubtful_resets`] |
//! | `kvm_dirty_ring_failed_resets_total` | `vm` | [`Stats::failed_resets`] |
//! | `kvm_dirty_ring_unknown_slot_entries_total` | `vm` | [`Stats::unknown_slot_entries`] |
//! | `kvm_dirty_ring_out_of_range_entries_total` | `vm` | [`Stats::out_of_range_entries`] |
//! | `kvm_dirty_ring_overruns_total` | `vm` | [`Stats::overruns`] |
//! | `kvm_dirty_ring_missing_bitmaps_total` | `vm` | [`Stats::missing_bitmaps`] |
//! | `kvm_dirty_ring_suspect_pages` | `vm` | [`Stats::suspect_pages`], a gauge |
//! | `kvm_dirty_ring_slots_to_rearm` | `vm` | [`Stats::slots_to_rearm`], a gauge |
//! | `kvm_dirty_ring_members` | `vm` | [`WorkingSetStats::members`], a gauge |
//! | `kvm_dirty_ring_members_joined_total` | `vm` | [`WorkingSetStats::joined`] |
//! | `kvm_dirty_ring_members_closed_total` | `vm` | [`WorkingSetStats::closed`] |
//! | `kvm_dirty_ring_refreshes_total` | `vm` | [`WorkingSetStats::refreshes`] |
//! | `kvm_dirty_ring_refresh_nanoseconds` | `vm` | [`WorkingSetStats::refresh_ns`], a gauge: the last one's |
//! | `kvm_dirty_ring_refresh_owed` | `vm` | [`WorkingSetStats::refresh_owed`], a gauge of 0 or 1 |
//! | `kvm_dirty_ring_working_set_useless` | `vm` | [`WorkingSetStats::useless`], a gauge of 0 or 1 |
//! | `kvm_dirty_ring_entries_total` | `vm`, `vcpu` | [`VcpuStats::entries`] |
//! | `kvm_dirty_ring_full_exits_total` | `vm`, `vcpu` | [`VcpuStats::full_exits`] |
//! | `kvm_dirty_ring_stall_nanoseconds_total` | `vm`, `vcpu` | [`VcpuStats::stall_ns`] |
//! | `kvm_dirty_ring_soft_limit_entries` | `vm`, `vcpu` | [`VcpuStats::soft_limit`], a gauge |
//! | `kvm_dirty_ring_broken` | `vm`, `vcpu` | [`VcpuStats::broken`], a gauge of 0 or 1 |
//! | `kvm_dirty_ring_limited_nanoseconds_total` | `vm`, `vcpu` | [`VcpuStats::limited_ns`] |
//! | `kvm_dirty_ring_dirty_limit_pages` | `vm`, `vcpu` | [`VcpuStats::dirty_limit`], pages a second; a gauge, 0 without a limit |
//! | `kvm_dirty_ring_reaper_looks_total` | `vm` | [`ReaperStats::looks`] |
//! | `kvm_dirty_ring_reaper_woken_total` | `vm` | [`ReaperStats::woken`] |
//! | `kvm_dirty_ring_reaper_passes_total` | `vm` | [`ReaperStats::passes`] |
//! | `kvm_dirty_ring_reaper_entries_total` | `vm` | [`ReaperStats::entries`] |
//! | `kvm_dirty_ring_reaper_pass_nanoseconds_total` | `vm` | [`ReaperStats::pass_ns`] |
//! | `kvm_dirty_ring_reaper_delay_nanoseconds` | `vm` | [`ReaperStats::delay_ns`], a gauge |
//! | `kvm_dirty_ring_reaper_lateness_nanoseconds` | `vm` | [`ReaperStats::lateness_ns`], a gauge |
//! | `kvm_dirty_ring_reaper_saturated` | `vm` | [`ReaperStats::saturated`], a gauge of 0 or 1 |
//!
//! `vcpu` is the vCPU's place in [`Stats::vcpus`]. Times are whole nanoseconds, because counters of that crate are integers. For
//! the entries per reset, divide `sum by (vm)` of the rate of `kvm_dirty_ring_entries_total` by the rate of
//! `kvm_dirty_ring_resets_total`.
//!
//! ```no_run
//! # fn example(log: &kvm_dirty_ring::DirtyLog) {
//! kvm_dirty_ring::metrics::describe(); // once, when the recorder is installed
//! loop {
//!     kvm_dirty_ring::metrics::publish(&log.stats(), "vm-7");
//!     std::thread::sleep(std::time::Duration::from_secs(1));
//! }
//! # }
//! ```

use metrics::{Label, SharedString, Unit};

#[cfg(doc)]
use crate::observe::stats::WorkingSetStats;
use crate::observe::stats::{ReaperStats, Stats, VcpuStats};
use crate::sync::Arc;

/// One metric, made of a `T`.
struct Metric<T> {
    name: &'static str,
    unit: Unit,
    help: &'static str,
    kind: Kind,
    value: fn(&T) -> u64,
}

enum Kind {
    Counter,
    Gauge,
}

macro_rules! table {
    ($($kind:ident $name:literal $unit:ident $help:literal $value:expr;)*) => {
        [$(Metric {
            name: concat!("kvm_dirty_ring_", $name),
            unit: Unit::$unit,
            help: $help,
            kind: Kind::$kind,
            value: $value,
        }),*]
    };
}

const VM: [Metric<Stats>; 18] = table! {
    Counter "passes_total" Count "Passes begun, by any thread." |s| s.passes;
    Counter "resets_total" Count "Reset ioctls issued." |s| s.resets;
    Counter "short_resets_total" Count
        "Resets that recycled less than was marked: pages are suspect." |s| s.short_resets;
    Counter "doubtful_resets_total" Count
        "Resets during which their thread may have been stopped: pages are suspect."
        |s| s.doubtful_resets;
    Counter "failed_resets_total" Count "Resets that KVM refused." |s| s.failed_resets;
    Counter "unknown_slot_entries_total" Count
        "Entries of slots that are not tracked: pages are suspect." |s| s.unknown_slot_entries;
    Counter "out_of_range_entries_total" Count
        "Entries past the end of their slot: pages are suspect." |s| s.out_of_range_entries;
    Counter "overruns_total" Count "Rings that KVM has overrun: all pages stay suspect." |s| s.overruns;
    Counter "missing_bitmaps_total" Count
        "Bitmaps of slots that KVM did not return." |s| s.missing_bitmaps;
    Gauge "suspect_pages" Count
        "Pages that may be written without being logged, and come with each sync." |s| s.suspect_pages;
    Gauge "slots_to_rearm" Count "Slots that have so many suspect pages that it pays to re-arm them." |s| s.slots_to_rearm;
    Gauge "members" Count "Pages that stay open, and come with each sync." |s| s.working_set.members;
    Counter "members_joined_total" Count "Times that a page was left open." |s| s.working_set.joined;
    Counter "members_closed_total" Count "Open pages that refreshes have closed." |s| s.working_set.closed;
    Counter "refreshes_total" Count "Refreshes that closed all open pages." |s| s.working_set.refreshes;
    Gauge "refresh_nanoseconds" Nanoseconds "Time that the last refresh took." |s| s.working_set.refresh_ns;
    Gauge "refresh_owed" Count
        "1 if open pages are left and no page is left open any more." |s| s.working_set.refresh_owed.into();
    Gauge "working_set_useless" Count
        "1 if KVM protects pages that should stay open." |s| s.working_set.useless.into();
};

const VCPU: [Metric<VcpuStats>; 7] = table! {
    Counter "entries_total" Count "Entries harvested from the vCPU's ring." |s| s.entries;
    Counter "full_exits_total" Count "Stops of the vCPU on its full ring." |s| s.full_exits;
    Counter "stall_nanoseconds_total" Nanoseconds
        "Time that the vCPU spent in stops on its full ring." |s| s.stall_ns;
    Gauge "soft_limit_entries" Count "Entries at which KVM stops the vCPU." |s| s.soft_limit;
    Gauge "broken" Count
        "1 if KVM has overrun the ring: all pages of the VM stay suspect." |s| s.broken.into();
    Counter "limited_nanoseconds_total" Nanoseconds
        "Time that the vCPU slept for its dirty limit." |s| s.limited_ns;
    Gauge "dirty_limit_pages" CountPerSecond
        "Pages a second that the vCPU may dirty; 0: any number."
        |s| s.dirty_limit.map_or(0, core::num::NonZeroU64::get);
};

const REAPER: [Metric<ReaperStats>; 8] = table! {
    Counter "reaper_looks_total" Count "Looks at the rings." |s| s.looks;
    Counter "reaper_woken_total" Count "Looks that a full ring has caused." |s| s.woken;
    Counter "reaper_passes_total" Count "Passes of the reaper." |s| s.passes;
    Counter "reaper_entries_total" Count "Entries that the reaper's passes found." |s| s.entries;
    Counter "reaper_pass_nanoseconds_total" Nanoseconds "Time that the reaper's passes took." |s| s.pass_ns;
    Gauge "reaper_delay_nanoseconds" Nanoseconds
        "Current sleep of the reaper." |s| s.delay_ns;
    Gauge "reaper_lateness_nanoseconds" Nanoseconds
        "How late the reaper's last look was that its timer caused." |s| s.lateness_ns;
    Gauge "reaper_saturated" Count
        "1 if passes take most of the reaper's time." |s| s.saturated.into();
};

impl<T> Metric<T> {
    fn describe(&self) {
        let (name, unit, help) = (self.name, self.unit, self.help);
        match self.kind {
            Kind::Counter => metrics::describe_counter!(name, unit, help),
            Kind::Gauge => metrics::describe_gauge!(name, unit, help),
        }
    }

    fn publish(&self, of: &T, labels: &[Label]) {
        let value = (self.value)(of);
        match self.kind {
            Kind::Counter => metrics::counter!(self.name, labels.to_vec()).absolute(value),
            Kind::Gauge => metrics::gauge!(self.name, labels.to_vec()).set(value as f64),
        }
    }
}

/// Registers the description and the unit of each metric with the recorder.
///
/// Call it once, after the recorder was installed.
pub fn describe() {
    VM.iter().for_each(Metric::describe);
    VCPU.iter().for_each(Metric::describe);
    REAPER.iter().for_each(Metric::describe);
}

/// Passes `stats` to the recorder, with the label `vm`. Call it as often as figures should be fresh.
///
/// Two logs of one process need two labels, also one after the other, because counters only rise. It allocates, so do not
/// call it on a thread that runs a vCPU.
pub fn publish(stats: &Stats, vm: &str) {
    let vm = SharedString::from_shared(Arc::from(vm));
    let labels = [Label::new("vm", vm.clone())];
    VM.iter().for_each(|metric| metric.publish(stats, &labels));
    REAPER
        .iter()
        .for_each(|metric| metric.publish(&stats.reaper, &labels));
    for (place, vcpu) in stats.vcpus.iter().enumerate() {
        let labels = [
            Label::new("vm", vm.clone()),
            Label::new("vcpu", place.to_string()),
        ];
        VCPU.iter().for_each(|metric| metric.publish(vcpu, &labels));
    }
}

/// As [`publish`], under the name that the log was [given](crate::DirtyLog::set_name); the label is empty if there is none.
///
/// ```
/// # let log = kvm_dirty_ring::sim::SimVm::new(Default::default()).dirty_log();
/// log.set_name("vm-7")?;
/// kvm_dirty_ring::metrics::publish_named(&log.stats());
/// # Ok::<(), kvm_dirty_ring::error::NameError>(())
/// ```
pub fn publish_named(stats: &Stats) {
    publish(stats, stats.vm.as_deref().unwrap_or_default());
}
