// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hosts without KVM, or not for us: each made by giving a thread a /dev and a user of its own.
//!
//! Nothing is faked: the kernel keeps both for each thread, so what is asked for on it is refused
//! for real, and no other thread notices.

use std::ffi::CStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::null;
use std::thread;

use kvm_dirty_ring::HostSupport;
use kvm_dirty_ring::error::HostError;
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::{Outcome, skip};

tests![
    no_device,
    no_driver,
    no_permission,
    suite_skips_loudly,
    suite_fails_where_kvm_is_required,
];

const NOBODY: libc::uid_t = 65_534;
const KVM: &CStr = c"/dev/kvm";

fn checked(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the calling thread an empty /dev. It takes nothing but system calls, as is fit for a
/// process that has just forked.
fn hide_dev() -> io::Result<()> {
    // SAFETY: unshare takes integers; the thread has a mount namespace of its own from here on.
    checked(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    let (root, private) = (c"/".as_ptr(), libc::MS_REC | libc::MS_PRIVATE);
    // SAFETY: the strings end with NUL, and null stands for an argument that this mount has not.
    // Nothing that is mounted in this namespace shows in any other.
    checked(unsafe { libc::mount(null(), root, null(), private, null()) })?;
    let (dev, tmpfs) = (c"/dev".as_ptr(), c"tmpfs".as_ptr());
    // SAFETY: as above.
    checked(unsafe { libc::mount(tmpfs, dev, tmpfs, 0, null()) })
}

/// Makes a /dev/kvm that only root may open, in the calling thread's own /dev.
fn make_kvm(device: libc::dev_t) -> io::Result<()> {
    // SAFETY: the path ends with NUL.
    checked(unsafe { libc::mknod(KVM.as_ptr(), libc::S_IFCHR | 0o600, device) })
}

/// Makes the calling thread nobody's, for good. The C library would do it for all threads.
fn become_nobody() -> io::Result<()> {
    // SAFETY: setresuid takes integers.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
    checked(result as libc::c_int)
}

/// What a host is asked on a thread that has gone through `change`; `None` if it may not.
fn query_after(
    change: impl FnOnce() -> io::Result<()> + Send,
) -> Result<Option<HostError>, Failed> {
    let query = || match hide_dev() {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(None),
        Err(error) => Err(Failed::from(error)),
        Ok(()) => {
            change()?;
            match HostSupport::query() {
                Err(error) => Ok(Some(error)),
                Ok(support) => Err(format!("{support:?} without a KVM to be had").into()),
            }
        }
    };
    thread::scope(|scope| scope.spawn(query).join()).expect("nothing on that thread panics")
}

fn not_root() -> Outcome {
    skip("only root may hide /dev/kvm from a thread")
}

fn no_device() -> Outcome {
    let Some(error) = query_after(|| Ok(()))? else {
        return not_root();
    };
    assert!(matches!(error, HostError::NoKvm(_)), "{error:?}");
    Ok(Completed)
}

/// A device file that was left behind by a driver.
fn no_driver() -> Outcome {
    // Major numbers 120 to 127 are for local use.
    let Some(error) = query_after(|| make_kvm(libc::makedev(120, 77)))? else {
        return not_root();
    };
    assert!(matches!(error, HostError::NoKvm(_)), "{error:?}");
    Ok(Completed)
}

fn no_permission() -> Outcome {
    let device = std::os::unix::fs::MetadataExt::rdev(&std::fs::metadata("/dev/kvm")?);
    let change = || make_kvm(device).and_then(|()| become_nobody());
    let Some(error) = query_after(change)? else {
        return not_root();
    };
    assert!(matches!(error, HostError::NoPermission(_)), "{error:?}");
    // And with permission the very same file will do.
    let change = || {
        make_kvm(device)?;
        HostSupport::query().map_err(io::Error::other)?;
        become_nobody()
    };
    query_after(change)?;
    Ok(Completed)
}

/// What this suite does in a process that has no /dev/kvm: whether it succeeds, what it prints, and
/// what it complains of. `None` if it can't be hidden.
fn suite_without_kvm(required: bool) -> Result<Option<(bool, String, String)>, Failed> {
    let mut suite = Command::new(std::env::current_exe()?);
    suite.env_remove("KVM_REQUIRED");
    if required {
        suite.env("KVM_REQUIRED", "1");
    }
    // SAFETY: hide_dev only makes system calls, on strings that are there already.
    unsafe { suite.pre_exec(hide_dev) };
    match suite.output() {
        Ok(output) => Ok(Some((
            output.status.success(),
            String::from_utf8(output.stdout)?,
            String::from_utf8(output.stderr)?,
        ))),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn suite_skips_loudly() -> Outcome {
    let Some((success, printed, complaint)) = suite_without_kvm(false)? else {
        return not_root();
    };
    assert!(success, "{printed}{complaint}");
    assert!(printed.contains("ok. 0 passed; 0 failed;"), "{printed}");
    assert!(
        complaint.starts_with("KVM suite SKIPPED: no KVM on this host"),
        "{complaint}"
    );
    assert!(
        complaint.ends_with("set KVM_REQUIRED=1 to make this a failure\n"),
        "{complaint}"
    );
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
    Ok(Completed)
}

fn suite_fails_where_kvm_is_required() -> Outcome {
    let Some((success, printed, complaint)) = suite_without_kvm(true)? else {
        return not_root();
    };
    assert!(!success, "{printed}{complaint}");
    assert!(printed.contains("FAILED. 0 passed;"), "{printed}");
    assert!(printed.contains(" 0 ignored;"), "{printed}");
    assert!(complaint.contains("no KVM on this host"), "{complaint}");
    Ok(Completed)
}
