// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The backend that runs the guest.

use anyhow::Result;
use kvm_dirty_ring::Mode;
use kvm_integration::cli::backend::{Wanted, choose};
use kvm_integration::host::kvm_for_guest;
#[cfg(tiny_guest)]
use kvm_integration::machine::{KvmMachine, Logging};
use kvm_integration::machine::{Machine, Setup, SimMachine};

use crate::options::BackendChoice;

/// The backend that was chosen.
pub enum Backend {
    /// KVM, which works, and how it is to log.
    #[cfg(tiny_guest)]
    Kvm(kvm_ioctls::Kvm, Logging),
    /// The simulated kernel.
    Sim,
}

impl Backend {
    /// Chooses, and says in one line what was chosen and why.
    pub fn choose(choice: BackendChoice) -> Result<(Self, String)> {
        let (wanted, with_rings) = match choice {
            BackendChoice::Auto => (Wanted::Auto, false),
            BackendChoice::Kvm => (Wanted::Kvm, true),
            BackendChoice::Bitmap => (Wanted::Kvm, false),
            BackendChoice::Sim => (Wanted::Sim, false),
        };
        let (kvm, why) = choose(wanted, || kvm_for_guest(with_rings))?;
        #[cfg(tiny_guest)]
        if let Some(kvm) = kvm {
            let logging = match choice {
                BackendChoice::Auto => Logging::Auto,
                BackendChoice::Bitmap => Logging::Bitmap,
                BackendChoice::Kvm | BackendChoice::Sim => Logging::Rings,
            };
            return Ok((Self::Kvm(kvm, logging), why));
        }
        Ok((Self::Sim, why))
    }

    /// The name.
    pub fn name(&self) -> &'static str {
        match self {
            #[cfg(tiny_guest)]
            Self::Kvm(..) => "kvm",
            Self::Sim => "sim",
        }
    }

    /// How the guest's writes are logged, and why so: one line.
    pub fn tell_mode(&self, mode: Mode) -> String {
        let why = match (self, mode) {
            #[cfg(tiny_guest)]
            (Self::Kvm(_, Logging::Auto), Mode::Rings) => "because KVM has dirty rings",
            #[cfg(tiny_guest)]
            (Self::Kvm(_, Logging::Auto), _) => "because this KVM has no dirty rings",
            #[cfg(tiny_guest)]
            (Self::Kvm(..), _) => "as asked for",
            (Self::Sim, _) => "simulated",
        };
        format!("log: {mode}, {why}")
    }

    /// Makes the guest and lets it run.
    pub fn start(&self, setup: &Setup) -> Result<Box<dyn Machine>> {
        Ok(match self {
            #[cfg(tiny_guest)]
            Self::Kvm(kvm, logging) => Box::new(KvmMachine::start(kvm, setup, *logging)?),
            Self::Sim => Box::new(SimMachine::start(setup)?),
        })
    }
}
