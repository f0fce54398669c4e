// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes through the crate `vm-memory`: all of them are reported, each after it has been done.

#[path = "common/over.rs"]
mod over;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::sim::{SimConfig, SimVm};
use kvm_dirty_ring::vm_memory::RegionBitmap;
use kvm_dirty_ring::{DirtyLog, DirtyPages, GuestMap, GuestRegion, SlotId};
use over::Over;
use proptest::prelude::*;
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress, VolatileMemory, VolatileSlice,
};

const RAM: SlotId = SlotId::new(0, 0);

fn page_size() -> usize {
    // SAFETY: it takes an integer.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

fn log() -> DirtyLog {
    SimVm::new(SimConfig::default()).dirty_log()
}

/// The pages that a sync reports of `slot`.
fn synced(log: &DirtyLog, slot: SlotId) -> BTreeSet<u64> {
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    let pages = dirty.pages().filter(|&(of, _)| of == slot);
    pages.map(|(_, page)| page).collect()
}

fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

/// What every write writes.
const BYTE: u8 = 0xab;
const BYTES: [u8; 64] = [BYTE; 64];
const WORD: u64 = u64::from_ne_bytes([BYTE; 8]);
const WORDS: [u64; 8] = [WORD; 8];

type Memory<B> = GuestMemoryMmap<B>;
type Write<B> = fn(&Memory<B>, GuestAddress);

/// A writer that has bytes in a file.
fn source() -> File {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm_memory_source");
    let file = File::options();
    let file = file.clone().read(true).write(true).create(true).open(path);
    let file = file.unwrap();
    file.write_all_at(&BYTES, 0).unwrap();
    file
}

fn slice<B: Bitmap>(
    memory: &Memory<B>,
    at: GuestAddress,
) -> VolatileSlice<'_, vm_memory::bitmap::BS<'_, B>> {
    memory.get_slice(at, BYTES.len()).unwrap()
}

/// Every way to write into memory that vm-memory has, each writing 8 to 64 bytes at an address.
fn writes<B: Bitmap + 'static>() -> Vec<Write<B>> {
    vec![
        // Bytes of the memory.
        |memory, at| assert_eq!(memory.write(&BYTES, at).unwrap(), BYTES.len()),
        |memory, at| memory.write_slice(&BYTES, at).unwrap(),
        |memory, at| memory.write_obj(WORD, at).unwrap(),
        |memory, at| memory.store(WORD, at, Ordering::Relaxed).unwrap(),
        |memory, at| {
            assert_eq!(
                memory.read_volatile_from(at, &mut &BYTES[..], 64).unwrap(),
                64
            )
        },
        |memory, at| {
            memory
                .read_exact_volatile_from(at, &mut source(), 64)
                .unwrap()
        },
        // Bytes of a region.
        |memory, at| {
            let (region, at) = memory.to_region_addr(at).unwrap();
            region.write_slice(&BYTES, at).unwrap();
        },
        |memory, at| {
            let (region, at) = memory.to_region_addr(at).unwrap();
            region.store(WORD, at, Ordering::Release).unwrap();
        },
        |memory, at| {
            let (region, at) = memory.to_region_addr(at).unwrap();
            region
                .read_exact_volatile_from(at, &mut &BYTES[..], 64)
                .unwrap();
        },
        // Slices.
        |memory, at| slice(memory, at).copy_from(&BYTES),
        |memory, at| slice(memory, at).copy_from(&WORDS),
        |memory, at| slice(memory, at).write_obj(WORD, 0).unwrap(),
        |memory, at| slice(memory, at).store(WORD, 8, Ordering::Relaxed).unwrap(),
        |memory, at| slice(memory, at).offset(16).unwrap().copy_from(&BYTES),
        |memory, at| slice(memory, at).subslice(16, 8).unwrap().copy_from(&WORDS),
        |memory, at| {
            let mut bytes = BYTES;
            let from = VolatileSlice::from(&mut bytes[..]);
            from.copy_to_volatile_slice(slice(memory, at));
        },
        |memory, at| {
            let mut slice = slice(memory, at);
            vm_memory::ReadVolatile::read_exact_volatile(&mut source(), &mut slice).unwrap();
        },
        // References.
        |memory, at| slice(memory, at).get_ref::<u64>(8).unwrap().store(WORD),
        |memory, at| {
            slice(memory, at)
                .get_array_ref(0, 8)
                .unwrap()
                .store(3, WORD)
        },
        |memory, at| {
            slice(memory, at)
                .get_array_ref(8, 4)
                .unwrap()
                .copy_from(&WORDS)
        },
        |memory, at| {
            slice(memory, at)
                .get_array_ref(8, 4)
                .unwrap()
                .copy_from(&BYTES)
        },
        |memory, at| {
            let mut bytes = BYTES;
            let from = VolatileSlice::from(&mut bytes[..]);
            let from = from.get_array_ref::<u64>(0, 8).unwrap();
            from.copy_to_volatile_slice(slice(memory, at));
        },
    ]
}

/// Each write marks its page, and no other; one across a page's end marks both.
#[test]
fn every_way_to_write_marks_what_it_writes() {
    let log = log();
    let base = GuestAddress(1 << 30);
    let pages = 10;
    let memory = Memory::<RegionBitmap>::from_ranges(&[(base, pages * page_size())]).unwrap();
    let region = memory.iter().next().unwrap();
    log.add_slot_with(RAM, region.bitmap().region()).unwrap();
    let writes = writes::<RegionBitmap>();
    for (number, write) in writes.iter().enumerate() {
        let at = |page: usize| GuestAddress(base.0 + (page * page_size()) as u64);
        write(&memory, at(3));
        assert_eq!(synced(&log, RAM), set([3]), "write {number}");
        write(&memory, GuestAddress(at(5).0 - 64));
        assert_eq!(synced(&log, RAM), set([4]), "write {number}");
    }
    memory
        .write_slice(&BYTES, GuestAddress(base.0 + 8 * page_size() as u64 - 1))
        .unwrap();
    assert_eq!(synced(&log, RAM), set([7, 8]));
    // Reads mark nothing.
    memory.read_obj::<u64>(base).unwrap();
    slice(&memory, base).copy_to(&mut [0; 64]);
    assert_eq!(synced(&log, RAM), set([]));
}

thread_local! {
    /// What the memory of the test lies in, and how often it was looked at.
    static WITNESS: RefCell<Option<(File, u32)>> = const { RefCell::new(None) };
}

/// A bitmap that looks, when it is marked, whether the write is done already.
#[derive(Debug, Clone, Copy, Default)]
struct Witness {
    offset: usize,
}

impl WithBitmapSlice<'_> for Witness {
    type S = Self;
}

impl BitmapSlice for Witness {}

impl NewBitmap for Witness {
    fn with_len(_: usize) -> Self {
        Self::default()
    }
}

impl Bitmap for Witness {
    fn mark_dirty(&self, offset: usize, len: usize) {
        WITNESS.with_borrow_mut(|witness| {
            let (file, looks) = witness.as_mut().unwrap();
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, (self.offset + offset) as u64)
                .unwrap();
            assert!(
                len > 0 && bytes.iter().all(|&byte| byte == BYTE),
                "marked, not written"
            );
            *looks += 1;
        });
    }

    fn dirty_at(&self, _: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        let offset = self.offset + offset;
        Self { offset }
    }
}

/// Marked first, the page could be copied between the two, and the write be lost.
#[test]
fn every_way_to_write_marks_after_the_write() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm_memory_witness");
    let file = File::options();
    let file = file
        .clone()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path);
    let file = file.unwrap();
    let writes = writes::<Witness>();
    let bytes = writes.len() * page_size();
    file.set_len(bytes as u64).unwrap();
    let backing = FileOffset::new(file.try_clone().unwrap(), 0);
    let ranges = [(GuestAddress(0), bytes, Some(backing))];
    let memory = Memory::<Witness>::from_ranges_with_files(&ranges).unwrap();
    WITNESS.set(Some((file, 0)));
    for (number, write) in (0..).zip(&writes) {
        write(&memory, GuestAddress((number * page_size()) as u64));
        let looks = WITNESS.with_borrow(|witness| witness.as_ref().unwrap().1);
        assert!(looks as usize > number, "write {number} marks nothing");
    }
}

#[test]
fn what_was_written_before_the_slot_was_added_is_kept() {
    let log = log();
    let memory = Memory::<RegionBitmap>::from_ranges(&[(GuestAddress(0), 9 * page_size())]);
    let memory = memory.unwrap();
    memory.write_slice(&BYTES, GuestAddress(0)).unwrap();
    let region = memory.iter().next().unwrap();
    assert!(region.bitmap().dirty_at(0));
    log.add_slot_with(RAM, region.bitmap().region()).unwrap();
    memory
        .write_slice(&BYTES, GuestAddress(8 * page_size() as u64))
        .unwrap();
    log.mark_dirty(RAM, 4, 1).unwrap();
    assert!(region.bitmap().dirty_at(4 * page_size()));
    assert_eq!(synced(&log, RAM), set([0, 4, 8]));
    assert!(!region.bitmap().dirty_at(0));
    assert_eq!(synced(&log, RAM), set([]));
}

/// A VMM that tracks some guests only has regions with a bitmap or without one, of one type.
#[test]
fn a_regions_bitmap_may_be_optional() {
    for tracked in [true, false] {
        let log = log();
        let size = 10 * page_size();
        let bitmap = tracked.then(|| RegionBitmap::with_len(size));
        let mapping = MmapRegionBuilder::new_with_bitmap(size, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE);
        let region = GuestRegionMmap::new(mapping.build().unwrap(), GuestAddress(0)).unwrap();
        let memory = Memory::<Option<RegionBitmap>>::from_regions(vec![region]).unwrap();
        match memory.iter().next().unwrap().bitmap() {
            Some(slice) => log.add_slot_with(RAM, slice.region()).unwrap(),
            None => log.add_slot(RAM, 10).unwrap(),
        }
        let at = GuestAddress(3 * page_size() as u64);
        memory.write_slice(&BYTES, at).unwrap();
        assert_eq!(synced(&log, RAM), set(tracked.then_some(3)));
    }
}

#[test]
fn a_bitmap_is_one_slots_at_a_time() {
    let log = log();
    let bitmap = RegionBitmap::with_len(5 * page_size());
    let other = SlotId::new(1, 7);
    log.add_slot_with(RAM, &bitmap).unwrap();
    let in_use =
        |result| matches!(result, Err(SlotError::BitmapInUse { slot, by: RAM }) if slot == other);
    assert!(in_use(log.add_slot_with(other, &bitmap)));
    let clone = bitmap.clone();
    assert!(in_use(log.add_slot_with(other, &clone)));
    let exists = log.add_slot_with(RAM, &bitmap);
    assert!(matches!(exists, Err(SlotError::Exists { slot: RAM })));

    let retired = log.retire_slot(RAM).unwrap();
    assert!(in_use(log.add_slot_with(other, &bitmap)));
    log.finish_slot(&retired).unwrap();
    clone.mark_dirty(page_size(), 1);
    assert_eq!(synced(&log, RAM), set([]));
    log.add_slot_with(other, &bitmap).unwrap();
    assert_eq!(synced(&log, other), set([1]));
}

#[test]
fn sizes_that_no_slot_has_are_refused() {
    let log = log();
    let too_many = (1 << 31) * page_size();
    for (bitmap, pages) in [
        (RegionBitmap::default(), 0),
        (RegionBitmap::with_len(0), 0),
        (RegionBitmap::with_len(too_many), 1 << 31),
        (
            RegionBitmap::with_len(usize::MAX),
            (usize::MAX / page_size()) as u64 + 1,
        ),
    ] {
        bitmap.mark_dirty(0, usize::MAX);
        assert!(!bitmap.dirty_at(0));
        assert_eq!(bitmap.pages(), pages);
        let refused = log.add_slot_with(RAM, &bitmap);
        assert!(matches!(refused, Err(SlotError::Pages { pages: found, .. }) if found == pages));
    }
    log.add_slot_with(RAM, &RegionBitmap::with_len(1)).unwrap();
    log.mark_dirty(RAM, 0, 1).unwrap();
    assert!(log.mark_dirty(RAM, 1, 1).is_err());
}

/// Offset and length of a mark: mostly inside, sometimes past all bounds.
fn mark() -> impl Strategy<Value = (usize, usize)> {
    let extreme = prop_oneof![Just(usize::MAX), Just(usize::MAX / 2), 0..9usize];
    let inside = 0..7 * page_size();
    let number = || prop_oneof![8 => inside.clone(), 1 => extreme.clone()];
    let length = prop_oneof![number(), 0..3usize];
    (number(), length)
}

/// A mark past the end marks what exists.
#[test]
fn marks_past_the_regions_end_are_cut_off() {
    let log = log();
    let bitmap = RegionBitmap::with_len(70 * page_size() - 1);
    log.add_slot_with(RAM, &bitmap).unwrap();
    for (first, len) in [
        (68, 3 * page_size()),
        (69, usize::MAX),
        (70, 1),
        (200, 5000),
    ] {
        bitmap.mark_dirty(first * page_size(), len);
        bitmap
            .slice_at(page_size())
            .mark_dirty(first * page_size(), len);
        let expected = first.min(70) as u64..70;
        assert_eq!(
            synced(&log, RAM),
            expected.collect::<BTreeSet<_>>(),
            "{first}, {len}"
        );
    }
}

proptest! {
    /// The oracle looks at each page by itself.
    #[test]
    fn marks_are_the_pages_that_they_touch(
        len in 1..6 * page_size(),
        // Slices are taken at these offsets, one of the other.
        marks in prop::collection::vec((prop::collection::vec(0..3 * page_size(), 0..3), mark()), 0..6),
        syncs in any::<u8>(),
    ) {
        let log = log();
        let bitmap = RegionBitmap::with_len(len);
        log.add_slot_with(RAM, &bitmap).unwrap();
        let mut dirty = BTreeSet::new();
        for (number, (slices, (offset, length))) in marks.into_iter().enumerate() {
            let slice = bitmap.slice_at(0);
            let slice = slices.iter().fold(slice, |slice, &at| slice.slice_at(at));
            slice.mark_dirty(offset, length);
            let first = slices.iter().sum::<usize>() as u128 + offset as u128;
            let end = first + length as u128;
            for page in 0..len.div_ceil(page_size()) {
                let page_begin = (page * page_size()) as u128;
                let page_end = page_begin + page_size() as u128;
                if length > 0 && first < page_end && end > page_begin {
                    dirty.insert(page as u64);
                }
                prop_assert_eq!(bitmap.dirty_at(page * page_size()), dirty.contains(&(page as u64)));
            }
            if syncs >> number & 1 == 1 {
                prop_assert_eq!(synced(&log, RAM), core::mem::take(&mut dirty));
            }
        }
        prop_assert_eq!(synced(&log, RAM), dirty);
    }
}

/// Devices write across two regions while a migration reads what they dirty through the map.
#[test]
fn a_copy_by_slices_is_the_memory() {
    let log = log();
    let pages = 40;
    let bases = [GuestAddress(0), GuestAddress((pages * page_size()) as u64)];
    let ranges = bases.map(|base| (base, pages * page_size()));
    let memory = Memory::<RegionBitmap>::from_ranges(&ranges).unwrap();
    let mut regions = Vec::new();
    for (id, region) in (0..).zip(memory.iter()) {
        let slot = SlotId::new(0, 10 - id);
        log.add_slot_with(slot, region.bitmap().region()).unwrap();
        regions.push(GuestRegion {
            slot,
            address: region.start_addr().0,
            pages: region.bitmap().region().pages(),
        });
    }
    let map = GuestMap::new(regions).unwrap();
    let copy = Memory::<()>::from_ranges(&ranges).unwrap();
    let mut dirty = DirtyPages::new();
    let mut round = || {
        log.sync(&mut dirty).unwrap();
        for run in dirty.runs() {
            let to = map.slice(&copy, run).unwrap();
            map.slice(&memory, run).unwrap().copy_to_volatile_slice(to);
        }
        dirty.page_count()
    };

    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for device in 0..2u64 {
            let (memory, stop) = (&memory, &stop);
            scope.spawn(move || {
                let bytes = 2 * pages * page_size();
                let mut number = device;
                while !stop.load(Ordering::Relaxed) {
                    number = number.wrapping_mul(6364136223846793005).wrapping_add(97);
                    let at = (number >> 20) as usize % (bytes - 5000);
                    let text = [number as u8; 5000];
                    memory
                        .write_slice(
                            &text[..1 + (number >> 50) as usize % 4999],
                            GuestAddress(at as u64),
                        )
                        .unwrap();
                }
            });
        }
        let _over = Over(&stop);
        let (mut rounds, mut copied) = (0, 0);
        let start = Instant::now();
        while rounds < 50 || copied == 0 {
            let patience = Duration::from_secs(60);
            assert!(start.elapsed() < patience, "no device writes");
            copied += round();
            rounds += 1;
            thread::sleep(Duration::from_micros(100));
        }
    });
    round();
    let (mut there, mut here) = (vec![0; pages * page_size()], vec![0; pages * page_size()]);
    for (original, copy) in memory.iter().zip(copy.iter()) {
        original
            .read_slice(&mut here, MemoryRegionAddress(0))
            .unwrap();
        copy.read_slice(&mut there, MemoryRegionAddress(0)).unwrap();
        assert!(here == there, "the copy differs");
    }
    // A run that is not in the map is an error, and not an empty slice.
    let run = kvm_dirty_ring::Run {
        slot: RAM,
        first_page: 0,
        pages: 1,
    };
    assert!(map.slice(&memory, run).is_err());
}

/// A migration begins while memory is plugged in: neither waits for the other for ever.
#[test]
fn a_slot_is_added_while_another_starts() {
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    log.add_slot(RAM, 10).unwrap();
    vm.create_slot(RAM, 10);
    let (ended, both) = mpsc::channel();
    let (began, is_on) = mpsc::channel();
    thread::spawn({
        let (log, ended) = (log.clone(), ended.clone());
        move || {
            let switched = log.start_tracking(RAM, || {
                began.send(()).unwrap();
                // Time for the other to come as far as it can.
                thread::sleep(Duration::from_millis(50));
                Ok(())
            });
            ended.send(switched).unwrap();
        }
    });
    thread::spawn(move || {
        is_on.recv().unwrap();
        let bitmap = RegionBitmap::with_len(5 * page_size());
        let added = log.add_slot_with(SlotId::new(0, 9), &bitmap);
        ended.send(added).unwrap();
    });
    for _ in 0..2 {
        let one = both.recv_timeout(Duration::from_secs(60));
        one.expect("both wait for ever").unwrap();
    }
}
