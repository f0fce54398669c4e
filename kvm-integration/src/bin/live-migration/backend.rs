//! Who runs the guest.

#[cfg(target_arch = "x86_64")]
use kvm_integration::machine::KvmMachine;
use kvm_integration::machine::{Machine, MachineError, Setup, SimMachine};

use crate::options::BackendChoice;

/// Whoever was chosen.
pub enum Backend {
    /// KVM, which works.
    #[cfg(target_arch = "x86_64")]
    Kvm(kvm_ioctls::Kvm),
    /// The simulated kernel.
    Sim,
}

/// KVM was insisted on, and cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("the backend kvm cannot be had: {0}; or choose --backend sim")]
pub struct NoKvm(String);

impl Backend {
    /// The name, as on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Kvm(_) => "kvm",
            Self::Sim => "sim",
        }
    }

    /// Makes the guest and lets it run.
    ///
    /// # Errors
    /// What the machine said.
    pub fn start(&self, setup: &Setup) -> Result<Box<dyn Machine>, MachineError> {
        Ok(match self {
            #[cfg(target_arch = "x86_64")]
            Self::Kvm(kvm) => Box::new(KvmMachine::start(kvm, setup)?),
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
    match (kvm(), choice) {
        (Ok(kvm), BackendChoice::Auto) => Ok((kvm, "backend: kvm, because /dev/kvm works".into())),
        (Ok(kvm), _) => Ok((kvm, "backend: kvm, as asked for".into())),
        (Err(why), BackendChoice::Auto) => {
            Ok((Backend::Sim, format!("backend: sim, because {why}")))
        }
        (Err(why), _) => Err(NoKvm(why)),
    }
}

#[cfg(target_arch = "x86_64")]
fn kvm() -> Result<Backend, String> {
    let kvm = kvm_integration::kvm_available();
    kvm.map(Backend::Kvm)
        .map_err(|error| match std::error::Error::source(&error) {
            Some(cause) => format!("{error} ({cause})"),
            None => error.to_string(),
        })
}

#[cfg(not(target_arch = "x86_64"))]
fn kvm() -> Result<Backend, String> {
    Err("the guest is x86-64 code and this machine is not".into())
}
