// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The loop on arm64.
//!
//! | register | holds |
//! |---|---|
//! | `x0`, `x1` | start and end of the list |
//! | `x6` | stores between two reports of progress (and exits, if wanted) |
//! | `x8` | address of the progress words: stores, then passes |
//! | `x11` | bit 0: exit after each `x6` stores; bit 1: exit after each pass |
//! | `x10` | where in a page this vCPU stores |
//! | `x3` | the stamp |
//! | `x13` | turns of an empty loop after each `x6` stores |
//! | `x7` | the page whose stores are exits |
//! | `x5`, `x2`, `x4`, `x9`, `x12` | countdown (also of turns), place in the list, page, stores, passes |

use std::arch::global_asm;

use super::{BOOT_END, Registers, between};
use crate::guest::program::{Load, Places};
use crate::guest::stamp::{stamp, stamp_offset};

global_asm!(
    ".pushsection .rodata",
    ".balign 8",
    ".globl tiny_guest_program",
    "tiny_guest_program:",
    "1: mov x2, x0",
    "2: mov x5, x6",
    "3: ldr x4, [x2], #8",
    "   str x3, [x4, x10]",
    "   subs x5, x5, #1",
    "   b.ne 3b",
    "   add x9, x9, x6",
    "   str x9, [x8]",
    "   mov x5, x13",
    "4: subs x5, x5, #1",
    "   b.pl 4b",
    "   tbz x11, #0, 5f",
    "   str x9, [x7]",
    "5: cmp x2, x1",
    "   b.lo 2b",
    "   add x3, x3, #1",
    "   add x12, x12, #1",
    "   str x12, [x8, #8]",
    "   tbz x11, #1, 1b",
    "   str x12, [x7, #8]",
    "   b 1b",
    ".globl tiny_guest_program_end",
    "tiny_guest_program_end:",
    ".popsection",
);

unsafe extern "C" {
    static tiny_guest_program: u8;
    static tiny_guest_program_end: u8;
}

/// The loop, position-independent.
pub(crate) fn code() -> &'static [u8] {
    // SAFETY: the two labels of the piece above.
    unsafe {
        between(
            &raw const tiny_guest_program,
            &raw const tiny_guest_program_end,
        )
    }
}

pub(crate) fn registers(index: u32, load: &Load, places: &Places) -> Registers {
    let mut x = [0; 16];
    x[0] = places.list;
    x[1] = places.list + load.list.len() as u64 * 8;
    x[3] = stamp(index, 1);
    x[6] = load.granule();
    x[7] = BOOT_END;
    x[8] = places.progress;
    x[10] = stamp_offset(index);
    x[11] = u64::from(load.chunk > 0) | u64::from(load.pass_exits) << 1;
    x[13] = load.turns();
    let pc = places.code;
    Registers { x, pc }
}
