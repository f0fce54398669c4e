// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory stress on x86-64.
//!
//! | register | holds |
//! |---|---|
//! | `r14`, `r15` | start and end of the share |
//! | `rbx` | the random buffer |
//! | `rbp` | address of the progress words: pages, passes, longest gap |
//! | `r8`, `r13` | pages, passes |
//! | `r9` | when the last page was done, by the time-stamp counter |
//! | `r12`, `rsi`, `rdi`, `rcx`, `rax`, `rdx` | window, place in it, place in the share, countdown, scratch |

use kvm_bindings::kvm_regs;

use super::program::flags;
use crate::guest::memory::PAGE_SIZE;
use crate::guest::program::{Mode, Places};
use crate::guest::stress::Stress;
use crate::guest::workload::Region;

#[rustfmt::skip]
const CODE: &[u8] = &[
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

/// The loop, position-independent.
pub(crate) fn code() -> &'static [u8] {
    CODE
}

pub(crate) fn registers(stress: &Stress, places: &Places) -> kvm_regs {
    let Region { gpa, pages } = stress.share;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::x86_64::program::jump_target;

    #[test]
    fn jumps_land_where_their_comments_say() {
        let jumps = [0x33, 0x4b, 0x5b, 0x64];
        let targets = [0x23, 0x51, 0x1b, 0x0c];
        assert_eq!(jumps.map(|at| jump_target(CODE, at)), targets);
        assert_eq!(CODE.len(), 0x66);
    }
}
