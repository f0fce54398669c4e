//! The machine code of a guest under memory stress, as guestperf has it: each vCPU XORs its share
//! of the memory with random bytes, page by page, 8 bytes at a time, over and over.
//!
//! The random bytes are a page-sized window into a buffer, which moves on by 8 bytes with each pass:
//! with one and the same page, every second pass would undo the one before, and half of all stale
//! copies of a page would look whole. As it is, a page looks again as it did 1,024 passes before,
//! when each of the 512 windows has been there twice, and at no time in between.
//!
//! | register | holds |
//! |---|---|
//! | `r14`, `r15` | start and end of the share |
//! | `rbx` | the random buffer |
//! | `rbp` | address of the progress words: pages, passes, longest gap |
//! | `r8`, `r13` | pages, passes |
//! | `r9` | when the last page was done, by the time-stamp counter |
//! | `r12`, `rsi`, `rdi`, `rcx`, `rax`, `rdx` | window, place in it, place in the share, countdown, scratch |
//!
//! The longest gap is the longest time between two pages, in ticks of the time-stamp counter, since
//! the host has taken it away.

use kvm_bindings::kvm_regs;

use crate::memory::PAGE_SIZE;
use crate::program::{Mode, Places, flags};
use crate::random::SplitMix64;
use crate::workload::Region;

/// Words of a page.
const WORDS: usize = (PAGE_SIZE / 8) as usize;
/// Words of the random buffer: a page and all places that the window moves to.
pub(crate) const RANDOM_WORDS: usize = 2 * WORDS - 1;

/// The loop, position-independent.
#[rustfmt::skip]
pub(crate) const CODE: &[u8] = &[
    0x0f, 0x31,                         // rdtsc
    0x48, 0xc1, 0xe2, 0x20,             // shl rdx, 32
    0x48, 0x09, 0xd0,                   // or rax, rdx
    0x49, 0x89, 0xc1,                   // mov r9, rax
    // pass:
    0x4c, 0x89, 0xf7,                   // mov rdi, r14
    0x44, 0x89, 0xe8,                   // mov eax, r13d
    0x25, 0xff, 0x01, 0x00, 0x00,       // and eax, 511
    0x4c, 0x8d, 0x24, 0xc3,             // lea r12, [rbx + rax * 8]
    // page:
    0x4c, 0x89, 0xe6,                   // mov rsi, r12
    0xb9, 0x00, 0x02, 0x00, 0x00,       // mov ecx, 512
    // word:
    0x48, 0x8b, 0x06,                   // mov rax, [rsi]
    0x48, 0x31, 0x07,                   // xor [rdi], rax
    0x48, 0x83, 0xc6, 0x08,             // add rsi, 8
    0x48, 0x83, 0xc7, 0x08,             // add rdi, 8
    0xff, 0xc9,                         // dec ecx
    0x75, 0xee,                         // jnz word
    0x0f, 0x31,                         // rdtsc
    0x48, 0xc1, 0xe2, 0x20,             // shl rdx, 32
    0x48, 0x09, 0xd0,                   // or rax, rdx
    0x48, 0x89, 0xc2,                   // mov rdx, rax
    0x4c, 0x29, 0xc8,                   // sub rax, r9
    0x49, 0x89, 0xd1,                   // mov r9, rdx
    0x48, 0x3b, 0x45, 0x10,             // cmp rax, [rbp + 16]
    0x76, 0x04,                         // jbe shorter
    0x48, 0x89, 0x45, 0x10,             // mov [rbp + 16], rax
    // shorter:
    0x49, 0xff, 0xc0,                   // inc r8
    0x4c, 0x89, 0x45, 0x00,             // mov [rbp], r8
    0x4c, 0x39, 0xff,                   // cmp rdi, r15
    0x72, 0xbe,                         // jb page
    0x49, 0xff, 0xc5,                   // inc r13
    0x4c, 0x89, 0x6d, 0x08,             // mov [rbp + 8], r13
    0xeb, 0xa6,                         // jmp pass
];

/// What one vCPU stresses, for ever, natively.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stress {
    /// Its share of the memory.
    pub share: Region,
    /// Where its random bytes come from.
    pub seed: u64,
}

impl Stress {
    /// The random buffer.
    pub(crate) fn random_words(&self) -> impl Iterator<Item = u64> {
        let mut random = SplitMix64(self.seed);
        (0..RANDOM_WORDS).map(move |_| random.next())
    }

    /// `places.list` is where the random buffer is.
    pub(crate) fn registers(&self, places: &Places) -> kvm_regs {
        let Region { gpa, pages } = self.share;
        kvm_regs {
            rip: places.code,
            r14: gpa,
            r15: gpa + pages * PAGE_SIZE,
            rbx: places.list,
            rbp: places.progress,
            rflags: flags(Mode::Native),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::memory::GuestMemory;
    use crate::thread::{Action, VcpuThread};
    use crate::vm::{TinyVm, VmError};

    #[test]
    fn jumps_land_where_their_comments_say() {
        let target = |at: usize| (at + 2).wrapping_add_signed(isize::from(CODE[at + 1] as i8));
        for (at, to) in [(0x33, 0x23), (0x4b, 0x51), (0x5b, 0x1b), (0x64, 0x0c)] {
            assert!(
                matches!(CODE[at], 0x72 | 0x75 | 0x76 | 0xeb),
                "no jump at {at:#x}"
            );
            assert_eq!(target(at), to, "jump at {at:#x}");
        }
        assert_eq!(CODE.len(), 0x66);
    }

    /// A window must change what it is laid over, and no two windows in the same way.
    #[test]
    fn random_words_are_not_zero_and_differ() {
        let region = Region { gpa: 0, pages: 1 };
        let words = |seed| {
            let stress = Stress {
                share: region,
                seed,
            };
            stress.random_words().collect::<Vec<_>>()
        };
        let mut some = words(1);
        assert_eq!(some.len(), RANDOM_WORDS);
        assert_ne!(some, words(2));
        some.sort_unstable();
        some.dedup();
        assert_eq!(some.len(), RANDOM_WORDS);
        assert_ne!(some[0], 0);
    }

    /// Each page has been XORed with one window after the other, in order, and the one under way in
    /// part.
    #[test]
    fn the_guest_does_as_its_code_says() {
        let Some(kvm) = crate::host::kvm_for_test("memory stress") else {
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
        let ticks = vcpu.tsc_hz().unwrap();
        let thread = VcpuThread::spawn(vcpu, |_| Action::Pause).unwrap();
        while thread.passes() < 700 {
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
        let Some(kvm) = crate::host::kvm_for_test("memory stress") else {
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
}
