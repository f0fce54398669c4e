// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is no descriptor of KVM's is refused by a typed error, by whatever it is borrowed.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use kvm_dirty_ring::error::{EnableError, HostError};
use kvm_dirty_ring::{DirtyLog, HostSupport, RingEntries};

fn entries() -> RingEntries {
    RingEntries::new(4096).unwrap()
}

#[test]
fn a_file_is_no_vm_and_no_host() {
    let file = File::open("/dev/null").unwrap();
    for refused in [
        DirtyLog::enable(&file, entries()),
        DirtyLog::enable_fd(&file, entries()),
        DirtyLog::enable_fd(file.as_fd(), entries()),
        DirtyLog::enable_bitmap_fd(&file),
        DirtyLog::enable_auto_fd(&file, entries()),
    ] {
        let refused = refused.unwrap_err();
        assert!(matches!(refused, EnableError::NotAVm), "{refused:?}");
    }
    match HostSupport::query_fd(&file) {
        Err(HostError::Kvm { call, .. }) => assert_eq!(call, "KVM_GET_API_VERSION"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_number_that_is_none_is_refused() {
    struct Closed(RawFd);
    impl AsRawFd for Closed {
        fn as_raw_fd(&self) -> RawFd {
            self.0
        }
    }
    for number in [-1, RawFd::MIN, RawFd::MAX] {
        let refused = DirtyLog::enable(&Closed(number), entries()).unwrap_err();
        match refused {
            EnableError::Kvm { source, .. } => assert_eq!(source.raw_os_error(), Some(libc::EBADF)),
            other => panic!("{other:?}"),
        }
    }
}
