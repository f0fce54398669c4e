// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What things take, of the host and of the guest.

/// What the host's work takes, in nanoseconds; by default nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Costs {
    /// Leaving the guest for a full ring and entering it again, without what is done in between.
    pub exit: u64,
    /// Coming to a ring to harvest it.
    pub harvest_ring: u64,
    /// Harvesting an entry.
    pub harvest_entry: u64,
    /// The reset ioctl.
    pub reset: u64,
    /// What it takes for each ring of the VM.
    pub reset_ring: u64,
    /// What it takes for each entry: its page is protected again.
    pub reset_entry: u64,
    /// A wake-up of the reaper.
    pub wake: u64,
    /// A look at an empty ring.
    pub look_empty: u64,
    /// A look at a ring with entries.
    pub look: u64,
}

impl Costs {
    /// As measured with rings of 4,096 entries, rounded.
    pub const MEASURED: Self = Self {
        exit: 5_000,
        harvest_ring: 100,
        harvest_entry: 3,
        reset: 15_000,
        reset_ring: 300,
        reset_entry: 57,
        wake: 5_000,
        look_empty: 30,
        look: 126,
    };

    /// A pass that finds `entries` in `harvested` rings of a VM that has `rings`.
    pub fn pass(&self, rings: u64, harvested: u64, entries: u64) -> u64 {
        self.harvest_ring * harvested + self.harvest_entry * entries + self.reset_of(rings, entries)
    }

    /// A reset of `entries` entries in a VM that has `rings` rings.
    pub fn reset_of(&self, rings: u64, entries: u64) -> u64 {
        self.reset + self.reset_ring * rings + self.reset_entry * entries
    }
}

/// How fast a vCPU stores, in nanoseconds a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guest {
    /// A store to a page that is protected: a fault, and an entry.
    pub first_store: u64,
    /// A store to a page whose entry is in the ring already: none.
    pub next_store: u64,
}

impl Guest {
    /// A guest whose faults take what they take on KVM.
    pub const NATIVE: Self = Self {
        first_store: 20_000,
        next_store: 50,
    };
    /// A guest that is emulated to log more than any real one.
    pub const FAST: Self = Self {
        first_store: 2_000,
        ..Self::NATIVE
    };

    /// The most entries a second that a vCPU can log.
    pub fn fastest(&self) -> f64 {
        1e9 / self.first_store.max(1) as f64
    }
}
