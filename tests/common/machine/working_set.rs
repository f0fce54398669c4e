// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages that stay open, and what has to be true of them.

use std::io;
use std::mem;

use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::sim::SimVcpu;
use kvm_dirty_ring::{OnDemand, SlotId};

use super::lives::Life;
use super::{Machine, SLOTS};
use crate::common::ops::{Moment, Write};
use crate::common::shape::{PageSet, part_of};

impl Machine {
    /// Whatever stayed open is reported by the next sync, be it closed by then.
    pub(super) fn check_members(&mut self, reported: &PageSet) {
        let now = part_of(&self.dirty.members());
        self.check_open(now, reported);
    }

    fn check_open(&mut self, now: PageSet, reported: &PageSet) {
        let before = mem::replace(&mut self.open, now);
        for (slot, pages) in before {
            let missing = |page: &u64| !reported.get(&slot).is_some_and(|now| now.contains(page));
            let missing: Vec<u64> = pages.into_iter().filter(missing).collect();
            assert!(
                missing.is_empty(),
                "members of slot {slot} not reported: {missing:?}"
            );
        }
    }

    /// Members that the last sync has reported, of slots that are still there.
    pub fn open(&self) -> &PageSet {
        &self.open
    }

    /// Slots whose removal has begun, where there may be a working set.
    pub fn going_with_members(&self) -> Vec<SlotId> {
        if self.stats().working_set.joined == 0 {
            return Vec::new();
        }
        let lives = SLOTS.iter().zip(&self.lives);
        let going = lives.filter(|(_, life)| matches!(life, Life::Retired(_) | Life::Deleted(_)));
        going.map(|(&slot, _)| slot).collect()
    }

    pub(super) fn refresh(&mut self, mut fails: Option<Moment>) {
        let vm = &self.memory.vm;
        let fail_at = |fails: &mut Option<Moment>, moment| match *fails == Some(moment) {
            true => {
                *fails = None;
                Err(io::Error::from(io::ErrorKind::Other))
            }
            false => Ok(()),
        };
        let was_to_fail = fails.is_some();
        let refreshed = self.memory.log.refresh(|slot| {
            fail_at(&mut fails, Moment::Before)?;
            vm.rearm_slot(slot);
            fail_at(&mut fails, Moment::After)
        });
        match refreshed {
            Ok(_) => {
                let left = self.stats().working_set;
                assert!(!left.refresh_owed, "{left:?}");
            }
            Err(SlotError::Protect { .. }) => assert!(was_to_fail),
            Err(SlotError::BrokenRing { .. }) => assert!(self.memory.is_broken()),
            Err(error) => assert!(self.injected > 0, "{error} for no reason"),
        }
    }

    pub(super) fn protect(&mut self, write: &Write) {
        if let Some((slot, pages)) = self.memory.pages(write) {
            pages
                .into_iter()
                .for_each(|page| self.memory.vm.protect(slot, page));
        }
    }

    /// With everybody stopped, it names all that a migration would have to send yet. Then the guest goes on.
    pub(super) fn last_sync(&mut self) {
        self.let_go();
        let writes = mem::take(&mut *self.memory.in_reset.lock().unwrap());
        let vcpus = self.memory.vcpus.lock().unwrap();
        vcpus.iter().for_each(SimVcpu::exit);
        drop(vcpus);
        let synced = self.memory.log.last_sync(&mut self.last);
        *self.memory.in_reset.lock().unwrap() = writes;
        self.unreset = true;
        if let Err(error) = synced {
            assert!(self.injected > 0, "{error} for no reason");
            return;
        }
        for (&slot, copy) in &self.copy {
            let missed = |&page: &usize| {
                let is_stale = self.memory.vm.version(slot, page as u64) != Some(copy[page]);
                is_stale && !self.last.contains(slot, page as u64)
            };
            let missed: Vec<usize> = (0..copy.len()).filter(missed).collect();
            assert!(
                missed.is_empty(),
                "slot {slot}: a last sync has missed {missed:?}"
            );
        }
    }

    /// Reads on what an earlier sync on demand has found, or begins another. It stays there until it is read to its end, so that all
    /// else goes on beside it, or until [`let_go`](Self::let_go).
    pub(super) fn sync_on_demand(&mut self, chunks: usize, span: u64) {
        let mut held = match self.held.take() {
            Some(held) => held,
            None => match self.memory.log.sync_on_demand() {
                Ok(found) => self.hold(found),
                Err(error) => return assert!(self.injected > 0, "{error} for no reason"),
            },
        };
        let (mut read, mut failures) = (0, 0);
        while read < chunks {
            match held.found.next_chunk(span) {
                Ok(None) => {
                    let missing = &held.closed;
                    assert!(missing.is_empty(), "closed, and in no chunk: {missing:?}");
                    return;
                }
                Ok(Some(chunk)) => {
                    read += 1;
                    let pages = part_of(&chunk);
                    for (slot, pages) in &pages {
                        let reported = held.reported.entry(*slot).or_default();
                        for &page in pages {
                            assert!(reported.insert(page), "{slot} page {page} came twice");
                            if let Some(copy) = self.copy.get_mut(slot) {
                                copy[page as usize] = self.memory.vm.version(*slot, page).unwrap();
                            }
                        }
                    }
                    without(&mut held.closed, &pages);
                }
                Err(error) => {
                    failures += 1;
                    assert!(failures <= self.injected, "{error} for no reason");
                }
            }
        }
        self.held = Some(held);
    }

    fn hold(&mut self, found: OnDemand) -> Held {
        self.unreset = false;
        let members = part_of(&found.members());
        let mut closed = mem::replace(&mut self.open, members.clone());
        without(&mut closed, &members);
        Held {
            found,
            reported: members,
            closed,
        }
    }

    /// Drops what a sync on demand has found and nobody has read: it comes with the next sync.
    pub(super) fn let_go(&mut self) {
        if let Some(held) = self.held.take() {
            for (slot, pages) in held.closed {
                self.open.entry(slot).or_default().extend(pages);
            }
        }
    }

    /// A slot is gone, and what was open of it.
    pub(super) fn forget_open(&mut self, slot: SlotId) {
        self.open.remove(&slot);
        if let Some(held) = &mut self.held {
            held.closed.remove(&slot);
            held.reported.remove(&slot);
        }
    }
}

/// What a sync on demand has found.
pub(super) struct Held {
    found: OnDemand,
    /// Its members, and what was read.
    reported: PageSet,
    /// Members until shortly before. A chunk has to have them, or, if there is none, the next sync.
    closed: PageSet,
}

fn without(pages: &mut PageSet, these: &PageSet) {
    for (slot, these) in these {
        if let Some(pages) = pages.get_mut(slot) {
            pages.retain(|page| !these.contains(page));
        }
    }
    pages.retain(|_, pages| !pages.is_empty());
}
