// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host: what it is, whether it can run the guest, its CPUs and threads, and the signals and refusals that tests send.

pub mod background;
pub mod bystanders;
#[cfg(tiny_guest)]
pub(crate) mod cores;
#[cfg(tiny_guest)]
pub(crate) mod cpu_time;
#[cfg(tiny_guest)]
pub mod refusal;
pub mod storm;
pub mod threads;

use std::fmt;
use std::fs;
use std::thread;

use anyhow::{Result, bail};
use kvm_dirty_ring::HostSupport;
use kvm_ioctls::Kvm;
use serde::Serialize;

use crate::guest::memory::PAGE_SIZE;

/// The machine a figure was measured on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Host {
    /// The KVM module in use: `kvm_intel`, `kvm_amd`, `kvm_pvm`, …; `kvm` where KVM has no
    /// vendor module (arm64), `no kvm` where there is none at all.
    #[serde(rename = "kvm")]
    pub kvm_kind: String,
    /// The kernel release, as `uname -r` prints it.
    pub kernel: String,
    /// How many CPUs this process may run on.
    pub cores: usize,
    /// What the CPU is called.
    pub cpu: String,
}

impl Host {
    /// Looks at the running machine.
    pub fn detect() -> Self {
        Self {
            kvm_kind: kvm_kind(),
            kernel: kernel_release(),
            cores: thread::available_parallelism().map_or(1, usize::from),
            cpu: cpu_model(),
        }
    }

    /// Whether this is `kvm_pvm`, which emulates guests of [`Mode::Emulated`] and whose emulator
    /// overruns dirty rings.
    ///
    /// [`Mode::Emulated`]: crate::guest::program::Mode::Emulated
    pub fn is_pvm(&self) -> bool {
        self.kvm_kind.split('+').any(|kind| kind == "kvm_pvm")
    }

    /// Whether the processor has a buffer for the pages that a guest writes (page-modification logging),
    /// which come to the ring late, and KVM uses it.
    pub fn has_pml(&self) -> bool {
        self.kvm_kind.split('+').any(|kind| {
            let parameter = fs::read_to_string(format!("/sys/module/{kind}/parameters/pml"));
            parameter.is_ok_and(|value| value.trim_end() == "Y")
        })
    }

    /// Whether the kernel's resets look for signals, which KVM does since Linux 6.17.
    pub fn resets_look_for_signals(&self) -> bool {
        let mut numbers = self
            .kernel
            .split(['.', '-', '+'])
            .map_while(|part| part.parse().ok());
        let version: [u32; 2] = [0; 2].map(|none| numbers.next().unwrap_or(none));
        version >= [6, 17]
    }
}

/// One line for the head of a table: `kvm_intel, Linux 6.18.0, 8 cores`.
impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kvm_kind, kernel, cores) = (&self.kvm_kind, &self.kernel, self.cores);
        let noun = if cores == 1 { "core" } else { "cores" };
        write!(f, "{kvm_kind}, Linux {kernel}, {cores} {noun}")
    }
}

/// Why the guest cannot run on this machine.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There are no dirty rings to be had.
    #[error(transparent)]
    NoRings(#[from] kvm_dirty_ring::error::HostError),
    /// The machine's pages are not those that the guest was built for.
    #[error(
        "this machine has pages of {0} bytes, and the guest was built for {PAGE_SIZE}: build it with \
         TINY_GUEST_PAGE_KIB={kib}", kib = .0 >> 10
    )]
    PageSize(u64),
    /// KVM offers dirty rings and makes no virtual machine.
    #[error(
        "KVM makes no virtual machine: virtualization may be off in the firmware or in use by \
         another hypervisor; see the cause, and `dmesg`"
    )]
    NoVm(#[source] kvm_ioctls::Error),
}

/// Why programs can't run the guest here, where they can't for want of one.
pub const NO_GUEST: &str = "the guest is code for x86-64 and arm64, and this machine is neither";

/// Opens `/dev/kvm` and makes sure that it makes virtual machines with a dirty ring.
///
/// # Errors
/// Says which of these is not so, and what to do about it; one line, fit for a skipped test.
pub fn kvm_available() -> Result<Kvm, HostError> {
    HostSupport::query()?;
    kvm_that_works()
}

/// KVM that can run the tiny guest; with dirty rings if there must be any.
///
/// # Errors
/// As above; or there is no guest for the machine.
pub fn kvm_for_guest(with_rings: bool) -> Result<Kvm> {
    if !cfg!(tiny_guest) {
        bail!(NO_GUEST);
    }
    match HostSupport::query() {
        Err(kvm_dirty_ring::error::HostError::NoDirtyRing) if !with_rings => {}
        support => drop(support?),
    }
    Ok(kvm_that_works()?)
}

fn kvm_that_works() -> Result<Kvm, HostError> {
    // SAFETY: takes no pointer.
    match unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64 {
        PAGE_SIZE => {}
        other => return Err(HostError::PageSize(other)),
    }
    let made = Kvm::new().and_then(|kvm| kvm.create_vm().map(|_| kvm));
    made.map_err(HostError::NoVm)
}

/// KVM for a test of this crate's own, for as long as the second is held: of guests that compete for
/// CPUs neither would get on. `None`, and a line about it, where there is no KVM.
#[cfg(test)]
pub(crate) fn kvm_for_test(what: &str) -> Option<(Kvm, std::sync::MutexGuard<'static, ()>)> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    match kvm_available() {
        Ok(kvm) => {
            let alone = ALONE.lock();
            Some((
                kvm,
                alone.unwrap_or_else(std::sync::PoisonError::into_inner),
            ))
        }
        Err(why) if std::env::var_os("KVM_REQUIRED").is_some_and(|value| value == "1") => {
            panic!("{why}, and KVM_REQUIRED=1")
        }
        Err(why) => {
            eprintln!("{what} on KVM SKIPPED: {why}");
            None
        }
    }
}

/// The names of all vendor modules present, joined by `+`: nearly always just one.
fn kvm_kind() -> String {
    let mut kinds: Vec<String> = fs::read_dir("/sys/module")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    kinds.sort();
    if !kinds.is_empty() {
        return kinds.join("+");
    }
    if fs::exists("/dev/kvm").unwrap_or(false) {
        "kvm"
    } else {
        "no kvm"
    }
    .into()
}

/// The model of the first CPU, as the kernel calls it; `unknown` if it does not say.
fn cpu_model() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    let model = lines.find(|(key, _)| key.trim() == "model name");
    model.map_or("unknown".into(), |(_, model)| model.trim().into())
}

/// Memory that can be had without taking it from somebody, in MiB; `None` if the kernel does not
/// say.
pub fn available_mib() -> Option<u64> {
    available_of(&fs::read_to_string("/proc/meminfo").ok()?)
}

/// Whether so many MiB can be had: mapping more would succeed, and the kernel would end some process
/// later.
pub fn check_available(what: &str, wanted: u64) -> Result<()> {
    match available_mib() {
        Some(available) if available < wanted => {
            bail!("{what} {wanted} MiB, and {available} MiB are available")
        }
        _ => Ok(()),
    }
}

fn available_of(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let value = lines.find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

fn kernel_release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease");
    release.map_or("unknown".into(), |release| release.trim_end().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_look_for_signals_are_told_by_their_version() {
        let looks = |kernel: &str| {
            let kernel = kernel.into();
            let host = Host {
                kernel,
                ..Host::detect()
            };
            host.resets_look_for_signals()
        };
        let new = [
            "6.17.0",
            "6.17-rc3",
            "6.17+deb13-amd64",
            "6.18.44",
            "7.0.1",
            "7.2-rc1",
            "10.0",
        ];
        assert!(new.into_iter().all(looks));
        let old = [
            "6.1.0-44-amd64",
            "6.12.57+deb13-arm64",
            "6.16.12",
            "5.11.0",
            "unknown",
            "",
        ];
        assert!(!old.into_iter().any(looks));
    }

    #[test]
    fn meminfo_is_read() {
        let meminfo = "MemTotal: 9 kB\nMemAvailable:   2097152 kB\nX: 1 kB\n";
        assert_eq!(available_of(meminfo), Some(2048));
        assert_eq!(available_of("nonsense"), None);
    }
}
