// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The backend that runs the guest: KVM, or the simulated kernel.

use anyhow::{Context, Result};
use clap::ValueEnum;

/// The backends to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Wanted {
    /// KVM if /dev/kvm works, else the simulated kernel
    Auto,
    /// KVM
    Kvm,
    /// The simulated kernel, with threads for vCPUs
    Sim,
}

/// What was wanted of KVM, or `None` for the simulated kernel; and in one line what was chosen and why.
pub fn choose<K>(wanted: Wanted, kvm: impl FnOnce() -> Result<K>) -> Result<(Option<K>, String)> {
    if wanted == Wanted::Sim {
        return Ok((None, "backend: sim, as asked for".into()));
    }
    match (kvm(), wanted) {
        (Ok(kvm), Wanted::Auto) => Ok((Some(kvm), "backend: kvm, because /dev/kvm works".into())),
        (Err(why), Wanted::Auto) => Ok((None, format!("backend: sim, because {why:#}"))),
        (kvm, _) => {
            let kvm = kvm.context("KVM cannot be had; or choose --backend sim")?;
            Ok((Some(kvm), "backend: kvm, as asked for".into()))
        }
    }
}
