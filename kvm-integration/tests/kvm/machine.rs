// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest, its dirty log, and the copy that the log keeps up to date.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::{DirtyLog, DirtyPages, LastPages, RingEntries, Run, SlotId, Stats, VcpuRing};
use kvm_integration::host::threads::states;
use kvm_integration::{
    Action, Exit, GuestMemory, Load, Mode, PAGE_SIZE, Region, TinyVcpu, TinyVm, VcpuThread,
    Workload, kvm_available,
};
use libtest_mimic::Failed;

use super::harness::{chain, remark};
use super::scale;

/// Sleeps, through signals too: `sleep` begins anew after each, and would never end in a storm.
pub fn nap(time: Duration) {
    // Its deadline is a point in time. Nobody unparks threads here.
    thread::park_timeout(time);
}

/// How long a test waits for what must come, on however slow or busy a machine.
pub fn patience() -> Duration {
    scale::patience(Duration::from_secs(60))
}

/// Waits for something that is sure to come.
pub fn wait(what: &str, mut until: impl FnMut() -> bool) -> Result<(), Failed> {
    let (patience, start) = (patience(), Instant::now());
    while !until() {
        if start.elapsed() > patience {
            let missing = format!(
                "{patience:?} went by without {what}; the threads:\n{}",
                states()
            );
            // At once: a test that fails stops its vCPUs first, and what hangs may keep it from that.
            remark(&missing);
            return Err(missing.into());
        }
        nap(Duration::from_micros(50));
    }
    Ok(())
}

/// Waits for something that is sure to come while these vCPUs run; fails if one has ended.
pub fn wait_beside(
    vcpus: &[VcpuThread],
    what: &str,
    mut until: impl FnMut() -> bool,
) -> Result<(), Failed> {
    wait(what, || until() || vcpus.iter().any(VcpuThread::ended))?;
    match vcpus.iter().find_map(VcpuThread::why_ended) {
        Some(why) => Err(format!("{why}; this was waited for: {what}").into()),
        None => Ok(()),
    }
}

/// Says that it is over when it is dropped, so that no thread goes on for ever beside a test that fails.
pub struct Over<'a>(pub &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Bytes of a page of the host's, which need not be the guest's.
pub fn host_page_size() -> u64 {
    // SAFETY: sysconf takes an integer.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).expect("pages have a size")
}

/// A virtual machine whose log copies it.
pub struct Machine {
    pub vm: TinyVm,
    pub log: DirtyLog,
    slots: Vec<Slot>,
    dirty: DirtyPages,
}

/// A logged slot.
struct Slot {
    id: u32,
    region: Region,
    memory: Arc<GuestMemory>,
    /// What a migration would have sent.
    copy: GuestMemory,
}

/// Where slot `id` of a machine is.
pub fn gpa(id: u32) -> u64 {
    u64::from(id) << 32
}

pub fn slot_id(id: u32) -> SlotId {
    SlotId::from_raw(id)
}

impl Machine {
    /// A machine with rings of `entries` entries and logged slots 1, 2, … of so many pages each.
    pub fn new(entries: u32, slots: &[u64]) -> Result<Self, Failed> {
        let vm = TinyVm::new(&kvm_available()?)?;
        let log = DirtyLog::enable(vm.vm_fd(), RingEntries::new(entries)?)?;
        Self::with(vm, log, slots)
    }

    /// A machine in bitmap mode.
    pub fn with_bitmap(slots: &[u64]) -> Result<Self, Failed> {
        let vm = TinyVm::new(&kvm_available()?)?;
        let log = DirtyLog::enable_bitmap(vm.vm_fd())?;
        Self::with(vm, log, slots)
    }

    /// The same with a machine and a log that are there already.
    pub fn with(vm: TinyVm, log: DirtyLog, slots: &[u64]) -> Result<Self, Failed> {
        let mut machine = Self {
            vm,
            log,
            slots: Vec::new(),
            dirty: DirtyPages::new(),
        };
        for (id, &pages) in (1..).zip(slots) {
            machine.add_slot(id, pages)?;
        }
        Ok(machine)
    }

    pub fn add_slot(&mut self, id: u32, pages: u64) -> Result<(), Failed> {
        self.add_memory(id, GuestMemory::new(pages)?)
    }

    /// Adds slot `id` with this memory.
    pub fn add_memory(&mut self, id: u32, memory: GuestMemory) -> Result<(), Failed> {
        let (pages, memory) = (memory.pages(), Arc::new(memory));
        self.log.add_slot(slot_id(id), pages)?;
        self.vm.add_slot(id, gpa(id), Arc::clone(&memory), true)?;
        self.slots.push(Slot {
            id,
            region: Region {
                gpa: gpa(id),
                pages,
            },
            memory,
            copy: GuestMemory::new(pages)?,
        });
        Ok(())
    }

    /// Deletes a slot in KVM. What the log thinks of it is the caller's business.
    pub fn delete_slot(&mut self, id: u32) -> Result<(), Failed> {
        self.vm.remove_slot(id)?;
        self.slots.retain(|slot| slot.id != id);
        Ok(())
    }

    fn slot(&self, id: u32) -> &Slot {
        let slot = self.slots.iter().find(|slot| slot.id == id);
        slot.expect("a slot of this machine")
    }

    pub fn memory(&self, id: u32) -> &Arc<GuestMemory> {
        &self.slot(id).memory
    }

    pub fn pages(&self) -> u64 {
        self.slots.iter().map(|slot| slot.region.pages).sum()
    }

    /// What vCPU `index` of `vcpus` does so that together they store to every page of every slot
    /// at each pass.
    pub fn load(&self, workload: Workload, index: u32, vcpus: u32) -> Load {
        let regions: Vec<Region> = self.slots.iter().map(|slot| slot.region).collect();
        let length = workload.covering_length(self.pages(), vcpus, 0);
        let list = workload.addresses(7, index, vcpus, &regions, length);
        Load::new(Mode::Native, list)
    }

    pub fn attach(&self, index: u32, load: &Load) -> Result<(TinyVcpu, VcpuRing), Failed> {
        let vcpu = self.vm.create_vcpu(index, load)?;
        let ring = self.log.attach_vcpu(vcpu.fd())?;
        Ok((vcpu, ring))
    }

    /// Starts vCPU `index`: it makes room in its ring when it must, and, if the load exits there,
    /// pauses after each pass.
    pub fn spawn(&self, index: u32, load: &Load) -> Result<VcpuThread, Failed> {
        let (vcpu, ring) = self.attach(index, load)?;
        serve(vcpu, ring)
    }

    /// Starts vCPUs 0 to `vcpus` on a workload that they share.
    pub fn spawn_all(&self, workload: Workload, vcpus: u32) -> Result<Vec<VcpuThread>, Failed> {
        (0..vcpus)
            .map(|index| self.spawn(index, &self.load(workload, index, vcpus)))
            .collect()
    }

    /// One round of a migration: syncs, then copies what is dirty. How many pages that were.
    pub fn round(&mut self) -> Result<u64, Failed> {
        self.log.sync(&mut self.dirty)?;
        self.copy(self.dirty.runs())?;
        Ok(self.dirty.page_count())
    }

    /// The same without members of the working set: how many pages were others, and how many members.
    pub fn round_of_others(&mut self) -> Result<(u64, u64), Failed> {
        self.log.sync(&mut self.dirty)?;
        self.copy(self.dirty.others().runs())?;
        let members = self.dirty.members().page_count();
        Ok((self.dirty.others().page_count(), members))
    }

    /// A round in chunks of so many pages, each protected when its turn comes. How many pages they had.
    pub fn round_on_demand(&mut self, span: u64) -> Result<u64, Failed> {
        let mut found = self.log.sync_on_demand()?;
        let mut copied = 0;
        while let Some(chunk) = found.next_chunk(span)? {
            self.copy(chunk.runs())?;
            copied += chunk.page_count();
        }
        Ok(copied)
    }

    /// The last round, with all vCPUs paused, by a sync that protects nothing. How many pages it copied.
    pub fn last_round(&mut self) -> Result<u64, Failed> {
        let mut last = LastPages::new();
        self.log.last_sync(&mut last)?;
        self.copy(last.runs())?;
        Ok(last.page_count())
    }

    pub fn copy(&self, runs: impl Iterator<Item = Run>) -> Result<(), Failed> {
        for run in runs {
            let slot = self.slots.iter().find(|slot| slot_id(slot.id) == run.slot);
            let slot = slot.ok_or_else(|| format!("pages of {}, which is no more", run.slot))?;
            slot.memory.copy_run(run.first_page, run.pages, &slot.copy);
        }
        Ok(())
    }

    /// Closes the working set. No vCPU may run, but in bitmap mode.
    pub fn refresh(&self) -> Result<usize, Failed> {
        let protect = |slot: SlotId| {
            let id = slot.raw();
            self.vm.set_logged(id, false).map_err(io::Error::other)?;
            self.vm.set_logged(id, true).map_err(io::Error::other)
        };
        Ok(self.log.refresh(protect)?)
    }

    /// What the last round copied.
    pub fn dirty(&self) -> &DirtyPages {
        &self.dirty
    }

    /// The pages of slot `id` whose copy is not as they are. No vCPU may run.
    pub fn missing(&self, id: u32) -> Vec<u64> {
        let slot = self.slot(id);
        slot.memory.differing(&slot.copy).collect()
    }

    /// Compares the copy byte for byte. No vCPU may run.
    pub fn compare(&self) -> Result<(), Failed> {
        for slot in &self.slots {
            let lost = self.missing(slot.id);
            if let Some(first) = lost.first() {
                let (id, lost) = (slot.id, lost.len());
                let stats = self.log.stats();
                return Err(format!(
                    "slot {id}: {lost} pages were lost, the first is page {first}; {stats:?}"
                )
                .into());
            }
        }
        Ok(())
    }

    /// The last round: with all vCPUs paused, one sync must be enough.
    pub fn finish(&mut self, vcpus: &[VcpuThread]) -> Result<(), Failed> {
        pause(vcpus)?;
        self.round()?;
        self.compare()
    }
}

/// Starts a vCPU with its ring, as [`Machine::spawn`] does.
pub fn serve(vcpu: TinyVcpu, mut ring: VcpuRing) -> Result<VcpuThread, Failed> {
    let handler = move |exit| match exit {
        Exit::RingFull => match ring.on_full() {
            Ok(()) => Action::Continue,
            Err(error) => Action::Fail(error.into()),
        },
        Exit::Kicked => {
            ring.throttle();
            Action::Continue
        }
        Exit::Chunk => Action::Continue,
        Exit::PassDone => Action::Pause,
    };
    Ok(VcpuThread::spawn(vcpu, handler)?)
}

/// Page `page` of slot `id`, as a guest-physical address.
pub fn page_of(id: u32, page: u64) -> u64 {
    gpa(id) + page * PAGE_SIZE
}

/// Pauses all of them; fails if one has ended.
pub fn pause(vcpus: &[VcpuThread]) -> Result<(), Failed> {
    vcpus.iter().for_each(VcpuThread::request_pause);
    wait_paused(vcpus)
}

/// Waits until each of them has paused, by itself or because somebody wants it to.
pub fn wait_paused(vcpus: &[VcpuThread]) -> Result<(), Failed> {
    wait_beside(vcpus, "a pause of each vCPU", || {
        vcpus.iter().all(VcpuThread::is_paused)
    })
}

pub fn resume(vcpus: &[VcpuThread]) {
    vcpus.iter().for_each(VcpuThread::resume);
}

/// Waits until each of them has come to the end of its list `passes` times more. It was somewhere on
/// its way there: only so many passes less one are sure to have been whole ones, but for a guest that
/// has just begun.
pub fn run_passes(vcpus: &[VcpuThread], passes: u64) -> Result<(), Failed> {
    let goals: Vec<u64> = vcpus.iter().map(|vcpu| vcpu.passes() + passes).collect();
    wait_beside(vcpus, "a pass of each vCPU", || {
        let mut vcpus = vcpus.iter().zip(&goals);
        vcpus.all(|(vcpu, &goal)| vcpu.passes() >= goal)
    })
}

/// Ends them, and says what was wrong with them.
pub fn stop(vcpus: impl IntoIterator<Item = VcpuThread>) -> Result<Vec<TinyVcpu>, Failed> {
    let stopped = vcpus.into_iter().map(VcpuThread::stop);
    let stopped: Result<_, _> = stopped.collect();
    stopped.map_err(|error| chain(&error).into())
}

/// Fails unless the log has had no reason for any suspicion, but for resets that had to wait for a
/// change of slots, which are doubtful.
pub fn assert_unsuspicious(stats: &Stats) {
    let suspicions = [
        stats.short_resets,
        stats.failed_resets,
        stats.unknown_slot_entries,
        stats.out_of_range_entries,
        stats.overruns,
        stats.missing_bitmaps,
    ];
    assert_eq!(suspicions, [0; 6], "{stats:?}");
}
