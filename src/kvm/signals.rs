// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Blocking signals during a call that would lose pages if it were interrupted.

use core::marker::PhantomData;
use core::mem::MaybeUninit;
use std::io;

/// Blocks every signal that can be blocked, on the thread that made it, while it lives.
///
/// It does not use `pthread_sigmask`, because C libraries exclude the signals that they use themselves, and a `setuid` on another
/// thread would interrupt ours.
pub(crate) struct SignalsBlocked {
    before: u64,
    /// A mask belongs to a thread, so the guard must be dropped where it was made.
    _not_send: PhantomData<*const ()>,
}

impl SignalsBlocked {
    /// Blocks them. Keep the guard for a short time only, as the C library has to wait.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            before: set_mask(u64::MAX)?,
            _not_send: PhantomData,
        })
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // It fails for a wrong argument only, and this is the mask that the kernel gave us.
        let _ = set_mask(self.before);
    }
}

/// Blocks every signal for the rest of the calling thread's life, but for the C library's own.
pub(crate) fn block_for_good() -> io::Result<()> {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset initialises the set it is given, and cannot fail with a valid pointer;
    // pthread_sigmask reads it, and takes a null pointer for no interest in the mask before.
    let result = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), core::ptr::null_mut())
    };
    match result {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Sets the calling thread's mask, one bit per signal, and returns the one before.
fn set_mask(mask: u64) -> io::Result<u64> {
    let mut before = 0u64;
    // SAFETY: the call reads one mask and writes the other, both of the size that is passed, which
    // is the kernel's on every 64-bit architecture.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const mask,
            &raw mut before,
            size_of::<u64>(),
        )
    };
    match result {
        0 => Ok(before),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the calling thread's mask. SIGKILL and SIGSTOP are never in it.
    fn mask() -> u64 {
        let mask = set_mask(0).unwrap();
        set_mask(mask).unwrap();
        mask
    }

    const UNBLOCKABLE: u64 = 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1);

    #[test]
    fn blocks_all_while_it_lives() {
        let before = mask();
        assert_eq!(before & 1 << (libc::SIGUSR1 - 1), 0);
        let guard = SignalsBlocked::new().unwrap();
        assert_eq!(mask(), !UNBLOCKABLE);
        drop(guard);
        assert_eq!(mask(), before);
    }

    #[test]
    fn blocks_for_good_what_is_not_the_c_librarys() {
        std::thread::spawn(|| {
            block_for_good().unwrap();
            let others = mask() | UNBLOCKABLE;
            for signal in (1..=31).chain(libc::SIGRTMIN()..=libc::SIGRTMAX()) {
                assert_ne!(others & 1 << (signal - 1), 0, "signal {signal}");
            }
        })
        .join()
        .unwrap();
    }
}
