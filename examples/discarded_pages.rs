// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages that change and are not written: a balloon gives them back to the host, and they read as zeroes from then on. KVM
//! logs nothing of it, so the VMM marks what it has discarded.
//!
//! ```sh
//! cargo run --example discarded_pages
//! ```
//!
//! The same goes for `MADV_REMOVE`, for `fallocate` that punches a hole, for free page reporting, and for whatever else
//! exchanges the memory under the guest.
//!
//! `guest` simulates what is below a VMM; all else a VMM does the same way.

mod guest;

use std::error::Error;

use guest::{Guest, Memory, page_size};
use kvm_dirty_ring::{DirtyLog, DirtyPages, SlotId};

const RAM: SlotId = SlotId::new(0, 0);
const PAGES: u64 = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let guest = Guest::new(1024, RAM, PAGES); // KVM_CREATE_VM
    let log = guest.dirty_log(); // DirtyLog::enable(&vm_fd, ...)
    log.add_slot(RAM, PAGES)?;
    guest.create_slots(); // KVM_SET_USER_MEMORY_REGION
    let memory = guest.memory();
    let (mut copy, mut dirty) = (vec![0; PAGES as usize * page_size()], DirtyPages::new());

    // A device fills some pages, and a round of the migration copies them.
    for page in 10..20 {
        memory.write(page, 7);
    }
    log.mark_dirty(RAM, 10, 10)?;
    update(&mut copy, &memory, &log, &mut dirty)?;
    assert!(copy == memory.read(0, PAGES));

    // The guest's balloon is inflated. First discarded, then marked: a sync in between would have the old contents copied,
    // and no sync would report the new ones.
    for page in 12..15 {
        memory.discard(page);
    }
    let found = update(&mut copy, &memory, &log, &mut dirty)?;
    assert!(found == 0 && copy != memory.read(0, PAGES));
    println!("a sync does not report discarded pages: the copy differs");

    log.mark_dirty(RAM, 12, 3)?;
    let found = update(&mut copy, &memory, &log, &mut dirty)?;
    assert!(found == 3 && copy == memory.read(0, PAGES));
    println!("{found} pages are marked: the copy is the guest's memory again");
    Ok(())
}

/// Brings the copy up to date. How many pages the sync has found.
fn update(
    copy: &mut [u8],
    memory: &Memory,
    log: &DirtyLog,
    dirty: &mut DirtyPages,
) -> Result<u64, Box<dyn Error>> {
    log.sync(dirty)?;
    for run in dirty.runs() {
        let bytes = memory.read(run.first_page, run.pages);
        copy[run.first_page as usize * page_size()..][..bytes.len()].copy_from_slice(&bytes);
    }
    Ok(dirty.page_count())
}
