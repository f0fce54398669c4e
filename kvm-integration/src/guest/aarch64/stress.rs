// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory stress on arm64.
//!
//! | register | holds |
//! |---|---|
//! | `x0`, `x1` | start and end of the share |
//! | `x6` | the random buffer |
//! | `x8` | address of the progress words: pages, passes, longest gap |
//! | `x9`, `x13` | pages, passes |
//! | `x10` | when the last page was done, by the virtual counter |
//! | `x3`, `x4`, `x2`, `x5`, `x7`, `x11`, `x12` | window, place in it, place in the share, countdown, scratch |

use std::arch::global_asm;

use super::{Registers, between};
use crate::guest::memory::PAGE_SIZE;
use crate::guest::program::Places;
use crate::guest::stress::{Stress, WORDS};

global_asm!(
    ".pushsection .rodata",
    ".balign 8",
    ".globl tiny_guest_stress",
    "tiny_guest_stress:",
    "   mrs x10, cntvct_el0",
    "1: mov x2, x0",
    "   and x3, x13, #{words} - 1",
    "   add x3, x6, x3, lsl #3",
    "2: mov x4, x3",
    "   mov x5, #{words}",
    "3: ldr x7, [x4], #8",
    "   ldr x11, [x2]",
    "   eor x11, x11, x7",
    "   str x11, [x2], #8",
    "   subs x5, x5, #1",
    "   b.ne 3b",
    "   mrs x11, cntvct_el0",
    "   sub x12, x11, x10",
    "   mov x10, x11",
    "   ldr x7, [x8, #16]",
    "   cmp x12, x7",
    "   b.ls 4f",
    "   str x12, [x8, #16]",
    "4: add x9, x9, #1",
    "   str x9, [x8]",
    "   cmp x2, x1",
    "   b.lo 2b",
    "   add x13, x13, #1",
    "   str x13, [x8, #8]",
    "   b 1b",
    ".globl tiny_guest_stress_end",
    "tiny_guest_stress_end:",
    ".popsection",
    words = const WORDS,
);

unsafe extern "C" {
    static tiny_guest_stress: u8;
    static tiny_guest_stress_end: u8;
}

/// The loop, position-independent.
pub(crate) fn code() -> &'static [u8] {
    // SAFETY: the two labels of the piece above.
    unsafe {
        between(
            &raw const tiny_guest_stress,
            &raw const tiny_guest_stress_end,
        )
    }
}

pub(crate) fn registers(stress: &Stress, places: &Places) -> Registers {
    let mut x = [0; 16];
    x[0] = stress.share.gpa;
    x[1] = stress.share.gpa + stress.share.pages * PAGE_SIZE;
    x[6] = places.list;
    x[8] = places.progress;
    let pc = places.code;
    Registers { x, pc }
}
