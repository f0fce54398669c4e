// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Events for subscribers of the crate tracing: feature `tracing`, without which all of this compiles to nothing.
//!
//! Names are QEMU's where QEMU has such an event. A subscriber may block, panic, or read the log's stats. So a thread that emits
//! an event holds no lock, no shard and no right to mark entries, has no signals blocked for a reset, and has published its
//! pages.

use std::time::Instant;

use crate::sync::{Arc, Mutex, OnceLock, lock};

#[cfg(all(feature = "tracing", not(all(test, feature = "modelled"))))]
mod on {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// Calls a subscriber. If it panics, it loses the event and nothing else.
    #[inline]
    pub(super) fn quietly<T: Default>(call: impl FnOnce() -> T) -> T {
        catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
            // Its payload may panic, too, so it is leaked.
            core::mem::forget(panic);
            T::default()
        })
    }

    macro_rules! event {
        ($vm:ident, $level:ident, $name:literal $(, $field:ident = $value:expr)*) => {
            $crate::observe::trace::on::quietly(|| {
                // Values are computed only if a subscriber wants the event.
                tracing::event!(
                    name: $name,
                    target: "kvm_dirty_ring",
                    tracing::Level::$level,
                    { vm = $vm.get() $(, $field = $value)* },
                    $name
                )
            })
        };
    }

    macro_rules! wanted {
        ($level:ident) => {
            $crate::observe::trace::on::quietly(
                || tracing::enabled!(target: "kvm_dirty_ring", tracing::Level::$level),
            )
        };
    }

    pub(super) use {event, wanted};
}

/// Nothing: the compiler removes all of it.
#[cfg(not(all(feature = "tracing", not(all(test, feature = "modelled")))))]
mod on {
    macro_rules! event {
        ($vm:ident, $level:ident, $name:literal $(, $field:ident = $value:expr)*) => {
            let _ = || {
                let _ = $vm;
                $(let _ = $value;)*
            };
        };
    }

    macro_rules! wanted {
        ($level:ident) => {
            false
        };
    }

    pub(super) use {event, wanted};
}

use on::{event, wanted};

/// The VM's name, which each event carries as its field `vm` once it was given.
#[derive(Default)]
pub(crate) struct Name(OnceLock<Arc<str>>);

impl Name {
    /// Gives it, once and for all. The name that is there, if there is one.
    pub(crate) fn set(&self, name: &str) -> Result<(), &str> {
        let refused = self.0.set(Arc::from(name)).is_err();
        self.get().filter(|_| refused).map_or(Ok(()), Err)
    }

    pub(crate) fn get(&self) -> Option<&str> {
        self.0.get().map(|name| &**name)
    }

    pub(crate) fn shared(&self) -> Option<Arc<str>> {
        self.0.get().cloned()
    }
}

/// The start of something, if a subscriber wants its duration.
#[derive(Clone, Copy)]
pub(crate) struct Started(Option<Instant>);

impl Started {
    #[inline]
    pub(crate) fn now() -> Self {
        Self(wanted!(DEBUG).then(Instant::now))
    }

    fn ns(self) -> u64 {
        self.0.map_or(0, |start| start.elapsed().as_nanos() as u64)
    }
}

/// What a pass took from each ring, if a subscriber wants it: place and entries.
pub(crate) struct PerRing(Vec<(usize, u32)>);

impl PerRing {
    /// For `rings` rings. A pass is under way when they are noted, so room is made now.
    #[inline]
    pub(crate) fn new(rings: impl FnOnce() -> usize) -> Self {
        Self(match wanted!(TRACE) {
            true => Vec::with_capacity(rings()),
            false => Vec::new(),
        })
    }

    #[inline]
    pub(crate) fn note(&mut self, place: usize, entries: u32) {
        if self.0.len() < self.0.capacity() {
            self.0.push((place, entries));
        }
    }
}

/// A full exit has ended; `entries` were taken from the vCPU's own ring.
#[inline]
pub(crate) fn full(vm: &Name, vcpu: usize, entries: u32, ns: u64) {
    event!(
        vm,
        DEBUG,
        "kvm_dirty_ring_full",
        vcpu = vcpu as u64,
        entries = u64::from(entries),
        ns = ns
    );
}

/// A pass over several rings has ended.
#[inline]
pub(crate) fn reap(vm: &Name, started: Started, entries: u64, rings: &PerRing) {
    for &(vcpu, entries) in &rings.0 {
        event!(
            vm,
            TRACE,
            "kvm_dirty_ring_reap_vcpu",
            vcpu = vcpu as u64,
            entries = u64::from(entries)
        );
    }
    event!(
        vm,
        DEBUG,
        "kvm_dirty_ring_reap",
        entries = entries,
        ns = started.ns()
    );
}

/// A sync begins.
#[inline]
pub(crate) fn flush(vm: &Name) -> Started {
    event!(vm, DEBUG, "kvm_dirty_ring_flush", finished = false);
    Started::now()
}

/// A sync has ended, and has found `pages`.
#[inline]
pub(crate) fn flushed(vm: &Name, started: Started, pages: impl Fn() -> u64) {
    event!(
        vm,
        DEBUG,
        "kvm_dirty_ring_flush",
        finished = true,
        pages = pages(),
        ns = started.ns()
    );
}

/// A slot's suspects are protected again.
#[inline]
pub(crate) fn rearmed(vm: &Name, slot: u32) {
    event!(
        vm,
        INFO,
        "kvm_dirty_ring_rearmed",
        slot = slot & 0xffff,
        address_space = slot >> 16
    );
}

/// A refresh has closed `pages` members.
#[inline]
pub(crate) fn refreshed(vm: &Name, pages: u64, ns: u64) {
    event!(vm, INFO, "kvm_dirty_ring_refreshed", pages = pages, ns = ns);
}

/// The reaper begins, ends, pauses, continues, or has another policy.
#[cfg(not(all(test, feature = "modelled")))]
#[inline]
pub(crate) fn reaper(vm: &Name, state: &str) {
    event!(vm, DEBUG, "kvm_dirty_ring_reaper", state = state);
}

/// The reaper has looked at the rings, because of `kick` or in its own time, has had these emptied, and will sleep.
#[cfg(not(all(test, feature = "modelled")))]
#[inline]
pub(crate) fn look(vm: &Name, kick: Option<&str>, emptied: &[bool], delay_ns: u64) {
    if let Some(reason) = kick {
        event!(vm, DEBUG, "kvm_dirty_ring_reaper_kick", reason = reason);
    }
    event!(
        vm,
        TRACE,
        "kvm_dirty_ring_reaper",
        state = "wakeup",
        rings = emptied.iter().filter(|&&emptied| emptied).count() as u64,
        delay_ns = delay_ns
    );
}

/// The reaper has met an error. The event has the kernel's reason, too, which decides what an operator does.
#[cfg(not(all(test, feature = "modelled")))]
#[inline]
pub(crate) fn reaper_error(vm: &Name, error: &crate::error::ReaperError) {
    event!(
        vm,
        WARN,
        "kvm_dirty_ring_reaper_error",
        error = with_sources(error).as_str()
    );
}

/// An error and its sources, in a line.
#[cfg(not(all(test, feature = "modelled")))]
fn with_sources(error: &dyn core::error::Error) -> String {
    let sources = core::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |line, source| {
        format!("{line}: {source}")
    })
}

/// The faults so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Faults {
    pub(crate) short_resets: u64,
    pub(crate) doubtful_resets: u64,
    pub(crate) failed_resets: u64,
    pub(crate) unknown_slot_entries: u64,
    pub(crate) out_of_range_entries: u64,
    pub(crate) overruns: u64,
    pub(crate) missing_bitmaps: u64,
    /// 1 once the working set has switched itself off.
    pub(crate) useless_working_sets: u64,
}

/// The faults for which events were emitted. Faults occur deep in a pass, where a subscriber would delay other threads. So they
/// are counted there, and the call that ends first emits the events.
#[derive(Default)]
pub(crate) struct Emitted {
    last: Mutex<Faults>,
}

impl Emitted {
    /// Emits an event for each kind of fault that came since, one with the number of pages that are suspect then, and one
    /// with the number of slots that are worth re-arming, if any is.
    #[inline]
    pub(crate) fn emit(
        &self,
        vm: &Name,
        read: impl Fn() -> Faults,
        suspects: impl Fn() -> u64,
        slots_to_rearm: impl Fn() -> u64,
    ) {
        if !wanted!(WARN) {
            return;
        }
        let new = self.news(read);
        if new == Faults::default() {
            return;
        }
        macro_rules! emit {
            ($($name:literal, $count:ident;)*) => {$(
                if new.$count > 0 {
                    event!(vm, WARN, $name, count = new.$count);
                }
            )*};
        }
        emit! {
            "kvm_dirty_ring_short_reset", short_resets;
            "kvm_dirty_ring_doubtful_reset", doubtful_resets;
            "kvm_dirty_ring_failed_reset", failed_resets;
            "kvm_dirty_ring_unknown_slot", unknown_slot_entries;
            "kvm_dirty_ring_out_of_range", out_of_range_entries;
            "kvm_dirty_ring_overrun", overruns;
            "kvm_dirty_ring_missing_bitmap", missing_bitmaps;
            "kvm_dirty_ring_useless_working_set", useless_working_sets;
        }
        event!(vm, WARN, "kvm_dirty_ring_suspects", pages = suspects());
        let slots = slots_to_rearm();
        if slots > 0 {
            event!(vm, WARN, "kvm_dirty_ring_rearm_pays", slots = slots);
        }
    }

    fn news(&self, read: impl Fn() -> Faults) -> Faults {
        let mut last = lock(&self.last);
        // Under the lock, so that later values are emitted later.
        let now = read();
        let before = core::mem::replace(&mut *last, now);
        Faults {
            short_resets: now.short_resets - before.short_resets,
            doubtful_resets: now.doubtful_resets - before.doubtful_resets,
            failed_resets: now.failed_resets - before.failed_resets,
            unknown_slot_entries: now.unknown_slot_entries - before.unknown_slot_entries,
            out_of_range_entries: now.out_of_range_entries - before.out_of_range_entries,
            overruns: now.overruns - before.overruns,
            missing_bitmaps: now.missing_bitmaps - before.missing_bitmaps,
            useless_working_sets: now.useless_working_sets - before.useless_working_sets,
        }
    }
}
