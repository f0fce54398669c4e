// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages that stay open: how many may, what closes them, and last syncs that are called off.

use std::io;

use anyhow::Result;
use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::{LastPages, Mode, WorkingSet};

use super::Conductor;
use crate::episodes::copier::retry;
use crate::episodes::fault::Fault;

impl Conductor<'_> {
    pub fn set_working_set(&mut self, terms: Option<WorkingSet>) {
        self.log.set_working_set(terms);
        self.counts.add(Fault::PlacesChanged);
    }

    /// Closes all that stays open.
    pub fn refresh(&mut self) -> Result<()> {
        // Bits are cleared while other threads write.
        let stops = self.log.mode() == Mode::Rings;
        if stops {
            self.world.write_in_resets(false);
            self.pause(|_, _| true)?;
        }
        let protect = |slot| self.world.rearm_slot(slot).map_err(io::Error::other);
        match self.log.refresh(protect) {
            Ok(_) => self.counts.add(Fault::Refreshes),
            // For good, and everything is reported.
            Err(SlotError::BrokenRing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if stops {
            self.world.write_in_resets(true);
            self.resume();
        }
        Ok(())
    }

    /// Stops all that writes as if it were for good, makes the last sync, which must report every page that was not
    /// copied yet, and lets all go on: the next sync must report them again.
    pub fn call_off_a_last_sync(&mut self) -> Result<()> {
        self.world.write_in_resets(false);
        self.pause(|_, _| true)?;
        let ledger = self.ledger;
        let closed = ledger.close();
        let settled = ledger.settle();
        let mut last = LastPages::new();
        retry(|| self.log.last_sync(&mut last))?;
        let slots: Vec<_> = self.there().cloned().collect();
        for slot in slots {
            let mut missed = slot.differing();
            missed.retain(|&page| !last.contains(slot.id, page));
            self.note(&slot, &missed, "by a last sync");
        }
        self.episode.comparisons += 1;
        self.counts.add(Fault::LastSyncsCalledOff);
        drop(settled);
        drop(closed);
        self.world.write_in_resets(true);
        self.resume();
        Ok(())
    }
}
