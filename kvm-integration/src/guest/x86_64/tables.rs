// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's page tables: one to one, by pages of 2 MiB. Every entry has its accessed and dirty bits set already, or
//! the CPU would set them, dirtying pages of the tables.

use crate::guest::memory::{GuestMemory, HIGHEST_GPA, PAGE_SIZE};

/// The page of the topmost table; the next ones follow.
pub(crate) const ROOT: u64 = 2;
const PDPT: u64 = 3;
const DIRECTORIES: u64 = 4;
/// Present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// The same, dirty, and a page of 2 MiB.
const LARGE_PAGE: u64 = 0xe7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// Writes the tables, which map nothing yet.
pub(crate) fn begin(boot: &GuestMemory) {
    boot.write_u64(ROOT * PAGE_SIZE, (PDPT * PAGE_SIZE) | TABLE);
    for gib in 0..HIGHEST_GPA >> 30 {
        let directory = (DIRECTORIES + gib) * PAGE_SIZE;
        boot.write_u64(PDPT * PAGE_SIZE + gib * 8, directory | TABLE);
    }
}

/// Maps these addresses, wherever they aren't yet. Running vCPUs need no flush: entries only turn from absent to
/// present, and no TLB keeps absent ones.
pub(crate) fn map(boot: &GuestMemory, gpa: u64, bytes: u64) {
    for large_page in gpa / LARGE_PAGE_SIZE..(gpa + bytes).div_ceil(LARGE_PAGE_SIZE) {
        // The directories are adjacent, so they are one array of entries.
        let entry = DIRECTORIES * PAGE_SIZE + large_page * 8;
        boot.write_u64(entry, (large_page * LARGE_PAGE_SIZE) | LARGE_PAGE);
    }
}
