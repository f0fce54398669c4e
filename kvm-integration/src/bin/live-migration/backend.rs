//! Who runs the guest.

use kvm_dirty_ring::Mode;
#[cfg(target_arch = "x86_64")]
use kvm_integration::machine::{KvmMachine, Logging};
use kvm_integration::machine::{Machine, MachineError, Setup, SimMachine};

use crate::options::BackendChoice;

/// Whoever was chosen.
pub enum Backend {
    /// KVM, which works, and how it is to log.
    #[cfg(target_arch = "x86_64")]
    Kvm(kvm_ioctls::Kvm, Logging),
    /// The simulated kernel.
    Sim,
}

/// KVM was insisted on, and cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("KVM cannot be had: {0}; or choose --backend sim")]
pub struct NoKvm(String);

impl Backend {
    /// The name.
    pub fn name(&self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Kvm(..) => "kvm",
            Self::Sim => "sim",
        }
    }

    /// How the guest's writes are logged, and why so: one line.
    pub fn tell_mode(&self, mode: Mode) -> String {
        let why = match (self, mode) {
            #[cfg(target_arch = "x86_64")]
            (Self::Kvm(_, Logging::Auto), Mode::Rings) => "because KVM has dirty rings",
            #[cfg(target_arch = "x86_64")]
            (Self::Kvm(_, Logging::Auto), _) => "because this KVM has no dirty rings",
            #[cfg(target_arch = "x86_64")]
            (Self::Kvm(..), _) => "as asked for",
            (Self::Sim, _) => "simulated",
        };
        format!("log: {mode}, {why}")
    }

    /// Makes the guest and lets it run.
    ///
    /// # Errors
    /// What the machine said.
    pub fn start(&self, setup: &Setup) -> Result<Box<dyn Machine>, MachineError> {
        Ok(match self {
            #[cfg(target_arch = "x86_64")]
            Self::Kvm(kvm, logging) => Box::new(KvmMachine::start(kvm, setup, *logging)?),
            Self::Sim => Box::new(SimMachine::start(setup)?),
        })
    }
}

/// Chooses, and says in one line what was chosen and why.
///
/// # Errors
/// KVM is insisted on and cannot be had.
pub fn choose(choice: BackendChoice) -> Result<(Backend, String), NoKvm> {
    if choice == BackendChoice::Sim {
        return Ok((Backend::Sim, "backend: sim, as asked for".into()));
    }
    match (kvm(choice), choice) {
        (Ok(kvm), BackendChoice::Auto) => Ok((kvm, "backend: kvm, because /dev/kvm works".into())),
        (Ok(kvm), _) => Ok((kvm, "backend: kvm, as asked for".into())),
        (Err(why), BackendChoice::Auto) => {
            Ok((Backend::Sim, format!("backend: sim, because {why}")))
        }
        (Err(why), _) => Err(NoKvm(why)),
    }
}

#[cfg(target_arch = "x86_64")]
fn kvm(choice: BackendChoice) -> Result<Backend, String> {
    use kvm_integration::host::{kvm_available, kvm_with_or_without_rings};
    let (kvm, logging) = match choice {
        BackendChoice::Auto => (kvm_with_or_without_rings(), Logging::Auto),
        BackendChoice::Bitmap => (kvm_with_or_without_rings(), Logging::Bitmap),
        BackendChoice::Kvm | BackendChoice::Sim => (kvm_available(), Logging::Rings),
    };
    kvm.map(|kvm| Backend::Kvm(kvm, logging)).map_err(|error| {
        match std::error::Error::source(&error) {
            Some(cause) => format!("{error} ({cause})"),
            None => error.to_string(),
        }
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn kvm(_choice: BackendChoice) -> Result<Backend, String> {
    Err("the guest is x86-64 code and this machine is not".into())
}
