// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The loop on x86-64.
//!
//! | register | holds |
//! |---|---|
//! | `r14`, `rdx` | start and end of the list |
//! | `rbx` | stores between two reports of progress (and exits, if wanted) |
//! | `rbp` | address of the progress words: stores, then passes |
//! | `r9` | bit 0: exit after each `rbx` stores; bit 1: exit after each pass |
//! | `r13` | where in a page this vCPU stores |
//! | `r11` | the stamp |
//! | `r10` | turns of an empty loop after each `rbx` stores |
//! | `rcx`, `rsi`, `rax`, `r8`, `r12`, `r15` | countdown, place in the list, page, stores, passes, turns left |
//!
//! A store takes three instructions, for the sake of `kvm_pvm`, which in [`Mode::Emulated`] takes
//! about as long for any of them.

use kvm_bindings::kvm_regs;

use crate::guest::program::{Load, Mode, Places};
use crate::guest::stamp::{stamp, stamp_offset};

/// The port written after each chunk of stores.
pub(super) const CHUNK_PORT: u16 = 0x10;
/// The port written after each pass over the list.
pub(super) const PASS_PORT: u16 = 0x11;

#[rustfmt::skip]
const CODE: &[u8] = &[
    // pass:
    0x4c, 0x89, 0xf6,             // mov rsi, r14
    // chunk:
    0x48, 0x89, 0xd9,             // mov rcx, rbx
    // store:
    0x48, 0xad,                   // lodsq
    0x4e, 0x89, 0x1c, 0x28,       // mov [rax + r13], r11
    0xe2, 0xf8,                   // loop store
    0x49, 0x01, 0xd8,             // add r8, rbx
    0x4c, 0x89, 0x45, 0x00,       // mov [rbp], r8
    0x4d, 0x89, 0xd7,             // mov r15, r10
    // idle:
    0x49, 0xff, 0xcf,             // dec r15
    0x79, 0xfb,                   // jns idle
    0x41, 0xf6, 0xc1, 0x01,       // test r9b, 1
    0x74, 0x02,                   // jz no_chunk_exit
    0xe6, CHUNK_PORT as u8,       // out CHUNK_PORT, al
    // no_chunk_exit:
    0x48, 0x39, 0xd6,             // cmp rsi, rdx
    0x72, 0xd9,                   // jb chunk
    0x49, 0xff, 0xc3,             // inc r11
    0x49, 0xff, 0xc4,             // inc r12
    0x4c, 0x89, 0x65, 0x08,       // mov [rbp + 8], r12
    0x41, 0xf6, 0xc1, 0x02,       // test r9b, 2
    0x74, 0x02,                   // jz no_pass_exit
    0xe6, PASS_PORT as u8,        // out PASS_PORT, al
    // no_pass_exit:
    0xeb, 0xc2,                   // jmp pass
];

/// The loop, position-independent.
pub(crate) fn code() -> &'static [u8] {
    CODE
}

pub(crate) fn registers(index: u32, load: &Load, places: &Places) -> kvm_regs {
    kvm_regs {
        rip: places.code,
        r14: places.list,
        rdx: places.list + load.list.len() as u64 * 8,
        rbx: load.granule(),
        rbp: places.progress,
        r9: u64::from(load.chunk > 0) | u64::from(load.pass_exits) << 1,
        r10: load.turns(),
        r13: stamp_offset(index),
        r11: stamp(index, 1),
        rflags: flags(load.mode),
        ..Default::default()
    }
}

/// Bit 1 is always set. At CPL 3 `out` needs IOPL 3 (bits 12 and 13). Interrupts are let through (bit 9): none is
/// for the guest, and an emulated processor may keep those of its host from one that shuts them out.
pub(super) fn flags(mode: Mode) -> u64 {
    match mode {
        Mode::Native => 0x3202,
        Mode::Emulated => 0x202,
    }
}

/// Where the short jump at `at` leads.
#[cfg(test)]
pub(super) fn jump_target(code: &[u8], at: usize) -> usize {
    let is_jump = matches!(code[at], 0x72 | 0x74..=0x76 | 0xe2 | 0xeb);
    assert!(is_jump, "no jump at {at:#x}");
    (at + 2).wrapping_add_signed(isize::from(code[at + 1] as i8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_land_where_their_comments_say() {
        let target = |at: usize| (at + 2).wrapping_add_signed(isize::from(CODE[at + 1] as i8));
        let jumps = [
            (0x0c, 0x06),
            (0x1b, 0x18),
            (0x21, 0x25),
            (0x28, 0x03),
            (0x38, 0x3c),
            (0x3c, 0x00),
        ];
        for (at, to) in jumps {
            assert!(
                matches!(CODE[at], 0x72 | 0x74 | 0x79 | 0xe2 | 0xeb),
                "no jump at {at:#x}"
            );
            assert_eq!(target(at), to, "jump at {at:#x}");
        }
        assert_eq!(CODE.len(), 0x3e);
    }
}
