// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Slots that come and go.

use std::sync::Arc;

use anyhow::Result;
use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::{Mode, SlotId};

use super::{Conductor, strange_entries};
use crate::episodes::copier::{Kind, retry};
use crate::episodes::fault::Fault;
use crate::episodes::ledger::Instance;
use crate::episodes::plan::VcpuPlan;

impl Conductor<'_> {
    /// What a slot that comes and goes is called.
    fn going_id(&self, slot: usize) -> SlotId {
        SlotId::new(0, (1 + self.plan.stays.len() + slot) as u16)
    }

    pub fn add_slot(&mut self, id: SlotId, pages: u64, is_reused: bool) -> Result<Arc<Instance>> {
        let instance = Arc::new(Instance::new(id, pages)?);
        self.ledger.born(&instance);
        let missing = self.log.stats().missing_bitmaps;
        // It resets where there were entries of slots that are not in the log.
        retry(|| self.log.add_slot(id, pages))?;
        if is_reused && pages % 2 == 0 {
            self.world.write_in_resets(false);
            self.world.add_slot(&instance)?;
            self.look_for_strays(&instance, missing)?;
            self.world.write_in_resets(true);
        } else {
            self.world.add_slot(&instance)?;
        }
        Ok(instance)
    }

    pub fn add(&mut self, slot: usize, pages: u64) -> Result<()> {
        if self.goes[slot].there.is_some() {
            return Ok(());
        }
        let is_reused = self.goes[slot].times > 0;
        let instance = self.add_slot(self.going_id(slot), pages, is_reused)?;
        let going = &mut self.goes[slot];
        going.there = Some(Arc::clone(&instance));
        going.times += 1;
        // At once: passes under way may still know the slot before.
        self.resume();
        self.ledger.close().push(instance);
        self.counts.add(Fault::SlotsAdded);
        if is_reused {
            self.counts.add(Fault::SlotIdsReused);
        }
        Ok(())
    }

    /// Nobody has written to the slot yet: what is reported of it are entries of one before. Syncs
    /// of others may return them instead; but not always. Where one of those asked for the slot's bitmap
    /// before there was one, of which there were `missing` before, all of it is dirty.
    fn look_for_strays(&mut self, slot: &Instance, missing: u64) -> Result<()> {
        self.copier.round(Kind::All)?;
        let stats = self.log.stats();
        let causes = [
            stats.short_resets,
            stats.doubtful_resets,
            stats.overruns,
            strange_entries(&stats),
            stats.missing_bitmaps - missing,
        ];
        if causes == [0; 5] {
            let strays: Vec<u64> = self.copier.reported(slot.id).collect();
            self.episode.stray_pages += strays.len() as u64;
            self.find(slot, &strays, "reported of a slot that is new");
        }
        Ok(())
    }

    pub fn remove(&mut self, slot: usize, live: bool) -> Result<()> {
        let Some(instance) = self.goes[slot].there.clone() else {
            return Ok(());
        };
        let writers = |_: usize, plan: &VcpuPlan| plan.goes == Some(slot);
        self.world.write_in_resets(false);
        if !live {
            self.pause(writers)?;
        }
        // From here on no device writes to it, and what they wrote is marked.
        self.ledger
            .close()
            .retain(|other| !Arc::ptr_eq(other, &instance));
        let before = live.then(|| instance.snapshot()).transpose()?;
        if live {
            // What the hardware has in its buffers reaches the rings: no pass sees it before.
            self.pause(writers)?;
            self.resume_those(writers);
        }
        let retired = retry(|| self.log.retire_slot(instance.id))?;
        self.counts.add(Fault::SlotsRetired);
        // The last chance to copy it.
        self.copier.round(Kind::All)?;
        drop(self.ledger.settle());
        self.episode.comparisons += 1;
        match &before {
            Some(before) => {
                let missed = instance.older_than(before);
                self.note(&instance, &missed, "retired beside its writers");
                self.pause(writers)?;
            }
            None => self.note(&instance, &instance.differing(), "retired"),
        }
        // The writers are paused, and not resumed before there is a slot again.
        self.goes[slot].there = None;
        // Those that store to all of it go with it: what comes in its place may be smaller.
        while let Some(place) = self
            .vcpus
            .iter()
            .position(|running| writers(0, &running.plan) && running.plan.whole)
        {
            self.drop_vcpu(place)?;
        }
        self.world.remove_slot(instance.id)?;
        retry(|| self.log.finish_slot(&retired))?;
        self.ledger.died(&instance);
        self.counts.add(Fault::SlotsFinished);
        self.world.write_in_resets(true);
        Ok(())
    }

    pub fn there(&self) -> impl Iterator<Item = &Arc<Instance>> {
        let going = self.goes.iter().filter_map(|going| going.there.as_ref());
        self.stays.iter().chain(going)
    }

    pub fn rearm(&mut self, pick: u64) -> Result<()> {
        let slots: Vec<SlotId> = self.there().map(|slot| slot.id).collect();
        let slot = slots[pick as usize % slots.len()];
        self.world.write_in_resets(false);
        self.pause(|_, _| true)?;
        {
            // The kernel throws its bitmap away: no sync is to come in between.
            let has_bitmap = self.log.mode() == Mode::Bitmap;
            let _settled = has_bitmap.then(|| self.ledger.settle());
            self.world.rearm_slot(slot)?;
            match self.log.rearmed(slot) {
                Ok(()) => self.counts.add(Fault::SlotsRearmed),
                // For good, and everything is reported.
                Err(SlotError::BrokenRing { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.world.write_in_resets(true);
        self.resume();
        Ok(())
    }
}
