// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Arbitrary scripts on the simulated kernel, which knows the truth about every write.
//!
//! The machine, the scripts and their judges are those of the property tests.

use arbitrary::{Arbitrary, Result, Unstructured};
use kvm_dirty_ring::Mode;
use kvm_dirty_ring::sim::{BitmapFault, ResetFault, ResetPhase};

use crate::common::judge::{assert_faultless, run_exactly, run_migration, run_repaired};
use crate::common::machine::Machine;
use crate::common::ops::{Moment, Op, Setup, Write};

const MOST_OPS: usize = 150;

/// A machine, what happens to it, and which judge looks on.
#[derive(Debug)]
pub struct Script {
    judge: Judge,
    setup: Setup,
    ops: Vec<Op>,
}

#[derive(Debug, Clone, Copy)]
enum Judge {
    /// No faults: each sync reports what was written and nothing else.
    Exact,
    /// No faults, writes inside resets: nothing is lost, nothing counted as a fault.
    Calm,
    /// Every fault there is: nothing is lost.
    Faulty,
    /// Bad resets and nonsense in so many of the operations; then, all slots protected anew, exact.
    BadResetsRepaired(usize),
    /// The same with nonsense alone.
    NonsenseRepaired(usize),
    /// The kernel's bitmaps, alone or beside rings: as `Exact`.
    ExactBitmaps,
    /// As `Calm`, and readings of bitmaps that fail half-way.
    BadBitmaps,
    /// Pages stay open, with rings or bitmaps; every fault but overruns and nonsense.
    WorkingSet,
}

/// What may be in a script.
#[derive(Clone, Copy, Default)]
struct Allowed {
    in_reset: bool,
    bad_resets: bool,
    garbage: bool,
    overruns: bool,
    rearm: bool,
    /// Slots whose log is switched on and off.
    switches: bool,
    /// Writes by the kernel, which only bitmaps show.
    kernel_writes: bool,
    bad_bitmaps: bool,
    /// Changes of the working set's terms, refreshes, last syncs.
    working_set: bool,
}

impl Judge {
    fn wants_bitmaps(self) -> bool {
        matches!(self, Self::ExactBitmaps | Self::BadBitmaps)
    }

    /// Of so many bytes one.
    fn of(byte: u8, faulty: usize) -> Self {
        match (byte, byte % 10) {
            // The last few, so that most of the corpus stays what it is.
            (236.., _) => Self::WorkingSet,
            (_, 0) => Self::Exact,
            (_, 1 | 2) => Self::Calm,
            (_, 3..=5) => Self::Faulty,
            (_, 6) => Self::BadResetsRepaired(faulty),
            (_, 7) => Self::NonsenseRepaired(faulty),
            (_, 8) => Self::ExactBitmaps,
            _ => Self::BadBitmaps,
        }
    }

    fn allows(self, done: usize) -> Allowed {
        let nothing = Allowed::default();
        match self {
            Self::Exact => nothing,
            Self::Calm => Allowed {
                in_reset: true,
                switches: true,
                ..nothing
            },
            Self::Faulty => Allowed {
                in_reset: true,
                bad_resets: true,
                garbage: true,
                overruns: true,
                rearm: true,
                switches: true,
                ..nothing
            },
            Self::ExactBitmaps => Allowed {
                kernel_writes: true,
                ..nothing
            },
            Self::BadBitmaps => Allowed {
                in_reset: true,
                switches: true,
                kernel_writes: true,
                bad_bitmaps: true,
                ..nothing
            },
            Self::WorkingSet => Allowed {
                in_reset: true,
                bad_resets: true,
                switches: true,
                rearm: true,
                working_set: true,
                ..nothing
            },
            Self::BadResetsRepaired(faulty) if done < faulty => Allowed {
                in_reset: true,
                bad_resets: true,
                garbage: true,
                ..nothing
            },
            Self::NonsenseRepaired(faulty) if done < faulty => Allowed {
                garbage: true,
                ..nothing
            },
            Self::BadResetsRepaired(_) | Self::NonsenseRepaired(_) => nothing,
        }
    }
}

impl<'a> Arbitrary<'a> for Script {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let faulty = 1 + usize::from(u.arbitrary::<u8>()? % 60);
        let judge = Judge::of(u.arbitrary()?, faulty);
        let setup = setup(u, judge)?;
        let mut ops = Vec::new();
        while !u.is_empty() && ops.len() < MOST_OPS {
            ops.push(op(u, judge.allows(ops.len()))?);
        }
        Ok(Self { judge, setup, ops })
    }
}

fn setup(u: &mut Unstructured<'_>, judge: Judge) -> Result<Setup> {
    let pml = matches!(
        judge,
        Judge::Calm | Judge::Faulty | Judge::BadBitmaps | Judge::WorkingSet
    );
    let is_open = matches!(judge, Judge::WorkingSet);
    let (places, ignores_voids) = match is_open {
        true => (Some(u64::from(u.arbitrary::<u8>()? % 64)), u.ratio(1, 8)?),
        false => (None, false),
    };
    let bitmaps = judge.wants_bitmaps() || is_open && u.ratio(1, 3)?;
    let (mode, with_bitmap) = match bitmaps {
        false => (Mode::Rings, false),
        true if u.arbitrary()? => (Mode::Rings, true),
        true => (Mode::Bitmap, false),
    };
    let ring_entries = 1 << u.int_in_range(3..=7)?;
    let reserved = u.int_in_range(2..=ring_entries / 2)?;
    let before_the_wrap = u.arbitrary::<u8>()?;
    // The reserve is there to hold what the buffer holds: a larger buffer would overrun the ring.
    let buffer = usize::from(u.arbitrary::<u8>()?) % (reserved as usize + 1);
    Ok(Setup {
        ring_entries,
        reserved,
        pml: if pml { buffer } else { 0 },
        first_index: 0u32.wrapping_sub(before_the_wrap.into()),
        vcpus: u.int_in_range(1..=3)?,
        mode,
        with_bitmap,
        // No byte of its own: the corpus stays what it is.
        protects_spans: before_the_wrap % 2 == 1,
        ignores_voids,
        places,
    })
}

fn write(u: &mut Unstructured<'_>, device: bool) -> Result<Write> {
    let who = u.arbitrary::<u8>()?;
    Ok(Write {
        vcpu: (!device).then_some(usize::from(who % 4)),
        slot: usize::from(who >> 2) % 3,
        at: u.arbitrary()?,
        pages: u.int_in_range(1..=12)?,
    })
}

fn in_reset(u: &mut Unstructured<'_>) -> Result<Op> {
    let phase = match u.arbitrary()? {
        true => ResetPhase::Begin,
        false => ResetPhase::Recycled,
    };
    let mut writes = Vec::new();
    for _ in 0..u.int_in_range(1..=3)? {
        let device = u.arbitrary()?;
        writes.push(write(u, device)?);
    }
    Ok(Op::InReset(phase, writes))
}

const ERRORS: [i32; 3] = [libc::EINTR, libc::ENOMEM, libc::EBADF];

fn bitmap_fault(u: &mut Unstructured<'_>) -> Result<BitmapFault> {
    let kind = u.arbitrary::<u8>()?;
    Ok(BitmapFault {
        after: u64::from(kind) / 3 % 21,
        error: ERRORS[usize::from(kind) % 3],
    })
}

fn fault(u: &mut Unstructured<'_>) -> Result<ResetFault> {
    Ok(match u.arbitrary::<u8>()? {
        kind @ 0..=9 => ResetFault::Error(ERRORS[usize::from(kind) % 3]),
        10..=39 => ResetFault::AtEnd,
        after => ResetFault::Short {
            after: u32::from(after) - 40,
        },
    })
}

fn op(u: &mut Unstructured<'_>, allowed: Allowed) -> Result<Op> {
    let index = |u: &mut Unstructured<'_>| Ok::<_, arbitrary::Error>(u.arbitrary::<u8>()?.into());
    Ok(match u.arbitrary::<u8>()? % 32 {
        0..=7 => Op::Write(write(u, false)?),
        8 => Op::Write(write(u, true)?),
        9 if allowed.kernel_writes => Op::KernelWrite(write(u, false)?),
        9 => Op::Write(write(u, true)?),
        10 => Op::Reap,
        11 => Op::ReapRings(u.arbitrary()?),
        12 => Op::ReapOnShard(index(u)?),
        13 => Op::OnFull(index(u)?),
        14 => Op::HarvestAndStop(index(u)?),
        15..=17 => Op::Sync,
        18 | 19 => Op::SlotStep {
            slot: usize::from(u.arbitrary::<u8>()?) % 3,
            pages: slot_size(u)?,
        },
        20 => Op::AddVcpu,
        21 | 22 if allowed.in_reset => in_reset(u)?,
        23 if allowed.in_reset => Op::Exit(index(u)?),
        24 if allowed.in_reset => Op::Checkpoint,
        25 | 26 if allowed.bad_resets => {
            let faults = u.int_in_range(1..=3)?;
            Op::Inject((0..faults).map(|_| fault(u)).collect::<Result<_>>()?)
        }
        25 | 26 if allowed.bad_bitmaps => {
            let faults = u.int_in_range(1..=3)?;
            Op::InjectBitmap(
                (0..faults)
                    .map(|_| bitmap_fault(u))
                    .collect::<Result<_>>()?,
            )
        }
        27..=29 if allowed.working_set => working_set_op(u)?,
        27 if allowed.garbage => Op::Garble {
            vcpu: index(u)?,
            unknown_slot: u.arbitrary()?,
        },
        28 | 29 if allowed.overruns => {
            let pages = u64::from(u.arbitrary::<u8>()?) + 1;
            Op::Overrun(Write {
                pages,
                ..write(u, false)?
            })
        }
        30 if allowed.rearm => Op::Rearm,
        31 if allowed.switches => Op::Switch {
            slot: usize::from(u.arbitrary::<u8>()?) % 3,
            on: u.arbitrary()?,
            fails: moment(u)?,
        },
        _ => Op::Write(write(u, false)?),
    })
}

fn working_set_op(u: &mut Unstructured<'_>) -> Result<Op> {
    Ok(match u.arbitrary::<u8>()? % 8 {
        0 => Op::WorkingSet(None),
        1 => {
            let most = u.arbitrary::<Option<u8>>()?.map_or(u64::MAX, u64::from);
            Op::WorkingSet(Some((u.arbitrary::<u8>()?.into(), most)))
        }
        2..=4 => Op::Refresh {
            fails: moment(u)?.filter(|_| u.ratio(1, 4).unwrap_or(false)),
        },
        5 => Op::Protect(write(u, false)?),
        6 => Op::OnDemand {
            chunks: u.arbitrary::<u8>()?.into(),
            span: u64::from(u.arbitrary::<u8>()?) + 1,
        },
        _ => Op::LastSync,
    })
}

fn moment(u: &mut Unstructured<'_>) -> Result<Option<Moment>> {
    let before = u.arbitrary::<Option<bool>>()?;
    Ok(before.map(|before| match before {
        true => Moment::Before,
        false => Moment::After,
    }))
}

/// Mostly small, for every page is looked at; rarely beyond the 32,768 pages of a block.
fn slot_size(u: &mut Unstructured<'_>) -> Result<u64> {
    let size = u64::from(u.arbitrary::<u8>()?) + 1;
    Ok(if size == 256 { 32_770 } else { size })
}

/// Runs the script under its judge.
pub fn run(script: &Script) {
    let mut machine = Machine::new(&script.setup);
    let ops = &script.ops[..];
    match script.judge {
        Judge::Exact | Judge::ExactBitmaps => {
            run_exactly(&mut machine, ops);
            run_exactly(&mut machine, &[Op::Sync]);
            assert_faultless(&machine);
        }
        Judge::Calm | Judge::BadBitmaps => {
            run_migration(&mut machine, ops);
            assert_faultless(&machine);
        }
        Judge::Faulty | Judge::WorkingSet => run_migration(&mut machine, ops),
        Judge::BadResetsRepaired(faulty) | Judge::NonsenseRepaired(faulty) => {
            let (faulty, calm) = ops.split_at(faulty.min(ops.len()));
            run_repaired(&mut machine, faulty, calm);
            run_exactly(&mut machine, &[Op::Sync]);
        }
    }
}
