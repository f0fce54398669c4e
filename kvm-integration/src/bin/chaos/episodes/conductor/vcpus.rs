// SPDX-License-Identifier: Apache-2.0 OR MIT
//! vCPUs that start, pause and end.

use std::sync::Arc;

use anyhow::{Result, bail};
use kvm_integration::guest::workload::Region;

use super::{Conductor, Running};
use crate::episodes::fault::Fault;
use crate::episodes::ledger::{Instance, gpa};
use crate::episodes::plan::VcpuPlan;
use crate::episodes::world::{CHUNK, Job, LONGEST_LIST};

impl Conductor<'_> {
    pub fn start_late(&mut self) -> Result<()> {
        let Some(&plan) = self.plan.late.get(self.late) else {
            return Ok(());
        };
        self.late += 1;
        self.start_vcpu(plan)?;
        self.counts.add(Fault::VcpusAttachedLate);
        self.aim();
        Ok(())
    }

    pub fn start_vcpu(&mut self, plan: VcpuPlan) -> Result<()> {
        if let Some(slot) = plan.goes {
            // It can't store to what is not there.
            self.add(slot, self.plan.goes[slot].least)?;
        }
        let index = self.made;
        self.made += 1;
        let regions = self.regions(plan);
        let pages = regions.iter().map(|region| region.pages).sum();
        let (workload, vcpus) = (self.plan.workload, self.plan.vcpus.len() as u32);
        let length = workload.covering_length(pages, vcpus, CHUNK);
        let list = workload.addresses(
            self.plan.seed,
            index,
            vcpus.max(index + 1),
            &regions,
            length.min(LONGEST_LIST),
        );
        let vcpu = self.world.start_vcpu(Job {
            index,
            kind: plan.kind,
            list,
            abandons: self.plan.abandons,
            counts: Arc::clone(self.counts),
        })?;
        self.vcpus.push(Running { vcpu, plan });
        Ok(())
    }

    /// What a vCPU stores to.
    fn regions(&self, plan: VcpuPlan) -> Vec<Region> {
        let region = |slot: &Instance, pages| Region {
            gpa: gpa(slot.id),
            pages,
        };
        let stays = self.stays.iter().map(|slot| region(slot, slot.pages()));
        let goes = plan.goes.and_then(|slot| {
            let there = self.goes[slot].there.as_ref()?;
            let least = self.plan.goes[slot].least;
            Some(region(
                there,
                if plan.whole { there.pages() } else { least },
            ))
        });
        let untold = self.untold.iter().map(|slot| region(slot, slot.pages()));
        stays.chain(untold).chain(goes).collect()
    }

    pub fn drop_vcpu(&mut self, place: usize) -> Result<()> {
        self.vcpus.remove(place).vcpu.stop()?;
        self.counts.add(Fault::VcpusDropped);
        Ok(())
    }

    /// Throws them out of the guest, and waits until they are.
    pub fn pause(&mut self, which: impl Fn(usize, &VcpuPlan) -> bool) -> Result<()> {
        let those = |(place, running): &(usize, &Running)| which(*place, &running.plan);
        for (_, running) in self.vcpus.iter().enumerate().filter(those) {
            running.vcpu.request_pause();
        }
        let mut ended = None;
        for (place, running) in self.vcpus.iter().enumerate().filter(those) {
            if !running.vcpu.wait_paused() {
                ended = Some(place);
            }
        }
        if let Some(place) = ended {
            self.vcpus.remove(place).vcpu.stop()?;
            bail!("a vCPU's thread has ended for no reason it could give");
        }
        Ok(())
    }

    /// Lets all run whose slots are there.
    pub fn resume(&self) {
        self.resume_those(|_, _| true);
    }

    pub fn resume_those(&self, which: impl Fn(usize, &VcpuPlan) -> bool) {
        for (place, Running { vcpu, plan }) in self.vcpus.iter().enumerate() {
            let is_there = |slot: usize| self.goes[slot].there.is_some();
            if which(place, plan) && plan.goes.is_none_or(is_there) {
                vcpu.resume();
            }
        }
    }

    pub fn kick(&mut self, which: impl Fn(usize, &VcpuPlan) -> bool) -> Result<()> {
        self.pause(&which)?;
        self.resume_those(which);
        self.counts.add(Fault::Kicks);
        Ok(())
    }
}
