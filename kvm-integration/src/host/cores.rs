// SPDX-License-Identifier: Apache-2.0 OR MIT
//! On which core each thread runs.
//!
//! Threads that are left alone may all be packed on one core, and a reaper that shares its core
//! with a vCPU is late. So each thread gets a place to run.

use std::io;

/// The CPUs that this process may use, in order.
#[derive(Debug, Clone)]
pub(crate) struct Cores(Vec<usize>);

impl Cores {
    pub(crate) fn detect() -> io::Result<Self> {
        // SAFETY: cpu_set_t is an array of integers, for which zeroes are a valid value.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: 0 is the calling thread, and the pointer is to a set of the size given.
        if unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let allowed = |&cpu: &usize| {
            // SAFETY: CPU_ISSET indexes the set with `cpu`, which is below its size.
            unsafe { libc::CPU_ISSET(cpu, &set) }
        };
        Ok(Self(
            (0..libc::CPU_SETSIZE as usize).filter(allowed).collect(),
        ))
    }

    /// Where vCPU `index` runs: they take turns.
    pub(crate) fn of_vcpu(&self, index: u32) -> usize {
        self.0[index as usize % self.0.len()]
    }

    /// Where the reaper may run: beside the `vcpus` vCPUs if there is room, else anywhere.
    pub(crate) fn of_reaper(&self, vcpus: u32) -> &[usize] {
        match self.0.get(vcpus as usize..) {
            None | Some([]) => &self.0,
            Some(free) => free,
        }
    }
}

/// Keeps the calling thread on these CPUs.
pub(crate) fn confine(cpus: &[usize]) -> io::Result<()> {
    // SAFETY: as in `detect`.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus {
        if cpu >= libc::CPU_SETSIZE as usize {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: CPU_SET indexes the set with `cpu`, which was just checked to be inside it.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: 0 is the calling thread, and the pointer is to a set of the size given.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reapers_get_what_is_left() {
        let cores = Cores(vec![2, 3, 7]);
        assert_eq!([0, 1, 2, 3].map(|index| cores.of_vcpu(index)), [2, 3, 7, 2]);
        assert_eq!(cores.of_reaper(1), [3, 7]);
        assert_eq!(cores.of_reaper(2), [7]);
        assert_eq!(cores.of_reaper(3), [2, 3, 7]);
        assert_eq!(cores.of_reaper(8), [2, 3, 7]);
    }
}
