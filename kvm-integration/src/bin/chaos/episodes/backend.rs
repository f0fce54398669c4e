//! Who runs the guests, and what can be had of them.

use anyhow::Result;
#[cfg(tiny_guest)]
use kvm_integration::Host;
use kvm_integration::cli::backend::{Wanted, choose};
use kvm_integration::host::kvm_for_guest;
use kvm_integration::storm::Storm;

use super::fault::Fault;

/// Who runs the guests.
#[derive(Debug)]
pub enum Backend {
    /// KVM, which works.
    #[cfg(tiny_guest)]
    Kvm(kvm_ioctls::Kvm),
    /// The simulated kernel.
    Sim,
}

impl Backend {
    /// Chooses, and says in one line what was chosen and why.
    pub fn choose(wanted: Wanted) -> Result<(Self, String)> {
        let (kvm, why) = choose(wanted, || kvm_for_guest(true))?;
        #[cfg(tiny_guest)]
        if let Some(kvm) = kvm {
            return Ok((Self::Kvm(kvm), why));
        }
        Ok((Self::Sim, why))
    }

    /// The name, as on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            #[cfg(tiny_guest)]
            Self::Kvm(_) => "kvm",
            Self::Sim => "sim",
        }
    }

    pub fn is_sim(&self) -> bool {
        matches!(self, Self::Sim)
    }

    /// Whether it can be had to overrun a ring.
    pub fn overruns(&self) -> bool {
        match self {
            #[cfg(tiny_guest)]
            Self::Kvm(_) => Host::detect().is_pvm(),
            Self::Sim => true,
        }
    }

    /// Whether it can be had to do that.
    pub fn can(&self, fault: Fault) -> bool {
        match fault {
            Fault::RingOverruns => self.overruns(),
            Fault::ShortResets | Fault::DoubtfulResets => self.is_sim() || Storm::can_stop(),
            Fault::WritesInResets => self.is_sim(),
            _ => true,
        }
    }
}
