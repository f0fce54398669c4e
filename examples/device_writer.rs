// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes of the VMM's own devices, which KVM does not log: each is followed by `mark_dirty`, and a
//! copy that follows the syncs is always current.
//!
//! ```sh
//! cargo run --example device_writer
//! ```
//!
//! # Why the order matters
//!
//! A device writes, then marks. Were it the other way round, a sync could take the mark, the page
//! be copied, and only then the write happen: no sync would report it any more. As it is, either
//! the sync takes the mark, and then the copy has the write; or the mark stays for the next sync.
//!
//! `guest` simulates what is below a VMM; all else a VMM does the same way.

mod guest;

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use guest::{Guest, Memory, page_size};
use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::{DirtyLog, DirtyPages, SlotId};

const RAM: SlotId = SlotId::new(0, 0);
const PAGES: u64 = 64;

/// A device that writes 1, 2, 3 ... into one page after the other.
#[derive(Default)]
struct Device {
    /// Writes that are done and marked.
    done: AtomicU64,
    stop: AtomicBool,
}

impl Device {
    fn run(&self, memory: &Memory, log: &DirtyLog) -> Result<(), SlotError> {
        for number in 1.. {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let page = number % PAGES;
            memory.write(page, number);
            log.mark_dirty(RAM, page, 1)?;
            // Release: pairs with the acquire load in `main`, and is there for the check alone.
            self.done.store(number, Ordering::Release);
        }
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let guest = Guest::new(1024, RAM, PAGES); // KVM_CREATE_VM
    let log = guest.dirty_log(); // DirtyLog::enable(&vm_fd, ...)
    log.add_slot(RAM, PAGES)?;
    guest.create_slots(); // KVM_SET_USER_MEMORY_REGION

    let memory = guest.memory();
    let device = Arc::new(Device::default());
    let thread = thread::spawn({
        let (device, memory, log) = (Arc::clone(&device), Arc::clone(&memory), log.clone());
        move || device.run(&memory, &log)
    });

    let mut copy = vec![0; PAGES as usize * page_size()];
    let mut dirty = DirtyPages::new();
    let mut syncs = 0;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        let done = device.done.load(Ordering::Acquire);
        update(&mut copy, &memory, &log, &mut dirty)?;
        syncs += 1;
        // Whatever was done before the sync is in the copy: in each page the last number of those
        // up to `done` that belong there, or a later one.
        for number in done.saturating_sub(PAGES - 1).max(1)..=done {
            let page = (number % PAGES) as usize;
            let copied = u64::from_ne_bytes(copy[page * page_size()..][..8].try_into()?);
            assert!(
                copied >= number,
                "page {page}: {copied} copied, {number} written"
            );
        }
    }
    device.stop.store(true, Ordering::Relaxed);
    thread.join().expect("the device's thread panicked")?;
    update(&mut copy, &memory, &log, &mut dirty)?;

    assert!(copy == memory.read(0, PAGES), "the copy differs");
    let writes = device.done.load(Ordering::Relaxed);
    println!("{writes} writes of the device, {syncs} syncs: the copy was current after each");
    Ok(())
}

/// Brings the copy up to date.
fn update(
    copy: &mut [u8],
    memory: &Memory,
    log: &DirtyLog,
    dirty: &mut DirtyPages,
) -> Result<(), Box<dyn Error>> {
    log.sync(dirty)?;
    for run in dirty.runs() {
        let bytes = memory.read(run.first_page, run.pages);
        copy[run.first_page as usize * page_size()..][..bytes.len()].copy_from_slice(&bytes);
    }
    Ok(())
}
