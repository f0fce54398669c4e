//! How a vCPU is made to leave `KVM_RUN`: a flag that keeps it from entering, and a signal that
//! throws it out.

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use kvm_bindings::kvm_run;
use memmap2::{MmapOptions, MmapRaw};

use super::parking::Barrier;

/// `kvm_run.immediate_exit` of one vCPU: while it is set, `KVM_RUN` returns EINTR at once.
///
/// This is a second mapping of the run page. So any thread may write the flag while the vCPU's own
/// thread holds the reference to the first mapping that kvm-ioctls makes of it.
#[derive(Debug)]
pub(crate) struct ImmediateExit(MmapRaw);

impl ImmediateExit {
    /// Maps `run_size` bytes of a vCPU's fd.
    pub(crate) fn map(vcpu: &impl AsRawFd, run_size: usize) -> io::Result<Self> {
        assert!(
            run_size >= size_of::<kvm_run>(),
            "KVM's run page is shorter than its header"
        );
        MmapOptions::new()
            .len(run_size)
            .map_raw(vcpu.as_raw_fd())
            .map(Self)
    }
}

impl Barrier for Arc<ImmediateExit> {
    /// It is the thread's lock that orders this with whoever asked; the kernel reads the flag
    /// once on its way in, so Relaxed is enough.
    fn set(&self, closed: bool) {
        // SAFETY: map() mapped all of kvm_run, and the mapping lives as long as `self`. One byte
        // is always aligned. All of this process's accesses through this mapping are atomic.
        let flag = unsafe {
            AtomicU8::from_ptr(self.0.as_mut_ptr().add(offset_of!(kvm_run, immediate_exit)))
        };
        flag.store(u8::from(closed), Ordering::Relaxed);
    }
}

/// The signal that throws a vCPU out of `KVM_RUN`. Its handler does nothing.
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the handler that does nothing, once per process. Without `SA_RESTART`: interrupting is
/// all the signal is for.
pub(crate) fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    extern "C" fn nothing(_signal: libc::c_int) {}

    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: sigaction is made of integers, a pointer-sized handler and an optional function
        // pointer, for which zeroes are valid values.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        // SAFETY: both pointers are null or to a value of ours, and a handler that does nothing is
        // safe in any context.
        match unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        }
    });
    (*installed).map_err(io::Error::from_raw_os_error)
}

/// Lets the kick signal through to the calling thread, whatever mask it was born with.
pub(crate) fn unblock_on_this_thread() -> io::Result<()> {
    // SAFETY: sigset_t is an array of integers, for which zeroes are a valid value.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is ours, and the signal's number is valid, so that neither call can fail.
    unsafe {
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, kick_signal());
    }
    // SAFETY: `set` is a valid set, and the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
