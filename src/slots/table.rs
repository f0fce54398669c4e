// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memslots whose pages are tracked, and their bits.

use crate::bitmap::pages::PageBits;
use crate::bitmap::pool::ShardGuard;
use crate::bitmap::shard::ShardBits;
use crate::bitmap::shared::SharedBits;
use crate::error::SlotError;
use crate::slot_id::{ADDRESS_SPACES, MAX_SLOT_PAGES, SlotId};
use crate::slots::members::Members;
use crate::sync::{Arc, AtomicBool, Ordering};

/// One tracked memslot with its bits in every shard.
pub(crate) struct Slot {
    id: SlotId,
    /// How many slots were added before it: of two with one id, the greater number is the later slot.
    number: u64,
    pages: u64,
    shards: Box<[ShardBits]>,
    device: Arc<SharedBits>,
    /// Pages that stay open.
    members: Members,
    /// Pages that may be written without being logged, see [`Slot::suspect`].
    suspect: SharedBits,
    all_suspect: AtomicBool,
    /// Whether the kernel may not be logging it just now, see [`Slot::untrack`].
    untracked: AtomicBool,
    /// Whether the last attempt to read its bits from the kernel failed.
    bits_missing: AtomicBool,
}

impl Slot {
    fn new(
        id: SlotId,
        number: u64,
        pages: u64,
        device: Option<Arc<SharedBits>>,
        shards: usize,
    ) -> Result<Self, SlotError> {
        if pages == 0 || pages > MAX_SLOT_PAGES {
            return Err(SlotError::Pages { slot: id, pages });
        }
        let no_memory = SlotError::NoMemory { slot: id, pages };
        let shards: Option<Box<[_]>> = (0..shards).map(|_| ShardBits::new(pages)).collect();
        let device = device.or_else(|| SharedBits::new(pages).map(Arc::new));
        let bits = shards.zip(device).zip(SharedBits::new(pages));
        let bits = bits.zip(Members::new(pages));
        let (((shards, device), suspect), members) = bits.ok_or(no_memory)?;
        Ok(Self {
            id,
            number,
            pages,
            shards,
            device,
            members,
            suspect,
            all_suspect: AtomicBool::new(false),
            untracked: AtomicBool::new(false),
            bits_missing: AtomicBool::new(false),
        })
    }

    pub(crate) fn id(&self) -> SlotId {
        self.id
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Returns whether it was added after `other`. If both have the same id, `other` is gone.
    pub(crate) fn is_later_than(&self, other: &Self) -> bool {
        self.number > other.number
    }

    /// Returns the bits of shard `shard`, for a pointer to them.
    pub(crate) fn shard_bits(&self, shard: usize) -> &ShardBits {
        &self.shards[shard]
    }

    /// Moves the bits of the shard that `held` stands for into `into`.
    pub(crate) fn take_shard_into(&self, held: &ShardGuard<'_>, into: &mut PageBits) {
        // SAFETY: by the guard the caller holds the shard.
        unsafe { self.shards[held.index()].take_into(into) }
    }

    /// Adds the bits of that shard to `into`, and leaves them in the shard.
    pub(crate) fn copy_shard_into(&self, held: &ShardGuard<'_>, into: &mut PageBits) {
        self.for_each_of_shard(held, |word, bits| into.merge(word, bits));
    }

    fn for_each_of_shard(&self, held: &ShardGuard<'_>, each: impl FnMut(usize, u64)) {
        // SAFETY: by the guard the caller holds the shard.
        unsafe { self.shards[held.index()].for_each(each) }
    }

    /// Its pages that stay open.
    pub(crate) fn members(&self) -> &Members {
        &self.members
    }

    /// Adds the members to `into` that are not suspect.
    pub(crate) fn copy_open_into(&self, into: &mut PageBits) {
        // Acquire: pairs with the release store in `suspect_all`.
        if !self.all_suspect.load(Ordering::Acquire) {
            self.members.copy_but(&self.suspect, into);
        }
    }

    /// Returns whether the kernel logs the slot. If not, any of its pages may be written.
    pub(crate) fn is_tracked(&self) -> bool {
        // Relaxed: it changes only under the lock on syncs; without that it is true of a moment.
        !self.untracked.load(Ordering::Relaxed)
    }

    /// Notes that the kernel is about to stop logging the slot. From now on every page is dirty. Under the lock on syncs.
    pub(crate) fn untrack(&self) {
        // Relaxed: as in `is_tracked`.
        self.untracked.store(true, Ordering::Relaxed);
        self.members.forget();
    }

    /// Notes that the kernel logs the slot by now. Every page is dirty once more, as earlier writes were not logged. Under the lock
    /// on syncs.
    pub(crate) fn track(&self) {
        self.device.set(0, self.pages);
        // Relaxed: as in `is_tracked`.
        self.untracked.store(false, Ordering::Relaxed);
    }

    /// The same for a slot of which nothing was written meanwhile.
    pub(crate) fn track_again(&self) {
        // Relaxed: as in `is_tracked`.
        self.untracked.store(false, Ordering::Relaxed);
    }

    /// Notes whether the kernel's bits are missing, and returns whether they were before. The caller holds the lock on the
    /// kernel's bits.
    pub(crate) fn note_missing(&self, missing: bool) -> bool {
        // Relaxed: under the lock on the kernel's bits.
        self.bits_missing.swap(missing, Ordering::Relaxed)
    }

    /// Returns whether they were missing.
    pub(crate) fn is_missing(&self) -> bool {
        // Relaxed: as above.
        self.bits_missing.load(Ordering::Relaxed)
    }

    /// Returns the bits that devices and the VMM set.
    pub(crate) fn device(&self) -> &SharedBits {
        &self.device
    }

    /// Puts every page in the shard that `held` stands for under suspicion. These pages may be unprotected and their next
    /// writes unlogged, so every sync reports them until the slot is re-armed.
    pub(crate) fn suspect(&self, held: &ShardGuard<'_>) {
        self.for_each_of_shard(held, |word, bits| _ = self.suspect.merge(word, bits));
    }

    /// Puts a page under suspicion, if there is one.
    pub(crate) fn suspect_page(&self, page: u64) {
        if page < self.pages {
            self.suspect.set(page, 1);
        }
    }

    /// Puts the pages under suspicion that may be in one batch of a reset with `page`. KVM protects pages that lie within the bits
    /// of a word at once (`kvm_dirty_ring_reset`).
    pub(crate) fn suspect_batch(&self, page: u64) {
        if page < self.pages {
            let first = page.saturating_sub(u64::from(u64::BITS) - 1);
            let end = (page + u64::from(u64::BITS)).min(self.pages);
            self.suspect.set(first, end - first);
        }
    }

    /// Puts every page of the slot under suspicion.
    pub(crate) fn suspect_all(&self) {
        // Release: pairs with the acquire load in `copy_suspects_into`.
        self.all_suspect.store(true, Ordering::Release);
    }

    /// Returns the number of suspect pages.
    pub(crate) fn suspects(&self) -> u64 {
        // Acquire: pairs with the release store in `suspect_all`.
        match self.all_suspect.load(Ordering::Acquire) {
            true => self.pages,
            false => self.suspect.count(),
        }
    }

    /// Adds the suspect pages to `into`; every page while the slot is not tracked.
    pub(crate) fn copy_suspects_into(&self, into: &mut PageBits) {
        // Acquire: pairs with the release store in `suspect_all`.
        if self.all_suspect.load(Ordering::Acquire) || !self.is_tracked() {
            into.fill();
        }
        self.suspect.copy_into(into);
    }

    /// Ends all suspicion of the slot, and adds the pages that were suspect to `into`.
    pub(crate) fn take_suspects_into(&self, into: &mut PageBits) {
        // AcqRel: the acquire pairs with the release store in `suspect_all`. The release pairs with
        // nothing; it keeps the flag from coming back before it went.
        if self.all_suspect.swap(false, Ordering::AcqRel) {
            into.fill();
        }
        self.suspect.take_into(into);
    }
}

/// All tracked slots at one moment. A pass takes one table and uses it to its end.
#[derive(Clone, Default)]
pub(crate) struct Table {
    /// By address space, then by id.
    spaces: Vec<Vec<Option<Tracked>>>,
    /// The number of slots that were ever added.
    added: u64,
    /// The number of the next removal.
    removals: u64,
}

#[derive(Clone)]
struct Tracked {
    slot: Arc<Slot>,
    /// Its removal, if one has begun: the slot still takes entries, and its id is not free yet.
    removal: Option<Removal>,
}

/// Distinguishes one removal from the next, also of the same slot.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Removal(u64);

impl Table {
    /// Finds the slot by KVM's number for it.
    pub(crate) fn get(&self, raw: u32) -> Option<&Arc<Slot>> {
        let id = SlotId::from_raw(raw);
        self.tracked(id).map(|tracked| &tracked.slot)
    }

    /// The same, with whether it stays: its removal has not begun.
    pub(crate) fn find(&self, raw: u32) -> Option<(&Arc<Slot>, bool)> {
        let tracked = self.tracked(SlotId::from_raw(raw))?;
        Some((&tracked.slot, tracked.removal.is_none()))
    }

    fn tracked(&self, id: SlotId) -> Option<&Tracked> {
        let space = self.spaces.get(usize::from(id.address_space()))?;
        space.get(usize::from(id.id()))?.as_ref()
    }

    /// Returns all slots, ascending by id.
    pub(crate) fn slots(&self) -> impl Iterator<Item = &Arc<Slot>> {
        let tracked = self.spaces.iter().flatten().flatten();
        tracked.map(|tracked| &tracked.slot)
    }

    /// Returns the slots whose removal has not begun, ascending by id.
    pub(crate) fn staying(&self) -> impl Iterator<Item = &Arc<Slot>> {
        let tracked = self.spaces.iter().flatten().flatten();
        let staying = tracked.filter(|tracked| tracked.removal.is_none());
        staying.map(|tracked| &tracked.slot)
    }

    /// Returns whether the removal of `slot`, which is tracked, has begun.
    pub(crate) fn is_retired(&self, slot: &Slot) -> bool {
        let tracked = self.tracked(slot.id);
        tracked.is_some_and(|tracked| tracked.removal.is_some())
    }

    /// Returns whether `slot` itself is tracked, not only its id.
    pub(crate) fn holds(&self, slot: &Arc<Slot>) -> bool {
        let now = self.get(slot.id.raw());
        now.is_some_and(|now| Arc::ptr_eq(now, slot))
    }

    /// Adds a slot. Its devices mark their writes in `device`, which has as many pages, or in bits of the slot's own. Pages that
    /// are marked there are dirty, all others clean.
    pub(crate) fn add(
        &mut self,
        id: SlotId,
        pages: u64,
        device: Option<Arc<SharedBits>>,
        shards: usize,
    ) -> Result<(), SlotError> {
        if id.address_space() >= ADDRESS_SPACES {
            return Err(SlotError::AddressSpace { slot: id });
        }
        match self.tracked(id) {
            Some(tracked) if tracked.removal.is_some() => {
                return Err(SlotError::Retired { slot: id });
            }
            Some(_) => return Err(SlotError::Exists { slot: id }),
            None => {}
        }
        if let Some(device) = &device {
            // A sync would take the bits for one of the two.
            let mut slots = self.slots();
            if let Some(by) = slots.find(|slot| Arc::ptr_eq(&slot.device, device)) {
                let by = by.id;
                return Err(SlotError::BitmapInUse { slot: id, by });
            }
        }
        let slot = Arc::new(Slot::new(id, self.added, pages, device, shards)?);
        self.added += 1;
        let space = usize::from(id.address_space());
        if self.spaces.len() <= space {
            self.spaces.resize_with(space + 1, Vec::new);
        }
        let ids = &mut self.spaces[space];
        if ids.len() <= usize::from(id.id()) {
            ids.resize_with(usize::from(id.id()) + 1, || None);
        }
        ids[usize::from(id.id())] = Some(Tracked {
            slot,
            removal: None,
        });
        Ok(())
    }

    /// Begins the removal of a slot, or finds it begun.
    pub(crate) fn retire(&mut self, id: SlotId) -> Result<(Arc<Slot>, Removal), SlotError> {
        let next = Removal(self.removals);
        let tracked = self.tracked_mut(id);
        let tracked = tracked.ok_or(SlotError::Unknown { slot: id })?;
        let removal = *tracked.removal.get_or_insert(next);
        let slot = Arc::clone(&tracked.slot);
        self.removals += 1;
        Ok((slot, removal))
    }

    /// Checks that this removal of the slot is under way.
    pub(crate) fn check(&self, slot: &Arc<Slot>, removal: Removal) -> Result<(), SlotError> {
        let tracked = self.tracked(slot.id);
        let tracked = tracked.filter(|tracked| Arc::ptr_eq(&tracked.slot, slot));
        let tracked = tracked.ok_or(SlotError::Unknown { slot: slot.id })?;
        match tracked.removal == Some(removal) {
            true => Ok(()),
            false => Err(SlotError::Kept { slot: slot.id }),
        }
    }

    /// Cancels a removal: the slot stays.
    pub(crate) fn keep(&mut self, slot: &Arc<Slot>, removal: Removal) -> Result<(), SlotError> {
        self.check(slot, removal)?;
        if let Some(tracked) = self.tracked_mut(slot.id) {
            tracked.removal = None;
        }
        Ok(())
    }

    /// Forgets a retired slot. Its id is free then.
    pub(crate) fn remove(&mut self, slot: &Arc<Slot>) {
        if self.holds(slot) {
            self.spaces[usize::from(slot.id.address_space())][usize::from(slot.id.id())] = None;
        }
    }

    fn tracked_mut(&mut self, id: SlotId) -> Option<&mut Tracked> {
        let space = self.spaces.get_mut(usize::from(id.address_space()))?;
        space.get_mut(usize::from(id.id()))?.as_mut()
    }
}
