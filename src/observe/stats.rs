// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The counts of a log.

use core::fmt;
use core::num::NonZeroU64;

use crate::harvest::pass::{Harvester, REARM_PAYS_FROM};
use crate::harvest::vcpu::Vcpu;
use crate::sync::{Arc, Counter};

/// Counts since the log was enabled.
///
/// They only rise, except `suspect_pages`, `slots_to_rearm`, soft limits, dirty limits, and the current values of the working set and the reaper.
/// They are read one by one, so a pass under way may be in one count and not yet in another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Passes begun, by the reaper, by full exits and by syncs.
    pub passes: u64,
    /// Entries harvested.
    pub entries: u64,
    /// Reset ioctls issued.
    pub resets: u64,
    /// Reset ioctls that recycled fewer entries than were marked: a signal that cannot be blocked was pending. Not counted once a
    /// ring is [broken](VcpuStats::broken). Every sync reports the pages concerned until their slot is re-armed.
    pub short_resets: u64,
    /// Reset ioctls that recycled what was marked while the thread may have been stopped, by SIGSTOP, a debugger or the freezer.
    /// The last batch of one ring, up to 64 pages of one slot, may be unprotected. A reset whose thread waited for a change of
    /// memslots in the kernel counts, too, unless it waited before the reset, which it does in most cases.
    ///
    /// Each makes at most 127 pages per vCPU suspect: pages of one slot, less than 64 from the page of the ring's last entry. If a
    /// working set has left one of the last pages open, it may be 127 of each slot. So all of them together make at most
    /// `doubtful_resets` × vCPUs × 127 pages suspect; with a working set, times the number of slots. Every sync reports these pages
    /// until their slot is re-armed.
    pub doubtful_resets: u64,
    /// Reset ioctls that failed.
    pub failed_resets: u64,
    /// Entries that named a slot which is not in the log. Each makes every page suspect, including those of slots added later.
    pub unknown_slot_entries: u64,
    /// Entries that named a page past the end of their slot. Each makes every page suspect.
    pub out_of_range_entries: u64,
    /// Rings that the kernel has overrun, or so filled before a reset that it may have. They are [broken](VcpuStats::broken).
    pub overruns: u64,
    /// Times that a kernel that should have a slot's bitmap did not return it: the slot is not in KVM, is not logged there, or is
    /// larger than in the log. Each time all pages of the slot are reported, and once more when the bitmap is there again.
    pub missing_bitmaps: u64,
    /// Suspect pages now. Every sync reports them until their slots are [re-armed](crate::DirtyLog::rearm). Causes are short and
    /// doubtful resets, entries that make no sense, and a re-arming that failed. Once a ring is [broken](VcpuStats::broken), all pages
    /// count, for good.
    ///
    /// KVM need not log an unprotected page, so no later entry can clear it, and the number grows. What [doubtful
    /// resets](Self::doubtful_resets) add has a bound; what the other causes add has none but the size of the slots.
    pub suspect_pages: u64,
    /// The vCPUs, in the order in which they were attached.
    pub vcpus: Vec<VcpuStats>,
    /// The reaper that runs, and those before it.
    pub reaper: ReaperStats,
    /// The working set: what stays open, and what was closed.
    pub working_set: WorkingSetStats,
    /// The VM's [name](crate::DirtyLog::set_name).
    pub vm: Option<Arc<str>>,
    /// Slots that have [`REARM_PAYS_FROM`](Self::REARM_PAYS_FROM) pages under suspicion, or more, and can be
    /// [re-armed](crate::DirtyLog::rearm): if more than a round is to come, it pays as a rule.
    pub slots_to_rearm: u64,
}

/// Counts of the writable working set, see [`DirtyLog::set_working_set`](crate::DirtyLog::set_working_set).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkingSetStats {
    /// Members now, in pages. Every sync reports them, and the kernel does not log them.
    pub members: u64,
    /// Times that a page has joined.
    pub joined: u64,
    /// Refreshes that have closed all members.
    pub refreshes: u64,
    /// Pages that refreshes have closed.
    pub closed: u64,
    /// Duration of the last refresh, in nanoseconds, without the time to stop vCPUs.
    pub refresh_ns: u64,
    /// How many of the pages in [`last_closed`](Self::last_closed) are members again.
    pub back: u64,
    /// Pages that the last refresh closed.
    pub last_closed: u64,
    /// Whether a [refresh](crate::DirtyLog::refresh) is owed: there are members, but no page joins any more, because a dirty limit was
    /// set, the set was switched off, or it is [`useless`](Self::useless).
    pub refresh_owed: bool,
    /// Whether the set has switched itself off, for good: most entries of several passes in a row named members, so this kernel
    /// protects pages that should stay open. Nothing is lost by that, and nothing is gained by the set.
    pub useless: bool,
}

impl WorkingSetStats {
    fn read(harvester: &Harvester) -> Self {
        let terms = &harvester.working_set;
        let layout = harvester.layout();
        let (mut members, mut closable, mut last_closed, mut back) = (0, 0, 0, 0);
        for slot in layout.slots.staying() {
            let of_slot = slot.members().count();
            members += of_slot;
            // A refresh leaves the others to a start of tracking.
            closable += if slot.is_tracked() { of_slot } else { 0 };
            let (closed, again) = slot.members().closed_and_back();
            last_closed += closed;
            back += again;
        }
        Self {
            members,
            joined: terms.joined.get(),
            refreshes: terms.refreshes.get(),
            closed: terms.closed.get(),
            refresh_ns: terms.refresh_ns.get(),
            back,
            last_closed,
            refresh_owed: terms.is_owed(closable),
            useless: terms.is_useless(),
        }
    }
}

/// Counts of one vCPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VcpuStats {
    /// Entries harvested from its ring.
    pub entries: u64,
    /// Whether its ring is broken: the kernel has overrun it, or may have. Unknown entries are lost then.
    ///
    /// For the rest of the log's life every sync reports every page of every slot, and re-arming does not end that. The vCPU cannot
    /// run on once its ring can get no room ([`FullError::Broken`](crate::error::FullError::Broken)). Linux on hardware keeps a
    /// reserve of entries and never breaks a ring; the instruction emulator of kvm_pvm does.
    pub broken: bool,
    /// Exits for a full ring.
    pub full_exits: u64,
    /// Time that the vCPU spent in [`on_full`](crate::VcpuRing::on_full), in nanoseconds, in calls that have returned.
    pub stall_ns: u64,
    /// Entries at which the kernel stops the vCPU: supposed, until a full exit has shown it.
    pub soft_limit: u64,
    /// Pages per second that the vCPU may dirty now; `None` for any number. See
    /// [`DirtyLog::set_dirty_limit`](crate::DirtyLog::set_dirty_limit).
    pub dirty_limit: Option<NonZeroU64>,
    /// Time that the vCPU slept because of that limit, in nanoseconds, in sleeps that have ended. `stall_ns` has none of it.
    pub limited_ns: u64,
}

/// Counts of the reapers of a log, of which one runs at a time. The last three fields are current values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReaperStats {
    /// Looks at the rings.
    pub looks: u64,
    /// Looks that a full exit has caused.
    pub woken: u64,
    /// Passes made.
    pub passes: u64,
    /// Entries that these passes found.
    pub entries: u64,
    /// Time spent on these passes, in nanoseconds.
    pub pass_ns: u64,
    /// Current sleep of the policy, in nanoseconds; 0 if no reaper runs, or it pauses.
    pub delay_ns: u64,
    /// Lateness of the last wake-up by the timer, in nanoseconds. Looks that a full exit or a call caused leave it as it was.
    pub lateness_ns: u64,
    /// Whether passes take most of the reaper's time. Then it cannot keep up, whatever its policy: take larger rings, or limit the
    /// guest's dirty rate.
    pub saturated: bool,
}

/// The reaper's counts. The log keeps them, so that they continue where the reaper before ended.
#[derive(Default)]
pub(crate) struct ReaperCounts {
    pub(crate) looks: Counter,
    pub(crate) woken: Counter,
    pub(crate) passes: Counter,
    pub(crate) entries: Counter,
    pub(crate) pass_ns: Counter,
    pub(crate) delay_ns: Counter,
    pub(crate) lateness_ns: Counter,
    pub(crate) saturated: Counter,
}

impl Stats {
    /// The number of suspect pages of one slot from which on it pays as a rule to [re-arm](crate::DirtyLog::rearm) it.
    ///
    /// 1,024, or 4 MiB in pages of 4 KiB. A link of 10 Gbit/s takes 3.4 ms to send them, in each round.
    pub const REARM_PAYS_FROM: u64 = REARM_PAYS_FROM;

    /// Returns the mean number of entries per reset ioctl; 0 before the first. The more, the cheaper.
    pub fn entries_per_reset(&self) -> f64 {
        match self.resets {
            0 => 0.0,
            resets => self.entries as f64 / resets as f64,
        }
    }

    /// Returns the time that all vCPUs together spent in [`on_full`](crate::VcpuRing::on_full), in nanoseconds.
    pub fn stall_ns(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.stall_ns).sum()
    }

    /// Returns the number of exits for a full ring, of all vCPUs.
    pub fn full_exits(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.full_exits).sum()
    }

    pub(crate) fn read(
        vm: Option<Arc<str>>,
        harvester: &Harvester,
        missing_bitmaps: u64,
        reaper: &ReaperCounts,
    ) -> Self {
        let counts = &harvester.counts;
        let gate = harvester.gate.stats();
        let layout = harvester.layout();
        Self {
            passes: counts.passes.get(),
            entries: counts.entries.get(),
            resets: gate.resets,
            short_resets: gate.short,
            doubtful_resets: gate.doubtful,
            failed_resets: gate.failed,
            unknown_slot_entries: counts.unknown_slot.get(),
            out_of_range_entries: counts.out_of_range.get(),
            overruns: counts.overruns.get(),
            missing_bitmaps,
            suspect_pages: harvester.suspects(),
            vcpus: layout.vcpus.iter().map(|v| VcpuStats::read(v)).collect(),
            reaper: reaper.read(),
            working_set: WorkingSetStats::read(harvester),
            vm,
            slots_to_rearm: harvester.slots_to_rearm(),
        }
    }
}

impl VcpuStats {
    fn read(vcpu: &Vcpu) -> Self {
        let counts = &vcpu.counts;
        Self {
            entries: vcpu.taken(),
            broken: vcpu.is_broken(),
            full_exits: counts.full_exits.get(),
            stall_ns: counts.stall_ns.get(),
            soft_limit: counts.soft_limit.get(),
            dirty_limit: vcpu.limit.get(),
            limited_ns: vcpu.limit.slept_ns.get(),
        }
    }
}

impl ReaperCounts {
    pub(crate) fn read(&self) -> ReaperStats {
        ReaperStats {
            looks: self.looks.get(),
            woken: self.woken.get(),
            passes: self.passes.get(),
            entries: self.entries.get(),
            pass_ns: self.pass_ns.get(),
            delay_ns: self.delay_ns.get(),
            lateness_ns: self.lateness_ns.get(),
            saturated: self.saturated.get() != 0,
        }
    }

    /// Clears the current values, as the reaper has ended or pauses.
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn rest(&self) {
        self.delay_ns.set(0);
        self.lateness_ns.set(0);
        self.saturated.set(0);
    }
}

/// Prints a line about the VM, one about faults if there were any, one for each vCPU, and one for the reaper if there was
/// one.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(vm) = &self.vm {
            write!(f, "{vm}: ")?;
        }
        write!(
            f,
            "{} passes, {} entries, {} resets of {:.1} entries, {} full exits of {} in all",
            self.passes,
            self.entries,
            self.resets,
            self.entries_per_reset(),
            self.full_exits(),
            Ms(self.stall_ns()),
        )?;
        let faults = [
            (self.suspect_pages, "suspect pages"),
            (self.slots_to_rearm, "slots to re-arm"),
            (self.short_resets, "short resets"),
            (self.doubtful_resets, "doubtful resets"),
            (self.failed_resets, "failed resets"),
            (self.unknown_slot_entries, "entries of unknown slots"),
            (self.out_of_range_entries, "entries past their slot's end"),
            (self.overruns, "broken rings"),
            (self.missing_bitmaps, "missing bitmaps"),
        ];
        let mut before = "\nfaults: ";
        for (count, what) in faults {
            if count > 0 {
                write!(f, "{before}{count} {what}")?;
                before = ", ";
            }
        }
        if self.working_set != WorkingSetStats::default() {
            write!(f, "\nworking set: {}", self.working_set)?;
        }
        for (place, vcpu) in self.vcpus.iter().enumerate() {
            write!(f, "\nvCPU {place}: {vcpu}")?;
        }
        if self.reaper != ReaperStats::default() {
            write!(f, "\nreaper: {}", self.reaper)?;
        }
        Ok(())
    }
}

/// Prints one line for operators.
impl fmt::Display for WorkingSetStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (members, joined, closed) = (self.members, self.joined, self.closed);
        write!(
            f,
            "{members} members, {joined} joined, {closed} closed by {} refreshes",
            self.refreshes
        )?;
        if self.refreshes > 0 {
            write!(
                f,
                ", the last in {}, {} back",
                Ms(self.refresh_ns),
                self.back
            )?;
        }
        if self.refresh_owed {
            f.write_str(", a refresh is owed")?;
        }
        if self.useless {
            f.write_str(", off: KVM protects them all the same")?;
        }
        Ok(())
    }
}

/// Prints one line for operators.
impl fmt::Display for VcpuStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (entries, full_exits, limit) = (self.entries, self.full_exits, self.soft_limit);
        let stall = Ms(self.stall_ns);
        write!(
            f,
            "{entries} entries, {full_exits} full exits of {stall} in all, stops at {limit} entries{}",
            if self.broken { ", ring broken" } else { "" },
        )
    }
}

/// Prints one line for operators.
impl fmt::Display for ReaperStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} looks ({} woken), {} passes of {} in all, {} entries, sleeps {}, was {} late{}",
            self.looks,
            self.woken,
            self.passes,
            Ms(self.pass_ns),
            self.entries,
            Ms(self.delay_ns),
            Ms(self.lateness_ns),
            if self.saturated {
                ", can't keep up"
            } else {
                ""
            },
        )
    }
}

/// Nanoseconds, printed in milliseconds.
struct Ms(u64);

impl fmt::Display for Ms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} ms", self.0 as f64 / 1e6)
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;

    #[test]
    fn nothing_yet_is_no_nonsense() {
        let stats = Stats::default();
        assert_eq!((stats.entries_per_reset(), stats.stall_ns()), (0.0, 0));
        let text = "0 passes, 0 entries, 0 resets of 0.0 entries, 0 full exits of 0.00 ms in all";
        assert_eq!(stats.to_string(), text);
    }

    #[test]
    fn people_are_told_what_there_is() {
        let vcpu = |entries| VcpuStats {
            entries,
            full_exits: 1,
            stall_ns: 1_500_000,
            soft_limit: 960,
            broken: entries == 20,
            ..Default::default()
        };
        let stats = Stats {
            passes: 3,
            entries: 30,
            resets: 4,
            overruns: 1,
            suspect_pages: 7,
            working_set: WorkingSetStats {
                members: 5,
                joined: 9,
                closed: 4,
                refreshes: 1,
                refresh_ns: 2_000_000,
                back: 3,
                refresh_owed: true,
                useless: true,
                ..Default::default()
            },
            vcpus: vec![vcpu(10), vcpu(20)],
            reaper: ReaperStats {
                looks: 2,
                delay_ns: 250_000,
                saturated: true,
                ..Default::default()
            },
            ..Default::default()
        };
        assert_eq!(
            (stats.entries_per_reset(), stats.stall_ns()),
            (7.5, 3_000_000)
        );
        let text = "\
3 passes, 30 entries, 4 resets of 7.5 entries, 2 full exits of 3.00 ms in all
faults: 7 suspect pages, 1 broken rings
working set: 5 members, 9 joined, 4 closed by 1 refreshes, the last in 2.00 ms, 3 back, a refresh is owed, off: KVM protects them all the same
vCPU 0: 10 entries, 1 full exits of 1.50 ms in all, stops at 960 entries
vCPU 1: 20 entries, 1 full exits of 1.50 ms in all, stops at 960 entries, ring broken
reaper: 2 looks (0 woken), 0 passes of 0.00 ms in all, 0 entries, sleeps 0.25 ms, was 0.00 ms late, can't keep up";
        assert_eq!(stats.to_string(), text);
    }
}
