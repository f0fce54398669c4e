//! Keeping signals away from a call that they would make lose pages.

use core::marker::PhantomData;
use core::mem::MaybeUninit;
use std::io;

/// While it lives, every signal that can be blocked is, on the thread that made it.
pub(crate) struct SignalsBlocked {
    before: libc::sigset_t,
    /// A thread's mask is its own: the guard must be dropped where it was made.
    _not_send: PhantomData<*const ()>,
}

impl SignalsBlocked {
    /// Blocks them.
    pub(crate) fn new() -> io::Result<Self> {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigfillset only writes the set it is given.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        // SAFETY: sigfillset has initialised it; it cannot fail with a valid pointer.
        let all = unsafe { all.assume_init() };
        Ok(Self {
            before: set_mask(&all)?,
            _not_send: PhantomData,
        })
    }

    /// Leaves them blocked for the rest of the thread's life.
    pub(crate) fn for_good(self) {
        core::mem::forget(self);
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // It fails for a wrong argument only, and this is the mask that the kernel gave us.
        let _ = set_mask(&self.before);
    }
}

/// Sets the calling thread's mask and returns the one before.
fn set_mask(mask: &libc::sigset_t) -> io::Result<libc::sigset_t> {
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both sets are valid for the call, which reads the one and writes the other.
    match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, before.as_mut_ptr()) } {
        // SAFETY: the call succeeded, so it has written the set.
        0 => Ok(unsafe { before.assume_init() }),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked(signal: i32) -> bool {
        let mut now = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: without a new set the call only writes the current one.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, core::ptr::null(), now.as_mut_ptr());
            libc::sigismember(now.as_ptr(), signal) == 1
        }
    }

    #[test]
    fn blocks_all_while_it_lives() {
        assert!(!blocked(libc::SIGUSR1));
        let guard = SignalsBlocked::new().unwrap();
        assert!([libc::SIGUSR1, libc::SIGALRM, libc::SIGRTMIN() + 3].map(blocked) == [true; 3]);
        drop(guard);
        assert!(!blocked(libc::SIGUSR1));
    }
}
