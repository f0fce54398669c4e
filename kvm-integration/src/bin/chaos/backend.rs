//! Who runs the guests.

use kvm_integration::chaos::Backend;

use crate::options::BackendChoice;

/// KVM was insisted on, and cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("the backend kvm cannot be had: {0}; or choose --backend sim")]
pub struct NoKvm(String);

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
