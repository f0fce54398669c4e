//! Chaos: guests that are tormented while their dirty log must not lose a page.
//!
//! Each episode makes a guest and does to it, and to its log, all that [`Fault`] lists, as a
//! plan says that is drawn from a seed. Meanwhile some threads sync, and copy what they are
//! told was written, and nothing else. When the vCPUs are stopped, a last sync must make the copy equal
//! to the original, byte for byte; every page that differs was missed. This is done a few times an
//! episode, so that what was missed is not written again first.
//!
//! A slot that is removed is compared too, for the last time between its retirement and its deletion.
//! Either its writers are paused before: then it must be equal. Or they go on: then every word must
//! be at least as new in the copy as it was in memory before the retirement; what is written later
//! nobody promises. Each writer has a word of its own in a page, and counts it up.
//!
//! Pages under suspicion are reported by every sync, so that they are no exception.

mod conductor;
mod copier;
mod error;
mod fault;
mod helpers;
#[cfg(target_arch = "x86_64")]
mod kvm;
mod ledger;
mod plan;
mod policies;
mod sim;
mod world;

use std::sync::Arc;

#[cfg(target_arch = "x86_64")]
use crate::host::Host;
use conductor::Conductor;
pub use error::ChaosError;
pub use fault::{Counts, Fault};
use kvm_dirty_ring::SlotId;
use plan::Plan;

use crate::storm::Storm;

/// Who runs the guests.
#[derive(Debug)]
#[non_exhaustive]
pub enum Backend {
    /// KVM, which works.
    #[cfg(target_arch = "x86_64")]
    Kvm(kvm_ioctls::Kvm),
    /// The simulated kernel.
    Sim,
}

impl Backend {
    /// The name, as on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Kvm(_) => "kvm",
            Self::Sim => "sim",
        }
    }

    fn is_sim(&self) -> bool {
        matches!(self, Self::Sim)
    }

    /// Whether it can be had to overrun a ring.
    fn overruns(&self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Kvm(_) => Host::detect().is_pvm(),
            Self::Sim => true,
        }
    }

    /// Whether it can be had to do that.
    pub fn can(&self, fault: Fault) -> bool {
        match fault {
            Fault::RingOverrun => self.overruns(),
            Fault::ShortReset | Fault::DoubtfulReset => self.is_sim() || Storm::can_stop(),
            Fault::WriteInReset => self.is_sim(),
            _ => true,
        }
    }
}

/// Episode after episode.
#[derive(Debug)]
pub struct Chaos {
    backend: Backend,
    seed: u64,
    counts: Arc<Counts>,
}

impl Chaos {
    /// Episodes that are drawn from `seed`.
    pub fn new(backend: Backend, seed: u64) -> Self {
        Self {
            backend,
            seed,
            counts: Arc::default(),
        }
    }

    /// Who runs the guests.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// What was done in all episodes so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Makes episode `number`.
    ///
    /// # Errors
    /// It did not come to its end.
    pub fn episode(&self, number: u64) -> Result<Episode, ChaosError> {
        let plan = Plan::draw(&self.backend, self.seed, number);
        let counts = &self.counts;
        match &self.backend {
            #[cfg(target_arch = "x86_64")]
            Backend::Kvm(kvm) => {
                let vcpus = plan.vcpus.len() + plan.late.len();
                let world = kvm::KvmWorld::new(kvm, vcpus as u32, plan.ring_entries)?;
                Conductor::run(&world, &plan, counts)
            }
            Backend::Sim => Conductor::run(&sim::SimWorld::new(&plan, counts), &plan, counts),
        }
    }
}

/// What came of an episode.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Episode {
    /// Entries harvested.
    pub entries: u64,
    /// Comparisons made.
    pub comparisons: u64,
    /// Of these, with all vCPUs stopped, those with no page under suspicion, which is reported in any case.
    pub exact_comparisons: u64,
    /// Pages that no sync reported after they were last written; each as often as it was.
    pub missed_pages: u64,
    /// Pages that were reported of a slot that nobody had written yet: entries of another one.
    pub stray_pages: u64,
    /// Entries that named no page of any slot, although there was no cause for any: passes that did
    /// not know the slots as they were.
    pub strange_entries: u64,
    /// The first missed or stray page.
    pub first: Option<Finding>,
}

impl Episode {
    /// Whether there is nothing to complain of.
    pub fn is_well(&self) -> bool {
        [self.missed_pages, self.stray_pages, self.strange_entries] == [0; 3]
    }
}

/// Something that is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finding {
    /// The slot.
    pub slot: SlotId,
    /// The page.
    pub page: u64,
    /// What was going on.
    pub when: &'static str,
}
