// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The way to the copy, and the copy.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Result;
use kvm_dirty_ring::{Run, SlotId};

use super::outcome::{Limits, Observer};
use crate::cli::interrupt::go_on;
use crate::guest::memory::{GuestMemory, MemoryError, PAGE_SIZE};
use crate::machine::rate::TokenBucket;
use crate::machine::{Guest, GuestSlot};

/// Pages sent between two looks at the clock and at whether to go on.
const PIECE: u64 = 64;
/// Pages that are on their way at a time: sent, and lost if the link breaks.
const UNDER_WAY: u64 = 64;
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
    /// It breaks after so many pages of a round.
    break_after: Option<u64>,
    interrupted: &'a AtomicBool,
    observer: &'a mut dyn Observer,
}

/// A round on the link.
pub(super) struct Sent {
    /// How long it took.
    pub(super) time: Duration,
    /// If the link broke, what became of the round by then.
    pub(super) broken: Option<Broken>,
}

/// A link that broke.
#[derive(Default)]
pub(super) struct Broken {
    /// Pages sent.
    pub(super) sent: u64,
    /// Those of them that the other side has acknowledged, in the order in which they were sent.
    pub(super) arrived: Vec<Run>,
}

impl<'a> Link<'a> {
    pub(super) fn new(
        slots: &[GuestSlot],
        destination: &'a Destination,
        limits: &Limits,
        now: Instant,
        interrupted: &'a AtomicBool,
        observer: &'a mut dyn Observer,
    ) -> Self {
        let pages_per_second = limits.bandwidth_mib as f64 * 256.0;
        Self {
            slots: slots.to_vec(),
            copies: &destination.0,
            bucket: TokenBucket::new(pages_per_second, now),
            break_after: limits.break_after,
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

    /// Sends the runs, `pages` pages in all, by the guest's clock, or the first of them, if the link breaks.
    pub(super) fn send(
        &mut self,
        guest: &mut (impl Guest + ?Sized),
        round: usize,
        pages: u64,
        running: bool,
        runs: impl Iterator<Item = Run>,
    ) -> Result<Sent> {
        let start = guest.now();
        self.observer.begin(round, pages, running);
        let breaks = |&mut after: &mut u64| running && round > 0 && pages > after;
        let broken = match self.break_after.take_if(breaks) {
            Some(after) => Some(self.send_until(guest, after, runs)?),
            None => {
                for piece in runs.flat_map(pieces) {
                    self.copy(piece);
                    self.sent(guest, piece.pages)?;
                }
                None
            }
        };
        let time = guest.now() - start;
        Ok(Sent { time, broken })
    }

    /// Sends the first `after` pages of the runs, then breaks: the last of them do not arrive.
    fn send_until(
        &mut self,
        guest: &mut (impl Guest + ?Sized),
        after: u64,
        runs: impl Iterator<Item = Run>,
    ) -> Result<Broken> {
        let mut broken = Broken::default();
        let arrive = after.saturating_sub(UNDER_WAY);
        for piece in runs.flat_map(pieces) {
            let arrives = first(piece, arrive.saturating_sub(broken.sent));
            if arrives.pages > 0 {
                self.copy(arrives);
                broken.arrived.push(arrives);
            }
            let sent = first(piece, after - broken.sent).pages;
            self.sent(guest, sent)?;
            broken.sent += sent;
            if broken.sent == after {
                break;
            }
        }
        Ok(broken)
    }

    /// Copies a run to the other side.
    fn copy(&self, run: Run) {
        let at = self.slots.iter().position(|slot| slot.id == run.slot);
        let at = at.expect("the tracker names slots of the machine's only");
        let memory = &self.slots[at].memory;
        memory.copy_run(run.first_page, run.pages, &self.copies[at]);
    }

    fn sent(&mut self, guest: &mut (impl Guest + ?Sized), pages: u64) -> Result<()> {
        self.observer.sent(pages);
        self.keep_pace(guest, pages)
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

/// The run in pieces.
fn pieces(run: Run) -> impl Iterator<Item = Run> {
    let firsts = (0..run.pages).step_by(PIECE as usize);
    firsts.map(move |at| Run {
        slot: run.slot,
        first_page: run.first_page + at,
        pages: PIECE.min(run.pages - at),
    })
}

/// The first pages of a run, at most so many.
fn first(run: Run, pages: u64) -> Run {
    Run {
        pages: run.pages.min(pages),
        ..run
    }
}
