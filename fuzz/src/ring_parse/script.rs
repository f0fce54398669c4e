// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the target is made to do, decoded from bytes.

use arbitrary::{Arbitrary, Result, Unstructured};
use kvm_dirty_ring::SlotId;

use crate::memory::{Cell, DIRTY, RESET};

const MOST_OPS: usize = 60;

/// The slots that are added, removed and named most often.
const SLOTS: [SlotId; 6] = [
    SlotId::new(0, 0),
    SlotId::new(0, 3),
    SlotId::new(1, 0),
    SlotId::new(0, 17),
    SlotId::new(1, 255),
    SlotId::new(0, 1023),
];

/// Rings, and what happens to them.
#[derive(Debug)]
pub struct Script {
    /// A reader alone, without a log around it.
    pub view: bool,
    /// Size of each ring: a power of two.
    pub entries: u32,
    /// What the first ring's memory holds at first.
    pub memory: Vec<Change>,
    /// What happens then.
    pub ops: Vec<Op>,
}

#[derive(Debug)]
pub enum Op {
    /// The memory changes between two calls.
    Change(Change),
    /// What a later reset does; one for each reset.
    React(Reaction),
    /// One more ring, with this in its memory.
    Attach(Vec<Change>),
    Reap,
    ReapRings(u8),
    ReapOnShard(usize),
    OnFull(usize),
    HarvestAndStop(usize),
    Sync,
    Add(SlotId, u64),
    Retire(SlotId),
    Finish(usize),
    Mark(SlotId, u64, u64),
    Rearmed(SlotId),
}

/// What the kernel's side does to a ring's memory.
#[derive(Debug, Clone)]
pub enum Change {
    /// Entries from `at` on, each with its page `stride` further on.
    Fill {
        ring: usize,
        at: u32,
        len: u32,
        cell: Cell,
        stride: u64,
    },
    /// Flags alone; the payload stays.
    Flags {
        ring: usize,
        at: u32,
        len: u32,
        flags: u32,
    },
    /// Pages pushed as a kernel does, as many as there is room for.
    Push {
        ring: usize,
        slot: u32,
        page: u64,
        len: u32,
        stride: u64,
    },
}

/// What one reset does.
#[derive(Debug, Clone, Default)]
pub struct Reaction {
    pub answer: Answer,
    /// Then the memory changes, before the log sees it again.
    pub changes: Vec<Change>,
}

#[derive(Debug, Clone)]
pub enum Answer {
    /// Recycles at most so many entries, and says how many.
    Recycle(u32),
    /// Recycles, and says this.
    Lie(u32),
    Error(i32),
}

impl Default for Answer {
    fn default() -> Self {
        Self::Recycle(u32::MAX)
    }
}

impl<'a> Arbitrary<'a> for Script {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let kind = u.arbitrary::<u8>()?;
        let entries = 1 << (u.arbitrary::<u8>()? % 9);
        let mut ops = Vec::new();
        for slot in SLOTS.iter().take(usize::from(kind >> 4 & 3)) {
            ops.push(Op::Add(*slot, any_size(u)?));
        }
        let memory = any_changes(u)?;
        while !u.is_empty() && ops.len() < MOST_OPS {
            ops.push(any_op(u)?);
        }
        Ok(Self {
            view: kind % 8 == 7,
            entries,
            memory,
            ops,
        })
    }
}

fn index(u: &mut Unstructured<'_>) -> Result<usize> {
    Ok(u.arbitrary::<u8>()?.into())
}

fn any_op(u: &mut Unstructured<'_>) -> Result<Op> {
    Ok(match u.arbitrary::<u8>()? % 32 {
        0..=8 => Op::Change(any_change(u)?),
        9..=11 => Op::React(any_reaction(u)?),
        12 => Op::Attach(any_changes(u)?),
        13..=14 => Op::Reap,
        15 => Op::ReapRings(u.arbitrary()?),
        16 => Op::ReapOnShard(index(u)?),
        17..=18 => Op::OnFull(index(u)?),
        19 => Op::HarvestAndStop(index(u)?),
        20..=23 => Op::Sync,
        24..=25 => Op::Add(any_slot(u)?, any_size(u)?),
        26 => Op::Retire(any_slot(u)?),
        27 => Op::Finish(index(u)?),
        28..=29 => Op::Mark(any_slot(u)?, any_page(u)?, any_page(u)?),
        _ => Op::Rearmed(any_slot(u)?),
    })
}

fn any_changes(u: &mut Unstructured<'_>) -> Result<Vec<Change>> {
    (0..u.arbitrary::<u8>()? % 4)
        .map(|_| any_change(u))
        .collect()
}

fn any_reaction(u: &mut Unstructured<'_>) -> Result<Reaction> {
    let answer = match u.arbitrary::<u8>()? % 8 {
        0..=2 => Answer::Recycle(u32::MAX),
        3 | 4 => Answer::Recycle(u.arbitrary::<u8>()?.into()),
        5 => Answer::Lie(u.arbitrary::<u8>()?.into()),
        6 => Answer::Lie(u.arbitrary()?),
        _ => Answer::Error(u.arbitrary::<u8>()?.into()),
    };
    let changes = any_changes(u)?;
    Ok(Reaction { answer, changes })
}

fn any_change(u: &mut Unstructured<'_>) -> Result<Change> {
    let kind = u.arbitrary::<u8>()?;
    let ring = usize::from(kind >> 4 & 3);
    let at = u32::from(u.arbitrary::<u8>()?);
    let len = u32::from(u.arbitrary::<u8>()?) + 1;
    Ok(match kind % 16 {
        0..=6 => Change::Push {
            ring,
            slot: any_raw_slot(u)?,
            page: any_page(u)?,
            len: at % 64 + 1,
            stride: u64::from(len - 1),
        },
        7 | 8 => Change::Flags {
            ring,
            at,
            len,
            flags: any_flags(u)?,
        },
        9..=13 => Change::Fill {
            ring,
            at,
            len,
            cell: Cell {
                flags: any_flags(u)?,
                slot: any_raw_slot(u)?,
                offset: any_page(u)?,
            },
            stride: u.arbitrary::<u8>()?.into(),
        },
        // Sixteen bytes as they come.
        _ => Change::Fill {
            ring,
            at,
            len: 1,
            cell: Cell {
                flags: u.arbitrary()?,
                slot: u.arbitrary()?,
                offset: u.arbitrary()?,
            },
            stride: 0,
        },
    })
}

fn any_flags(u: &mut Unstructured<'_>) -> Result<u32> {
    Ok(match u.arbitrary::<u8>()? % 8 {
        0..=2 => DIRTY,
        3 => RESET,
        4 => 0,
        5 => DIRTY | RESET,
        6 => !0 << 2 | DIRTY,
        _ => u.arbitrary()?,
    })
}

fn any_slot(u: &mut Unstructured<'_>) -> Result<SlotId> {
    any_raw_slot(u).map(SlotId::from_raw)
}

/// Mostly one of those there may be.
fn any_raw_slot(u: &mut Unstructured<'_>) -> Result<u32> {
    match u.arbitrary::<u8>()? {
        // An id so high would make each table of slots a large one.
        255 => Ok(u.arbitrary::<u32>()? & 0xffff_03ff),
        254 => u.int_in_range(0..=0x2_0003),
        known => Ok(SLOTS[usize::from(known) % SLOTS.len()].raw()),
    }
}

/// Mostly one that a small slot has.
fn any_page(u: &mut Unstructured<'_>) -> Result<u64> {
    match u.arbitrary::<u8>()? {
        255 => u.arbitrary(),
        254 => Ok(u.arbitrary::<u16>()?.into()),
        page => Ok(u64::from(page) % 100),
    }
}

fn any_size(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.arbitrary::<u8>()? {
        255 => [0, 1 << 31, u64::MAX, 333][usize::from(u.arbitrary::<u8>()? % 4)],
        size => u64::from(size) % 90 + 1,
    })
}
