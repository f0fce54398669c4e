//! The guest's machine code, and what it is told through registers.
//!
//! One loop serves every workload: it reads page addresses off a list and stores a stamp into
//! each page. The stamp changes with every pass over the list, and each vCPU has its own place in
//! a page, so that every store changes the page and no vCPU's store hides another's.
//!
//! | register | holds |
//! |---|---|
//! | `r14`, `rdx` | start and end of the list |
//! | `rbx` | stores between two reports of progress (and exits, if wanted) |
//! | `rbp` | address of the progress words: stores, then passes |
//! | `r9` | bit 0: exit after each `rbx` stores; bit 1: exit after each pass |
//! | `r13` | where in a page this vCPU stores |
//! | `r11` | the stamp |
//! | `r10` | turns of an empty loop after each `rbx` stores: see [`slowdown`] |
//! | `rcx`, `rsi`, `rax`, `r8`, `r12`, `r15` | countdown, place in the list, page, stores, passes, turns left |
//!
//! A store takes three instructions, for the sake of `kvm_pvm`, which in [`Mode::Emulated`] takes
//! about as long for any of them.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::slowdown;

pub use super::stamp::{MAX_VCPUS, split_stamp, stamp, stamp_offset};

/// The port written after each chunk of stores.
pub const CHUNK_PORT: u16 = 0x10;
/// The port written after each pass over the list.
pub const PASS_PORT: u16 = 0x11;
/// Without exits: at most so many stores between two reports of progress.
const MAX_SILENCE: usize = 64;

/// The loop, position-independent.
#[rustfmt::skip]
pub(crate) const CODE: &[u8] = &[
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

/// At which privilege the guest runs, which decides who runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Long mode at CPL 3: runs natively everywhere.
    Native,
    /// Long mode at CPL 0: runs natively on hardware with virtualization. `kvm_pvm` emulates it,
    /// 1,024 instructions at a time between checks for a full ring; with more than about 64 page
    /// stores without an exit it overruns the ring. So use a chunk of at most 32, unless a lost
    /// ring is what you want.
    Emulated,
}

/// What one vCPU is to do, for ever.
#[derive(Clone, Debug)]
pub struct Load {
    /// At which privilege it runs.
    pub mode: Mode,
    /// The guest-physical addresses of the pages to store to, in order. A page may repeat.
    pub list: Vec<u64>,
    /// Exit with [`Exit::Chunk`](crate::guest::vcpu::Exit::Chunk) after so many stores, which the list's
    /// length must be a multiple of; 0: never exit, run at full speed.
    pub chunk: u32,
    /// Exit with [`Exit::PassDone`](crate::guest::vcpu::Exit::PassDone) after each pass over the list.
    pub pass_exits: bool,
}

impl Load {
    /// Stores to the pages of `list` without ever exiting on its own.
    pub fn new(mode: Mode, list: Vec<u64>) -> Self {
        Self {
            mode,
            list,
            chunk: 0,
            pass_exits: false,
        }
    }

    /// Exits after every `chunk` stores; 0: never.
    pub fn chunk(mut self, chunk: u32) -> Self {
        self.chunk = chunk;
        self
    }

    /// Exits after every pass over the list.
    pub fn pass_exits(mut self) -> Self {
        self.pass_exits = true;
        self
    }

    /// Stores between two reports of progress: the chunk, or the largest divisor of the list's
    /// length that is small.
    pub(crate) fn granule(&self) -> u64 {
        if self.chunk > 0 {
            return u64::from(self.chunk);
        }
        let divides = |&n: &usize| self.list.len() % n == 0;
        (1..=MAX_SILENCE).rev().find(divides).unwrap_or(1) as u64
    }

    /// Turns of the empty loop after so many stores. None where each of its instructions would be
    /// emulated: there a guest is slow enough, and must come to the end of its batch.
    fn turns(&self) -> u64 {
        match self.mode {
            Mode::Native => self.granule() * slowdown::turns_per_store(),
            Mode::Emulated => 0,
        }
    }
}

/// Where things are that the registers point to, as guest-physical addresses.
pub(crate) struct Places {
    pub code: u64,
    pub page_tables: u64,
    pub list: u64,
    pub progress: u64,
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

/// Bit 1 is always set. At CPL 3 `out` needs IOPL 3 (bits 12 and 13).
pub(crate) fn flags(mode: Mode) -> u64 {
    match mode {
        Mode::Native => 0x3002,
        Mode::Emulated => 0x2,
    }
}

/// Turns the state after reset into long mode with flat segments.
pub(crate) fn enter_long_mode(sregs: &mut kvm_sregs, mode: Mode, places: &Places) {
    let (code, data, dpl) = match mode {
        Mode::Native => (0x33, 0x2b, 3),
        Mode::Emulated => (0x08, 0x10, 0),
    };
    let flat = kvm_segment {
        limit: u32::MAX,
        dpl,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    // Type 11: code, readable, accessed. Type 3: data, writable, accessed.
    sregs.cs = kvm_segment {
        selector: code,
        type_: 11,
        l: 1,
        ..flat
    };
    let data = kvm_segment {
        selector: data,
        type_: 3,
        db: 1,
        ..flat
    };
    (sregs.ss, sregs.ds, sregs.es) = (data, data, data);
    // PG, NE, ET, MP and PE.
    sregs.cr0 = 0x8000_0033;
    // PAE.
    sregs.cr4 = 0x20;
    // LMA and LME.
    sregs.efer = 0x500;
    sregs.cr3 = places.page_tables;
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

    #[test]
    fn granules_divide_the_list() {
        for length in 1..500 {
            let load = Load::new(Mode::Native, vec![0; length]);
            assert_eq!(length as u64 % load.granule(), 0);
        }
        assert_eq!(Load::new(Mode::Native, vec![0; 96]).granule(), 48);
        assert_eq!(Load::new(Mode::Native, vec![0; 96]).chunk(16).granule(), 16);
    }
}
