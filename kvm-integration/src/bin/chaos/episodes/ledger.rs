// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memslots that there are and were, each with a copy made of what syncs report and nothing else.
//!
//! An id may be in use by one slot after another while syncs are under way, and a sync names slots by
//! their ids. So a copier looks up which slots had the id at any time during its sync.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use kvm_dirty_ring::SlotId;

use kvm_integration::guest::memory::{GuestMemory, MemoryError, PAGE_SIZE};

/// Where the guest sees slot `id`.
pub fn gpa(id: SlotId) -> u64 {
    u64::from(id.raw()) << 32
}

/// One memslot, of those that had its id.
#[derive(Debug)]
pub struct Instance {
    pub id: SlotId,
    pub memory: Arc<GuestMemory>,
    copy: GuestMemory,
    /// Held while pages are copied: of two copies of a page, the later one is to stay.
    copying: Mutex<()>,
}

impl Instance {
    pub fn new(id: SlotId, pages: u64) -> Result<Self, MemoryError> {
        Ok(Self {
            id,
            memory: Arc::new(GuestMemory::new(pages)?),
            copy: GuestMemory::new(pages)?,
            copying: Mutex::new(()),
        })
    }

    pub fn pages(&self) -> u64 {
        self.memory.pages()
    }

    /// Copies pages, unless they are not all inside.
    pub fn copy_run(&self, first_page: u64, pages: u64) -> bool {
        if first_page + pages > self.pages() {
            return false;
        }
        let _one_at_a_time = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
        self.memory.copy_run(first_page, pages, &self.copy);
        true
    }

    /// The pages whose copy differs in some byte. Nobody may write.
    pub fn differing(&self) -> Vec<u64> {
        self.memory.differing(&self.copy).collect()
    }

    /// What is in memory now, or a little later.
    pub fn snapshot(&self) -> Result<GuestMemory, MemoryError> {
        let snapshot = GuestMemory::new(self.pages())?;
        self.memory.copy_run(0, self.pages(), &snapshot);
        Ok(snapshot)
    }

    /// The pages whose copy is older than `snapshot` in some word: each writer of a page has a
    /// word there of its own, and only ever counts it up.
    pub fn older_than(&self, snapshot: &GuestMemory) -> Vec<u64> {
        let is_older = |&page: &u64| {
            (page * PAGE_SIZE..(page + 1) * PAGE_SIZE)
                .step_by(8)
                .any(|word| self.copy.read_u64(word) < snapshot.read_u64(word))
        };
        snapshot.differing(&self.copy).filter(is_older).collect()
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Ledger {
    lives: Mutex<Lives>,
    /// Slots that devices may write to. Held while they do, and for good while they may not.
    pub open: RwLock<Vec<Arc<Instance>>>,
    /// Held from before a sync until what it reported is copied.
    pub rounds: RwLock<()>,
}

#[derive(Debug, Default)]
struct Lives {
    now: u64,
    /// Each with the time of its death.
    all: Vec<(Arc<Instance>, Option<u64>)>,
}

impl Ledger {
    fn lives(&self) -> MutexGuard<'_, Lives> {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot may be reported from now on.
    pub fn born(&self, instance: &Arc<Instance>) {
        self.lives().all.push((Arc::clone(instance), None));
    }

    /// No sync that begins from now on reports the slot.
    pub fn died(&self, instance: &Arc<Instance>) {
        let mut lives = self.lives();
        lives.now += 1;
        let now = lives.now;
        for (other, death) in &mut lives.all {
            if Arc::ptr_eq(other, instance) {
                *death = Some(now);
            }
        }
    }

    /// What to give to [`since`](Self::since).
    pub fn now(&self) -> u64 {
        self.lives().now
    }

    /// The slots that were there then or came later, also those that are gone by now.
    pub fn since(&self, then: u64) -> Vec<Arc<Instance>> {
        let lives = self.lives();
        let there = |death: &Option<u64>| death.is_none_or(|death| death > then);
        let found = lives.all.iter().filter(|(_, death)| there(death));
        found.map(|(instance, _)| Arc::clone(instance)).collect()
    }

    /// Keeps devices from writing.
    pub fn close(&self) -> RwLockWriteGuard<'_, Vec<Arc<Instance>>> {
        self.open.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until what was reported so far is copied, and keeps others from syncing.
    pub fn settle(&self) -> RwLockWriteGuard<'_, ()> {
        self.rounds.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(pages: u64) -> Arc<Instance> {
        Arc::new(Instance::new(SlotId::new(0, 1), pages).unwrap())
    }

    #[test]
    fn a_slot_is_found_by_whoever_began_before_its_death() {
        let (ledger, old, new) = (Ledger::default(), instance(1), instance(2));
        ledger.born(&old);
        let before = ledger.now();
        ledger.died(&old);
        let after = ledger.now();
        ledger.born(&new);
        let sizes = |then| -> Vec<u64> {
            let found = ledger.since(then);
            found.iter().map(|instance| instance.pages()).collect()
        };
        assert_eq!((sizes(before), sizes(after)), (vec![1, 2], vec![2]));
    }

    #[test]
    fn a_copy_may_be_newer_than_a_snapshot_and_not_older() {
        let instance = instance(3);
        let write = |page: u64, value| instance.memory.write_u64(page * PAGE_SIZE + 128, value);
        write(1, 5);
        let snapshot = instance.snapshot().unwrap();
        write(0, 1);
        write(1, 6);
        assert!(instance.copy_run(0, 1));
        assert_eq!(instance.older_than(&snapshot), [1]);
        assert_eq!(instance.differing(), [1]);
        assert!(instance.copy_run(1, 1));
        assert_eq!(instance.older_than(&snapshot), [0u64; 0]);
        assert!(!instance.copy_run(1, 3));
    }
}
