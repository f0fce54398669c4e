// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory behind a guest's slot, and its copies.

use std::fs;
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw};

/// Bytes of a page, of the host's as of the guest's: KVM logs by its own.
pub const PAGE_SIZE: u64 = kib_of(env!("TINY_GUEST_PAGE_KIB")) << 10;

const fn kib_of(digits: &str) -> u64 {
    let (mut kib, mut at) = (0, 0);
    while at < digits.len() {
        kib = kib * 10 + (digits.as_bytes()[at] - b'0') as u64;
        at += 1;
    }
    kib
}

/// Slots of a test's own begin here or above; below is the boot slot's.
pub const LOWEST_GPA: u64 = 1 << 30;
/// Slots of a test's own end here or below.
pub const HIGHEST_GPA: u64 = 512 << 30;

/// Guest memory could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// No pages, or more than the address space has.
    #[error("a mapping of {0} pages was asked for: ask for at least 1 and at most 2^40")]
    Size(u64),
    /// mmap failed.
    #[error("{0} pages could not be mapped: ask for fewer or raise the limit (`ulimit -v`)")]
    Map(u64, #[source] io::Error),
}

/// An anonymous mapping of whole pages, all zero at first; a page takes room once it is touched.
///
/// A guest writes it behind the compiler's back. So no reference or slice to its bytes is ever
/// made: everything goes through raw pointers, and words are read and written volatile. All
/// methods may be called while a guest runs; what they return is then as torn as the guest's
/// stores make it.
///
/// Offsets are in bytes and pages are counted from the start of the mapping. What is outside of it,
/// a word at an offset that is no multiple of 8, and memories of two sizes are refused by a panic.
#[derive(Debug)]
pub struct GuestMemory {
    map: MmapRaw,
    /// Where in the mapping the memory begins, in bytes.
    start: usize,
    pages: u64,
}

/// Bytes of a huge page of the host.
const HUGE_PAGE_SIZE: usize = 2 << 20;

impl GuestMemory {
    /// Maps `pages` pages that take room only once touched (`MAP_NORESERVE`).
    pub fn new(pages: u64) -> Result<Self, MemoryError> {
        let map = map(pages, 0)?;
        // Huge pages would make sparse touches cost 2 MiB each, and make the guest's first faults
        // depend on the machine's settings. EINVAL where the kernel has no huge pages: as wanted.
        let _ = map.advise(Advice::NoHugePage);
        let start = 0;
        Ok(Self { map, start, pages })
    }

    /// Maps `pages` pages, touches all of them, and asks for huge pages of 2 MiB. Whether the kernel had any,
    /// [`huge_bytes`](Self::huge_bytes) returns.
    pub fn with_huge_pages(pages: u64) -> Result<Self, MemoryError> {
        let map = map(pages, HUGE_PAGE_SIZE)?;
        let start = (map.as_mut_ptr() as usize).wrapping_neg() % HUGE_PAGE_SIZE;
        // It fails where the kernel has none.
        let _ = map.advise(Advice::HugePage);
        let memory = Self { map, start, pages };
        memory.touch();
        Ok(memory)
    }

    /// How many of the bytes are in huge pages now (`AnonHugePages` of /proc/self/smaps).
    pub fn huge_bytes(&self) -> io::Result<u64> {
        let smaps = fs::read_to_string("/proc/self/smaps")?;
        let ours = self.host_addr()..self.host_addr() + self.bytes();
        // The kernel may have made one mapping of several that are next to each other, or several of one.
        Ok(huge_bytes_of(&smaps, ours).min(self.bytes()))
    }

    fn touch(&self) {
        for page in 0..self.pages {
            self.write_u64(page * PAGE_SIZE, 0);
        }
    }

    /// Maps `pages` pages and touches all of them, so that a measurement has no first faults of
    /// the host's own in it.
    pub fn prefaulted(pages: u64) -> Result<Self, MemoryError> {
        let memory = Self::new(pages)?;
        memory.touch();
        Ok(memory)
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many bytes there are.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Where the mapping starts in this process, for `KVM_SET_USER_MEMORY_REGION`.
    pub fn host_addr(&self) -> u64 {
        self.at(0, 0) as u64
    }

    /// Reads the word at `offset`.
    pub fn read_u64(&self, offset: u64) -> u64 {
        let word = self.word(offset);
        // SAFETY: word() gives an aligned pointer to 8 mapped bytes, and the mapping lives as long
        // as `self`. Volatile: the guest may write it meanwhile.
        unsafe { word.read_volatile() }
    }

    /// Writes the word at `offset`, as a device of the VMM would: no dirty log learns of it.
    pub fn write_u64(&self, offset: u64, value: u64) {
        let word = self.word(offset);
        // SAFETY: as in read_u64; the mapping is writable, and nobody holds a reference to it.
        unsafe { word.write_volatile(value) }
    }

    /// Takes the word at `offset` away, leaving 0, in one step beside a guest that writes it.
    pub fn take_u64(&self, offset: u64) -> u64 {
        let word = self.word(offset);
        // SAFETY: as in read_u64; the mapping is writable, and all accesses to a word that is taken
        // are by this and by the guest.
        let word = unsafe { AtomicU64::from_ptr(word) };
        // Relaxed: the word is a number by itself.
        word.swap(0, Ordering::Relaxed)
    }

    /// Copies bytes into the memory, as a loader would.
    pub fn write_bytes(&self, offset: u64, bytes: &[u8]) {
        let to = self.at(offset, bytes.len() as u64);
        // SAFETY: at() made sure that so many bytes are mapped there. No slice to a mapping of
        // ours is ever made, so `bytes` is elsewhere.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Copies one page to the same place of `dest`.
    pub fn copy_page_to(&self, page: u64, dest: &GuestMemory) {
        self.copy_run(page, 1, dest);
    }

    /// Copies `pages` pages from `first_page` on to the same place of `dest`. A page the guest
    /// writes meanwhile arrives torn; it is for the dirty log to say so later.
    pub fn copy_run(&self, first_page: u64, pages: u64, dest: &GuestMemory) {
        assert!(!ptr::eq(self, dest), "guest memory was copied onto itself");
        let from = self.run(first_page, pages);
        let to = dest.run(first_page, pages);
        // SAFETY: run() made sure that both have these bytes mapped, and two GuestMemory are two
        // mappings. The guest's stores race with this copy outside of Rust's memory model, as a
        // device's would; any bytes are valid bytes.
        unsafe { ptr::copy_nonoverlapping(from, to, (pages * PAGE_SIZE) as usize) }
    }

    /// The pages in which the two differ, in order. Call it when no vCPU runs.
    pub fn differing<'a>(&'a self, other: &'a GuestMemory) -> impl Iterator<Item = u64> + 'a {
        assert_eq!(
            self.pages, other.pages,
            "guest memories of two sizes were compared"
        );
        (0..self.pages).filter(move |&page| self.page_differs(page, other))
    }

    /// Whether the two differ in this page, byte for byte. Call it when no vCPU runs.
    pub fn page_differs(&self, page: u64, other: &GuestMemory) -> bool {
        let (a, b) = (self.run(page, 1), other.run(page, 1));
        // SAFETY: run() made sure that both pages are mapped. memcmp takes pointers, so no slice is
        // made.
        let order = unsafe { libc::memcmp(a.cast(), b.cast(), PAGE_SIZE as usize) };
        order != 0
    }

    fn word(&self, offset: u64) -> *mut u64 {
        assert!(
            offset % 8 == 0,
            "a word of guest memory was asked for at odd offset {offset:#x}"
        );
        self.at(offset, 8).cast()
    }

    fn run(&self, first_page: u64, pages: u64) -> *mut u8 {
        let end = first_page.checked_add(pages);
        assert!(
            end.is_some_and(|end| end <= self.pages),
            "pages {first_page} and {pages} on are not in guest memory of {} pages",
            self.pages
        );
        self.at(first_page * PAGE_SIZE, pages * PAGE_SIZE)
    }

    fn at(&self, offset: u64, length: u64) -> *mut u8 {
        let end = offset.checked_add(length);
        assert!(
            end.is_some_and(|end| end <= self.bytes()),
            "{length} bytes at {offset:#x} are not in guest memory of {} pages",
            self.pages
        );
        // SAFETY: start + bytes() ≤ the mapping's length, and offset ≤ bytes(), as just checked, so the
        // pointer stays inside the mapping or one past its end.
        unsafe { self.map.as_mut_ptr().add(self.start + offset as usize) }
    }
}

/// A mapping of so many pages and so many bytes more.
fn map(pages: u64, more: usize) -> Result<MmapRaw, MemoryError> {
    let bytes = match pages.checked_mul(PAGE_SIZE).map(usize::try_from) {
        Some(Ok(bytes)) if pages > 0 && pages <= 1 << 40 => bytes + more,
        _ => return Err(MemoryError::Size(pages)),
    };
    let map = MmapOptions::new().len(bytes).no_reserve_swap().map_anon();
    let map = map.map_err(|source| MemoryError::Map(pages, source))?;
    Ok(MmapRaw::from(map))
}

/// The bytes in huge pages of all mappings that have a part in `place`.
fn huge_bytes_of(smaps: &str, place: Range<u64>) -> u64 {
    let (mut inside, mut kib) = (false, 0);
    for line in smaps.lines() {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let address = |text| u64::from_str_radix(text, 16).ok();
        let ends = word.split_once('-');
        if let Some((start, end)) = ends.and_then(|(a, b)| address(a).zip(address(b))) {
            inside = start < place.end && place.start < end;
        } else if inside && word == "AnonHugePages:" {
            let number = rest.trim().trim_end_matches(" kB");
            kib += number.parse::<u64>().unwrap_or(0);
        }
    }
    kib << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_and_compares_pages() {
        let (a, b) = (
            GuestMemory::new(8).unwrap(),
            GuestMemory::prefaulted(8).unwrap(),
        );
        let differing = || a.differing(&b).collect::<Vec<_>>();
        assert_eq!(differing(), [0; 0]);
        a.write_u64(2 * PAGE_SIZE + 16, 0x0100);
        a.write_u64(7 * PAGE_SIZE + 4088, 1 << 56);
        assert_eq!(differing(), [2, 7]);
        a.copy_page_to(2, &b);
        assert_eq!(differing(), [7]);
        a.copy_run(6, 2, &b);
        assert_eq!(
            (differing(), b.read_u64(2 * PAGE_SIZE + 16)),
            (vec![], 0x0100)
        );
    }

    #[test]
    fn huge_pages_are_aligned_and_counted() {
        let memory = GuestMemory::with_huge_pages(1024).unwrap();
        assert_eq!(memory.host_addr() % HUGE_PAGE_SIZE as u64, 0);
        memory.write_u64(memory.bytes() - 8, 7);
        assert!(memory.huge_bytes().unwrap() <= memory.bytes());
        let small = GuestMemory::prefaulted(1024).unwrap();
        assert_eq!(small.huge_bytes().unwrap(), 0);

        let smaps = "1000-3000 rw-p 00000000 00:00 0 \nRss:  9 kB\nAnonHugePages:      2048 kB\n\
            3000-4000 rw-p 00000000 00:00 0 /a-b\nAnonHugePages:      4096 kB\n";
        let places = [0x1000..0x2000, 0x2000..0x4000, 0x3000..0x3001, 0..0x1000];
        let found = places.map(|place| huge_bytes_of(smaps, place) >> 10);
        assert_eq!(found, [2048, 6144, 4096, 0]);
    }

    #[test]
    fn refuses_absurd_sizes() {
        for pages in [0, 1 << 52, u64::MAX] {
            assert!(matches!(
                GuestMemory::new(pages),
                Err(MemoryError::Size { .. })
            ));
        }
    }

    #[test]
    #[should_panic(expected = "not in guest memory of 2 pages")]
    fn panics_out_of_bounds() {
        GuestMemory::new(2).unwrap().read_u64(2 * PAGE_SIZE);
    }
}
