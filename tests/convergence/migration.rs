// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A whole migration of a simulated guest.

use std::num::NonZeroU64;
use std::time::Duration;

use kvm_dirty_ring::convergence::{Convergence, Decision, Extent, Observation, Terms};

use crate::guest::{Guest, SCALE, VCPUS, Vcpu, Zipf};
use crate::tracker::{Joining, Tracker};

/// What one sync takes, the guest running.
const SYNC_NS: u64 = 1_000_000;

/// vCPUs run in turns of this.
const TURN_NS: u64 = 500_000;

/// Under which circumstances a guest migrates, in numbers of full scale.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    pub fault_ns: u64,
    pub pages_per_second: u64,
    pub downtime_ms: u64,
    pub run_us: u64,
}

impl Setting {
    pub fn terms(&self) -> Terms {
        let pages_per_second = (self.pages_per_second / SCALE) as f64;
        let downtime = Duration::from_millis(self.downtime_ms);
        let mut terms = Terms::new(pages_per_second, downtime);
        terms.run_cost = Duration::from_micros(self.run_us);
        terms
    }
}

/// What of the guest's working set stays open.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Open {
    Nothing,
    /// With refreshes that stop the guest for so long.
    Refreshed(Duration),
    /// As much as there are places, as no refresh is to be had.
    Limited,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum End {
    Finished,
    Hopeless,
    /// Neither after all the rounds that it was given.
    #[default]
    None,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    pub end: End,
    /// Rounds sent while the guest ran.
    pub rounds: u32,
    pub refreshes: u32,
    /// Syncs after which it was called hopeless.
    pub hopeless: u32,
    /// Pages of full scale, the last round included.
    pub sent: u64,
    /// Pages that the last sync has found.
    pub left: u64,
    /// Writes against those of an untracked guest.
    pub speed: f64,
}

/// What the caller does about a hopeless guest, and for how many rounds it goes on at most.
#[derive(Debug, Clone, Copy)]
pub enum Caller {
    GivesUp(u32),
    HopesOn(u32),
    /// To the rate that the decision names.
    Throttles(u32),
}

pub fn migrate(
    guest: &Guest,
    zipf: &Zipf,
    setting: &Setting,
    open: Open,
    caller: Caller,
) -> Outcome {
    let terms = setting.terms();
    let joining = match open {
        Open::Nothing => Joining::NONE,
        Open::Refreshed(_) => Joining {
            places: terms.places(),
            most: u64::MAX,
        },
        Open::Limited => Joining {
            places: terms.places(),
            most: terms.places(),
        },
    };
    let mut machine = Machine::new(guest, zipf, setting, joining);
    let mut convergence = Convergence::new();
    let mut outcome = Outcome::default();
    loop {
        machine.run(SYNC_NS);
        let (others, members) = machine.tracker.sync();
        let mut seen = Observation::new(terms, others, members);
        if let Open::Refreshed(pause) = open {
            seen.refresh.pause = Some(pause);
        }
        seen.refresh.owed = machine.entry_ns > 0;
        (seen.refresh.closed, seen.refresh.back) = machine.tracker.closed_and_back();
        outcome.left = seen.left().pages * SCALE;
        match convergence.decide(&seen) {
            Decision::Finish => {
                outcome.end = End::Finished;
                outcome.sent += seen.left().pages * SCALE;
                break;
            }
            Decision::Refresh => {
                outcome.refreshes += 1;
                machine.tracker.refresh();
                machine.stop(seen.refresh.pause.unwrap());
                continue;
            }
            Decision::Hopeless { pages_per_second } => {
                outcome.hopeless += 1;
                match caller {
                    Caller::GivesUp(_) => {
                        outcome.end = End::Hopeless;
                        break;
                    }
                    Caller::HopesOn(_) => {}
                    Caller::Throttles(_) => machine.throttle(pages_per_second),
                }
            }
            Decision::GoOn => {}
        }
        let (Caller::GivesUp(rounds) | Caller::HopesOn(rounds) | Caller::Throttles(rounds)) =
            caller;
        if outcome.rounds == rounds {
            break;
        }
        outcome.rounds += 1;
        outcome.sent += others.pages * SCALE;
        machine.tracker.send();
        machine.run(time_to_send(&terms, others));
    }
    outcome.speed = machine.speed();
    outcome
}

fn time_to_send(terms: &Terms, extent: Extent) -> u64 {
    let runs = extent.runs * terms.run_cost.as_nanos() as u64;
    (extent.pages as f64 / terms.pages_per_second * 1e9) as u64 + runs
}

struct Machine<'a> {
    tracker: Tracker,
    vcpus: Vec<(Vcpu<'a>, u64)>,
    now: u64,
    fault_ns: u64,
    /// What a vCPU waits for each page that it dirties, if it is throttled.
    entry_ns: u64,
    /// Nanoseconds of faults, of all vCPUs.
    faulting: u64,
}

impl<'a> Machine<'a> {
    fn new(guest: &'a Guest, zipf: &'a Zipf, setting: &Setting, joining: Joining) -> Self {
        let vcpu = |index| (Vcpu::new(guest, zipf, index), 0);
        Self {
            tracker: Tracker::new(joining),
            vcpus: (0..VCPUS).map(vcpu).collect(),
            now: 0,
            fault_ns: setting.fault_ns * SCALE,
            entry_ns: 0,
            faulting: 0,
        }
    }

    fn run(&mut self, ns: u64) {
        let end = self.now + ns;
        while self.now < end {
            self.now = (self.now + TURN_NS).min(end);
            for (index, (vcpu, clock)) in self.vcpus.iter_mut().enumerate() {
                while *clock < self.now {
                    let (page, takes) = vcpu.next(*clock);
                    *clock += takes;
                    if self.tracker.write(index, page) {
                        *clock += self.fault_ns + self.entry_ns;
                        self.faulting += self.fault_ns;
                    }
                }
            }
        }
    }

    /// Nobody writes for so long.
    fn stop(&mut self, pause: Duration) {
        let ns = pause.as_nanos() as u64;
        self.now += ns;
        self.vcpus.iter_mut().for_each(|(_, clock)| *clock += ns);
    }

    /// From now on no page joins, so each one that is written is paid for.
    fn throttle(&mut self, pages_per_second: NonZeroU64) {
        self.tracker.join(Joining::NONE);
        self.entry_ns = 1_000_000_000 * VCPUS / pages_per_second;
    }

    fn speed(&self) -> f64 {
        1.0 - self.faulting as f64 / (self.now * VCPUS) as f64
    }
}
