// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Chaos: guests that are tormented while their dirty log must not lose a page.
//!
//! Each episode makes a guest and does to it, and to its log, all that [`Fault`] lists, as a
//! plan says that is drawn from a seed. Meanwhile some threads sync, and copy what a sync
//! returns as written, and nothing else. When the vCPUs are stopped, a last sync must make the copy equal
//! to the original, byte for byte; every page that differs was missed. This is done a few times an
//! episode, so that what was missed is not written again first.
//!
//! A slot that is removed is compared too, for the last time between its retirement and its deletion.
//! Either its writers are paused before: then it must be equal. Or they go on: then every word must
//! be at least as new in the copy as it was in memory before the retirement; what is written later
//! nobody promises. Each writer has a word of its own in a page, and counts it up.
//!
//! Pages under suspicion are reported by every sync, so that they are no exception. Pages that stay open
//! are, too: they are copied where a comparison follows, and else left.

mod backend;
mod conductor;
mod copier;
mod episode;
mod fault;
mod helpers;
#[cfg(tiny_guest)]
mod kvm;
mod ledger;
mod plan;
mod policies;
mod sim;
mod world;

use std::sync::Arc;

use anyhow::Result;

use conductor::Conductor;
use plan::Plan;

pub use backend::Backend;
pub use episode::{Episode, Finding};
pub use fault::{Counts, Fault};

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

    /// The backend that runs the guests.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// What was done in all episodes so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Makes episode `number`.
    pub fn episode(&self, number: u64) -> Result<Episode> {
        let mode = self.backend.mode();
        let plan = Plan::draw(&self.backend, self.seed, number);
        let counts = &self.counts;
        match &self.backend {
            #[cfg(tiny_guest)]
            Backend::Kvm(kvm, _) => {
                let vcpus = plan.vcpus.len() + plan.late.len();
                let world = kvm::KvmWorld::new(kvm, mode, vcpus as u32, plan.ring_entries)?;
                Conductor::run(&world, &plan, counts)
            }
            Backend::Sim(_) => {
                Conductor::run(&sim::SimWorld::new(mode, &plan, counts), &plan, counts)
            }
        }
    }
}
