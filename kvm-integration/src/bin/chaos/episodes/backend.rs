// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The backend that runs the guests, and what it offers.

use anyhow::Result;
use kvm_dirty_ring::Mode;
#[cfg(tiny_guest)]
use kvm_integration::Host;
use kvm_integration::cli::backend::{Wanted, choose};
use kvm_integration::host::kvm_for_guest;
use kvm_integration::storm::Storm;

use super::fault::Fault;

/// The backend that runs the guests, and how it logs what they write.
#[derive(Debug)]
pub enum Backend {
    /// KVM, which works.
    #[cfg(tiny_guest)]
    Kvm(kvm_ioctls::Kvm, Mode),
    /// The simulated kernel.
    Sim(Mode),
}

impl Backend {
    /// Chooses, and says in one line what was chosen and why.
    pub fn choose(wanted: Wanted, mode: Mode) -> Result<(Self, String)> {
        let (kvm, why) = choose(wanted, || kvm_for_guest(mode == Mode::Rings))?;
        #[cfg(tiny_guest)]
        if let Some(kvm) = kvm {
            return Ok((Self::Kvm(kvm, mode), why));
        }
        Ok((Self::Sim(mode), why))
    }

    /// The name, as on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            #[cfg(tiny_guest)]
            Self::Kvm(..) => "kvm",
            Self::Sim(_) => "sim",
        }
    }

    pub fn is_sim(&self) -> bool {
        matches!(self, Self::Sim(_))
    }

    /// How it logs.
    pub fn mode(&self) -> Mode {
        match *self {
            #[cfg(tiny_guest)]
            Self::Kvm(_, mode) => mode,
            Self::Sim(mode) => mode,
        }
    }

    /// Whether it logs into rings, which are reset.
    pub fn has_rings(&self) -> bool {
        self.mode() == Mode::Rings
    }

    /// Whether it can be had to overrun a ring.
    pub fn overruns(&self) -> bool {
        self.has_rings()
            && match self {
                #[cfg(tiny_guest)]
                Self::Kvm(..) => Host::detect().is_pvm(),
                Self::Sim(_) => true,
            }
    }

    /// Whether it can be had to do that.
    pub fn can(&self, fault: Fault) -> bool {
        match fault {
            Fault::RingOverruns => self.overruns(),
            Fault::ShortResets | Fault::DoubtfulResets => {
                self.has_rings() && (self.is_sim() || Storm::can_stop())
            }
            Fault::FullExits
            | Fault::PassesAbandoned
            | Fault::FailedResets
            | Fault::EntriesOfNoSlot => self.has_rings(),
            Fault::VoidsIgnored => self.has_rings() && self.is_sim(),
            Fault::WritesInResets => self.is_sim(),
            _ => true,
        }
    }
}
