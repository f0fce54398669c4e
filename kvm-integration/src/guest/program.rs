// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the guest does, and with what.
//!
//! One loop serves every workload: it reads page addresses off a list and stores a stamp into
//! each page. The stamp changes with every pass over the list, and each vCPU has its own place in
//! a page, so that every store changes the page and no vCPU's store hides another's.
//!
//! The loop itself is `program` of the folder that has the processor's name.

use super::slowdown;

pub use super::stamp::{MAX_VCPUS, split_stamp, stamp, stamp_offset};

/// Without exits: at most so many stores between two reports of progress.
const MAX_SILENCE: usize = 64;

/// Why the guest left, if all is well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Exit {
    /// It stored to another chunk of pages.
    Chunk,
    /// It is through its list, and will start over.
    PassDone,
    /// The vCPU's dirty ring is full: it won't run before entries were harvested and reset.
    RingFull,
    /// It did not leave by itself: a [`Kicker`](crate::guest::thread::Kicker) has thrown it out.
    Kicked,
}

/// At which privilege the guest runs, which decides who runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// On x86-64 long mode at CPL 3, on arm64 EL1: runs natively everywhere.
    Native,
    /// On x86-64 long mode at CPL 0, on arm64 the same as the other: runs natively on hardware with virtualization. `kvm_pvm` emulates it,
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
    /// Exit with [`Exit::Chunk`] after so many stores, which the list's
    /// length must be a multiple of; 0: never exit, run at full speed.
    pub chunk: u32,
    /// Exit with [`Exit::PassDone`] after each pass over the list.
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
    pub fn granule(&self) -> u64 {
        if self.chunk > 0 {
            return u64::from(self.chunk);
        }
        let divides = |&n: &usize| self.list.len() % n == 0;
        (1..=MAX_SILENCE).rev().find(divides).unwrap_or(1) as u64
    }

    /// Turns of the empty loop after so many stores. None where each of its instructions would be
    /// emulated: there a guest is slow enough, and must come to the end of its batch.
    pub(crate) fn turns(&self) -> u64 {
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

#[cfg(test)]
mod tests {
    use super::*;

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
