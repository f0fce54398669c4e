// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The way to the copy, and the copy.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Result;
use kvm_dirty_ring::{Run, SlotId};

use super::outcome::Observer;
use crate::cli::interrupt::go_on;
use crate::guest::memory::{GuestMemory, MemoryError, PAGE_SIZE};
use crate::machine::rate::TokenBucket;
use crate::machine::{Guest, GuestSlot};

/// Pages sent between two looks at the clock and at whether to go on.
const PIECE: u64 = 64;
/// What no guest writes.
const POISON: u64 = 0xbad0_c0de_bad0_c0de;
/// The longest sleep between two looks at whether to go on.
const LONGEST_SLEEP: Duration = Duration::from_millis(20);

/// Where a guest is migrated to: as much memory as it has, slot by slot.
#[derive(Debug)]
pub struct Destination(Vec<GuestMemory>);

impl Destination {
    /// For these slots, as `make` makes memory of so many pages.
    pub fn new(
        slots: &[GuestSlot],
        make: fn(u64) -> Result<GuestMemory, MemoryError>,
    ) -> Result<Self, MemoryError> {
        let copies = slots.iter().map(|slot| make(slot.region.pages));
        copies.collect::<Result<_, _>>().map(Self)
    }

    /// Writes nonsense into each page, so that one which is not sent can't be right from before.
    pub fn poison(&self) {
        for copy in &self.0 {
            for page in 0..copy.pages() {
                copy.write_u64(page * PAGE_SIZE, POISON ^ page);
            }
        }
    }
}

pub(super) struct Link<'a> {
    slots: Vec<GuestSlot>,
    /// As many as `slots`.
    copies: &'a [GuestMemory],
    bucket: Option<TokenBucket>,
    interrupted: &'a AtomicBool,
    observer: &'a mut dyn Observer,
}

impl<'a> Link<'a> {
    pub(super) fn new(
        slots: &[GuestSlot],
        destination: &'a Destination,
        bandwidth_mib: u64,
        now: Instant,
        interrupted: &'a AtomicBool,
        observer: &'a mut dyn Observer,
    ) -> Self {
        let pages_per_second = bandwidth_mib as f64 * 256.0;
        Self {
            slots: slots.to_vec(),
            copies: &destination.0,
            bucket: TokenBucket::new(pages_per_second, now),
            interrupted,
            observer,
        }
    }

    /// All that there is to send.
    pub(super) fn whole(&self) -> Vec<Run> {
        let whole = |slot: &GuestSlot| Run {
            slot: slot.id,
            first_page: 0,
            pages: slot.memory.pages(),
        };
        self.slots.iter().map(whole).collect()
    }

    /// The vCPUs will now be stopped.
    pub(super) fn stop(&mut self) {
        self.observer.stop();
    }

    /// Sends the runs, `pages` pages in all, by the guest's clock. How long it took.
    pub(super) fn send(
        &mut self,
        guest: &mut (impl Guest + ?Sized),
        round: usize,
        pages: u64,
        running: bool,
        runs: impl Iterator<Item = Run>,
    ) -> Result<Duration> {
        let start = guest.now();
        self.observer.begin(round, pages, running);
        for run in runs {
            let at = self.slots.iter().position(|slot| slot.id == run.slot);
            let at = at.expect("the tracker names slots of the machine's only");
            let end = run.first_page + run.pages;
            for first in (run.first_page..end).step_by(PIECE as usize) {
                let pages = PIECE.min(end - first);
                let memory = &self.slots[at].memory;
                memory.copy_run(first, pages, &self.copies[at]);
                self.observer.sent(pages);
                self.keep_pace(guest, pages)?;
            }
        }
        Ok(guest.now() - start)
    }

    fn keep_pace(&mut self, guest: &mut (impl Guest + ?Sized), pages: u64) -> Result<()> {
        let bucket = self.bucket.as_mut();
        let until = bucket.and_then(|bucket| bucket.take(guest.now(), pages));
        loop {
            go_on(self.interrupted)?;
            let now = guest.now();
            match until.filter(|&until| until > now) {
                None => return Ok(()),
                Some(until) => guest.wait_until(until.min(now + LONGEST_SLEEP)),
            }
        }
    }

    /// Compares every page of every slot, byte for byte: how many differ, and the first that does.
    pub(super) fn compare(&self) -> Result<(u64, Option<(SlotId, u64)>)> {
        let (mut count, mut first) = (0, None);
        for (slot, copy) in self.slots.iter().zip(self.copies) {
            for page in 0..slot.memory.pages() {
                if page % PIECE == 0 {
                    go_on(self.interrupted)?;
                }
                if slot.memory.page_differs(page, copy) {
                    count += 1;
                    first.get_or_insert((slot.id, page));
                }
            }
        }
        Ok((count, first))
    }
}
