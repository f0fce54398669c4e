// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest under memory stress, on KVM.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::VmError;
use super::memory::{GuestMemory, PAGE_SIZE};
use super::stress::{RANDOM_WORDS, Stress, WORDS};
use super::thread::{Action, VcpuThread};
use super::vm::TinyVm;
use super::workload::Region;
use crate::host::kvm_for_test;

/// Each page has been XORed with one window after the other, in order, and the one under way in
/// part.
#[test]
fn the_guest_does_as_its_code_says() {
    let Some((kvm, _alone)) = kvm_for_test("memory stress") else {
        return;
    };
    const PAGES: u64 = 3;
    let share = Region {
        gpa: 4 << 30,
        pages: PAGES,
    };
    let memory = Arc::new(GuestMemory::new(PAGES).unwrap());
    let vm = TinyVm::with_capacity(&kvm, 2, RANDOM_WORDS).unwrap();
    vm.add_slot(1, share.gpa, Arc::clone(&memory), false)
        .unwrap();
    let stress = Stress { share, seed: 9 };
    // Not the first one: its random bytes must be where its own registers say.
    let vcpu = vm.create_stressed_vcpu(1, &stress).unwrap();
    let ticks = vcpu.clock_hz().unwrap();
    let thread = VcpuThread::spawn(vcpu, |_| Action::Pause).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while thread.passes() < 700 {
        assert!(Instant::now() < deadline, "700 passes take too long");
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(5));
    assert!(thread.pause());

    let words: Vec<u64> = stress.random_words().collect();
    let done = thread.progress();
    assert!(thread.passes() >= 700 && done >= 700 * PAGES);
    // After so many passes.
    let wanted = |word: usize, passes: u64| {
        let windows = (0..passes).map(|pass| words[word + pass as usize % WORDS]);
        windows.fold(0, |sum, random| sum ^ random)
    };
    for page in 0..PAGES {
        let passes = (done + PAGES - 1 - page) / PAGES;
        let under_way = page == done % PAGES;
        let mut ahead = under_way;
        for word in 0..WORDS {
            let found = memory.read_u64(page * PAGE_SIZE + word as u64 * 8);
            ahead &= found != wanted(word, passes);
            let passes = passes + u64::from(ahead);
            assert_eq!(found, wanted(word, passes), "page {page}, word {word}");
        }
    }
    // It is the longest since it was taken away, in ticks: less than all the time there was.
    let gap = thread.progress_reader().take_longest_gap();
    assert!(
        gap > 0 && (gap as f64) < 10.0 * ticks,
        "{gap} at {ticks} a second"
    );
    assert_eq!(thread.progress_reader().take_longest_gap(), 0);
}

#[test]
fn a_list_too_short_for_the_random_bytes_is_refused() {
    let Some((kvm, _alone)) = kvm_for_test("memory stress") else {
        return;
    };
    let vm = TinyVm::with_capacity(&kvm, 1, 512).unwrap();
    let share = Region {
        gpa: 4 << 30,
        pages: 1,
    };
    let error = vm.create_stressed_vcpu(0, &Stress { share, seed: 1 });
    assert!(matches!(error, Err(VmError::List { capacity: 512, .. })));
    let vm = TinyVm::with_capacity(&kvm, 1, 1024).unwrap();
    let error = vm.create_stressed_vcpu(1, &Stress { share, seed: 1 });
    assert!(matches!(error, Err(VmError::VcpuIndex { .. })));
}
