// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What happens in an episode: a function of the seed and the episode's number alone.
//!
//! In what order it happens to race with what is for the machine to decide.

use super::backend::Backend;
use super::policies::PolicyPlan;
use kvm_dirty_ring::WorkingSet;
use kvm_integration::guest::workload::Workload;
use kvm_integration::random::SplitMix64;

/// Pages of slots that stay; of slots that come and go, the ones that are always there.
const FEWEST_PAGES: u64 = 8;
const MOST_PAGES: u64 = 2048;

/// An episode.
#[derive(Debug, Clone)]
pub struct Plan {
    pub ring_entries: u32,
    /// Index at which rings start; on the simulated kernel.
    pub first_index: u32,
    /// Entries of the hardware's buffer; on the simulated kernel.
    pub pml: usize,
    pub writes_in_resets: bool,
    /// Whether all vCPUs store to a slot too that is not in the log; on KVM.
    pub untold: bool,
    pub workload: Workload,
    pub seed: u64,
    /// Pages of the slots that stay.
    pub stays: Vec<u64>,
    /// Slots that come and go.
    pub goes: Vec<SlotPlan>,
    /// vCPUs from the beginning.
    pub vcpus: Vec<VcpuPlan>,
    /// vCPUs that come later.
    pub late: Vec<VcpuPlan>,
    /// See [`Job`](super::world::Job).
    pub abandons: u64,
    pub devices: u32,
    pub syncers: u32,
    pub reapers: u32,
    pub policy: Option<PolicyPlan>,
    /// Whether pages may stay open at all.
    pub leaves_open: bool,
    /// How many from the beginning, if any.
    pub working_set: Option<WorkingSet>,
    /// Whether resets protect pages that are to stay open; on the simulated kernel.
    pub ignores_voids: bool,
    /// Whether bitmaps can be read without being cleared; on the simulated kernel.
    pub manual_protect: bool,
    /// Each ends with a comparison.
    pub rounds: Vec<Round>,
}

/// A slot that comes and goes, with the same address and any size.
#[derive(Debug, Clone, Copy)]
pub struct SlotPlan {
    /// Pages that it always has.
    pub least: u64,
    pub at_first: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
pub struct VcpuPlan {
    pub kind: Kind,
    /// Which of the slots that come and go it stores to, beside those that stay.
    pub goes: Option<usize>,
    /// Whether it stores to all of that slot, and so goes with it; or only to what is always there.
    pub whole: bool,
}

/// How a vCPU runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// As the hardware does it.
    Native,
    /// By an instruction emulator, if KVM has one, with exits that keep it from overrunning its ring.
    Emulated,
    /// As a careless instruction emulator does it: it overruns its ring.
    Careless,
}

#[derive(Debug, Clone)]
pub struct Round {
    pub acts: Vec<(Act, u64)>,
    /// Whether the last sync is to be alone, or beside others.
    pub alone: bool,
}

/// One thing to do. Numbers `pick` stand for any of those that there are.
#[derive(Debug, Clone, Copy)]
pub enum Act {
    Sync,
    /// For so many acts.
    Storm(StormKind, u64),
    Kick(u64),
    KickAll,
    /// With its writers running until it is retired, or not.
    Remove {
        slot: usize,
        live: bool,
    },
    Add {
        slot: usize,
        pages: u64,
    },
    StartVcpu,
    DropVcpu(u64),
    StopReaper,
    StartReaper(PolicyPlan),
    PauseReaper,
    ResumeReaper,
    SwapPolicy(PolicyPlan),
    Rearm(u64),
    FailReset(i32),
    ShortenReset(u32),
    Garble(u64),
    SetWorkingSet(Option<WorkingSet>),
    Refresh,
    CallOffALastSync,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StormKind {
    Vcpus,
    Reaper,
    Others,
    Everybody,
    SetUser,
}

impl Plan {
    pub fn draw(backend: &Backend, seed: u64, episode: u64) -> Self {
        let mut random = SplitMix64(SplitMix64(seed).next() ^ episode);
        let random = &mut random;
        let is_sim = backend.is_sim();
        // Suspicion hides what is missed, so most episodes do without its causes.
        let faulty = backend.has_rings() && chance(random, 4);
        let leaves_open = chance(random, 2);
        let careless = backend.overruns() && chance(random, 5);
        let ring_entries = match is_sim {
            true => 16 << random.below(9),
            false => 256 << [0, 0, 0, 1, 2, 4, 6][random.below(7) as usize],
        };
        let goes: Vec<SlotPlan> = (0..random.below(3))
            .map(|_| {
                let least = pages(random);
                let at_first = chance(random, 2).then(|| any_size(random, least));
                SlotPlan { least, at_first }
            })
            .collect();
        let crowd = match random.below(12) {
            0 if !is_sim => 8 + random.below(9),
            _ => 1 + random.below(4),
        };
        let mut vcpus: Vec<VcpuPlan> = (0..crowd)
            .map(|_| VcpuPlan::draw(random, &goes, careless))
            .collect();
        if careless && vcpus.iter().all(|vcpu| vcpu.kind != Kind::Careless) {
            vcpus[0].kind = Kind::Careless;
        }
        // Whatever comes and goes, somebody stores all the time.
        vcpus[0].goes = None;
        let late = (0..random.below(4))
            .map(|_| VcpuPlan::draw(random, &goes, careless))
            .collect();
        let acts = |random: &mut SplitMix64| -> Vec<(Act, u64)> {
            (0..1 + random.below(8))
                .map(|_| {
                    (
                        Act::draw(random, &goes, faulty, leaves_open),
                        nap(random, is_sim),
                    )
                })
                .collect()
        };
        Self {
            ring_entries,
            first_index: match random.below(3) {
                0 => 0u32.wrapping_sub(random.below(5000) as u32),
                _ => random.next() as u32,
            },
            pml: match random.below(3) {
                0 => random.below(u64::from(ring_entries) / 4) as usize,
                _ => 0,
            },
            writes_in_resets: chance(random, 2),
            untold: faulty && !is_sim && chance(random, 2),
            workload: Workload::ALL[random.below(3) as usize],
            seed: random.next(),
            stays: (0..1 + random.below(2)).map(|_| pages(random)).collect(),
            vcpus,
            late,
            abandons: [0, 0, 5, 40][random.below(4) as usize],
            devices: random.below(3) as u32,
            syncers: random.below(3) as u32,
            reapers: random.below(2) as u32,
            policy: (!chance(random, 5)).then(|| PolicyPlan::draw(random)),
            leaves_open,
            working_set: working_set(random),
            ignores_voids: leaves_open && is_sim && backend.has_rings() && chance(random, 4),
            manual_protect: !chance(random, 4),
            rounds: (0..3 + random.below(4))
                .map(|_| Round {
                    acts: acts(random),
                    alone: chance(random, 2),
                })
                .collect(),
            goes,
        }
    }
}

impl VcpuPlan {
    fn draw(random: &mut SplitMix64, goes: &[SlotPlan], careless: bool) -> Self {
        let goes = match goes.len() as u64 {
            0 => None,
            slots => Some(random.below(slots) as usize).filter(|_| chance(random, 2)),
        };
        let kind = match random.below(6) {
            0 if careless => Kind::Careless,
            // Few: on kvm_pvm a change of slots waits for those that run, seconds if the CPUs are busy.
            0..2 => Kind::Emulated,
            _ => Kind::Native,
        };
        let whole = chance(random, 2);
        Self { kind, goes, whole }
    }
}

impl Act {
    fn draw(random: &mut SplitMix64, goes: &[SlotPlan], faulty: bool, leaves_open: bool) -> Self {
        if leaves_open && chance(random, 4) {
            return match random.below(4) {
                0 | 1 => Self::Refresh,
                2 => Self::CallOffALastSync,
                _ => Self::SetWorkingSet(working_set(random)),
            };
        }
        let pick = random.next();
        // Slots and faults come at the end, for where there are none.
        let slots = if goes.is_empty() { 0 } else { 8 };
        let faults = if faulty { 5 } else { 0 };
        match random.below(21 + slots + faults) {
            0..4 => Self::Sync,
            4..7 => {
                let kind = match random.below(6) {
                    0 | 1 => StormKind::Everybody,
                    2 => StormKind::Vcpus,
                    3 => StormKind::Reaper,
                    4 => StormKind::Others,
                    _ => StormKind::SetUser,
                };
                Self::Storm(kind, 1 + random.below(4))
            }
            7..9 => Self::Kick(pick),
            9 => Self::KickAll,
            10 | 11 => Self::StartVcpu,
            12 => Self::DropVcpu(pick),
            13 => Self::StopReaper,
            14 | 15 => Self::StartReaper(PolicyPlan::draw(random)),
            16 => Self::PauseReaper,
            17 => Self::ResumeReaper,
            18 | 19 => Self::SwapPolicy(PolicyPlan::draw(random)),
            20 => Self::Rearm(pick),
            n if n < 21 + slots => {
                let slot = random.below(goes.len() as u64) as usize;
                match n % 2 {
                    0 => Self::Remove {
                        slot,
                        live: chance(random, 2),
                    },
                    _ => Self::Add {
                        slot,
                        pages: any_size(random, goes[slot].least),
                    },
                }
            }
            n => match n - 21 - slots {
                0 | 1 => {
                    let errors = [libc::EINTR, libc::ENOMEM, libc::EBADF];
                    Self::FailReset(errors[random.below(3) as usize])
                }
                2 | 3 => Self::ShortenReset(random.below(300) as u32),
                _ => Self::Garble(pick),
            },
        }
    }
}

fn chance(random: &mut SplitMix64, one_in: u64) -> bool {
    random.below(one_in) == 0
}

/// Places for none, some or all pages; seldom no working set.
fn working_set(random: &mut SplitMix64) -> Option<WorkingSet> {
    let terms = WorkingSet::new(random.below(3) * pages(random));
    match random.below(8) {
        0 => None,
        1 => Some(terms.at_most(pages(random))),
        _ => Some(terms),
    }
}

/// As many small slots as large ones.
fn pages(random: &mut SplitMix64) -> u64 {
    let most = FEWEST_PAGES << random.below((MOST_PAGES / FEWEST_PAGES).ilog2().into());
    most + random.below(most)
}

fn any_size(random: &mut SplitMix64, least: u64) -> u64 {
    least + random.below(least)
}

/// What to wait until the next act, in microseconds.
fn nap(random: &mut SplitMix64, is_sim: bool) -> u64 {
    match random.below(3) {
        0 => 0,
        1 => random.below(300),
        _ if is_sim => random.below(1000),
        _ => random.below(6000),
    }
}

#[cfg(test)]
mod tests {
    use kvm_dirty_ring::Mode;

    use super::*;

    #[test]
    fn an_episode_is_a_function_of_seed_and_number() {
        let plan = |seed, episode| {
            format!(
                "{:?}",
                Plan::draw(&Backend::Sim(Mode::Rings), seed, episode)
            )
        };
        assert_eq!(plan(1, 2), plan(1, 2));
        assert_ne!(plan(1, 2), plan(2, 2));
        assert_ne!(plan(1, 2), plan(1, 3));
    }

    #[test]
    fn sizes_are_within_bounds() {
        let mut random = SplitMix64(0);
        for _ in 0..10_000 {
            let pages = pages(&mut random);
            assert!((FEWEST_PAGES..=MOST_PAGES).contains(&pages));
        }
    }
}
