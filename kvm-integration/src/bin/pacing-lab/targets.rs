// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is aimed at, and whether it was met.
//!
//! | target | wanted |
//! |---|---|
//! | full exits a second, after the first edge, under a constant, moderate or skewed load | 0 |
//! | the same of an emulated guest, as a share of those of `fixed` | ≤ 0.02; 0 a second with `SCHED_FIFO` |
//! | passes ÷ minimum, one busy vCPU | ≤ 1.15; ≤ 1.10 with `SCHED_FIFO`; ≤ 1.2 with rings of 1,024 or fewer |
//! | passes ÷ minimum, 2 busy vCPUs; 8 or more | ≤ 1.6; ≤ 1.3 |
//! | stall of `qemu` ÷ stall, 8 or more emulated vCPUs | ≥ 100 |
//! | stores ÷ those without any pass, hot set | ≥ 0.95 |
//! | wake-ups a second, and CPU, of an idle guest | ≤ 4; ≤ 0.1 % |
//! | stores ÷ those of the best arm | ≥ 0.95 |
//! | CPU of the reaper beyond passes, one busy vCPU, rings of 4,096 | ≤ 0.15 %; emulated ≤ 0.7 % |
//! | wake-ups a pass, one busy vCPU | ≤ 3 |
//! | CPU of the reaper beyond passes, simulated guest of 64 to 256 vCPUs | ≤ 1 % |
//!
//! Where others take a part of the machine, stores are compared by CPU time. Where resets alone would take most of the time, which can be known of a simulated guest, there is
//! nothing to aim at.

use std::fmt;

use kvm_integration::lab::{ArmResult, CellResult, Measured};
use serde::Serialize;

/// Where a figure should be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// Not above.
    AtMost(f64),
    /// Not below.
    AtLeast(f64),
}

/// A target that a run covers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// What it is about.
    pub target: &'static str,
    /// Under which load.
    pub guest: String,
    /// Of which arm.
    pub arm: &'static str,
    /// Where the figure should be.
    #[serde(serialize_with = "as_text")]
    pub wanted: Bound,
    /// Where it is; `None` if it is beyond all bounds, as a quotient by nothing.
    pub measured: Option<f64>,
    /// Whether that is as wanted.
    pub met: bool,
}

/// The arms that targets are for; with the second one's reaper, wake-ups are in time.
const OURS: [&str; 2] = ["adaptive", "adaptive-fifo"];

/// All targets that these results have figures for.
pub fn verdicts(results: &[CellResult], simulated: bool) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for result in results {
        for arm in OURS.iter().filter_map(|name| result.arm(name)) {
            let mut judge = Judge {
                result,
                arm,
                all: arm.total(),
                simulated,
                verdicts: &mut verdicts,
            };
            if !result.is_crowded() {
                judge.full_exits();
                judge.passes();
                judge.stall();
            }
            judge.progress();
            judge.idle();
            judge.overhead();
        }
    }
    verdicts
}

const PROGRESS: [&str; 2] = ["stores ÷ without passes", "stores ÷ best arm"];
const PROGRESS_OF_CPU: [&str; 2] = [
    "stores a CPU second ÷ without passes",
    "stores a CPU second ÷ best arm",
];

struct Judge<'a> {
    result: &'a CellResult,
    arm: &'a ArmResult,
    all: Measured,
    simulated: bool,
    verdicts: &'a mut Vec<Verdict>,
}

impl Judge<'_> {
    fn is(&self, workloads: &[&str]) -> bool {
        workloads.contains(&self.result.workload.as_str())
    }

    /// vCPUs that store.
    fn busy(&self) -> u32 {
        match self.is(&["skew"]) {
            true => 1,
            false => self.result.vcpus,
        }
    }

    fn in_time(&self) -> bool {
        self.arm.arm == OURS[1]
    }

    fn other(&self, name: &str) -> Option<Measured> {
        self.result.arm(name).map(ArmResult::total)
    }

    fn say(&mut self, target: &'static str, wanted: Bound, measured: f64) {
        self.verdicts.push(Verdict {
            target,
            guest: self.result.to_string(),
            arm: self.arm.arm,
            wanted,
            measured: measured.is_finite().then_some(measured),
            met: wanted.holds(measured),
        });
    }

    fn full_exits(&mut self) {
        let rate = self.all.full_exits_per_second();
        if self.is(&["constant", "moderate", "skew"]) || self.is(&["fast"]) && self.in_time() {
            self.say("full exits/s", Bound::AtMost(0.0), rate);
        } else if self.is(&["fast"]) {
            let fixed = self.other("fixed").map(|all| all.full_exits_per_second());
            if let Some(fixed) = fixed.filter(|&fixed| fixed > 0.0) {
                self.say("full exits ÷ fixed", Bound::AtMost(0.02), rate / fixed);
            }
        }
    }

    fn passes(&mut self) {
        let small = self.result.ring_entries <= 1024;
        let most = match (self.busy(), small, self.in_time()) {
            (1, true, _) => 1.2,
            (1, false, true) => 1.1,
            (1, false, false) => 1.15,
            (2, ..) => 1.6,
            (8.., ..) => 1.3,
            _ => return,
        };
        let alone = self.is(&["trickle"]) && self.busy() == 1;
        if !alone && !self.is(&["constant", "moderate", "skew", "fast"]) {
            return;
        }
        if let Some(passes) = self.all.passes_by_minimum() {
            self.say("passes ÷ minimum", Bound::AtMost(most), passes);
        }
    }

    fn stall(&mut self) {
        if !self.is(&["fast"]) || self.busy() < 8 {
            return;
        }
        let qemu = self.other("qemu").map(|all| all.stall_ms_per_second());
        if let Some(qemu) = qemu.filter(|&qemu| qemu > 0.0) {
            let less = qemu / self.all.stall_ms_per_second();
            self.say("stall of qemu ÷ stall", Bound::AtLeast(100.0), less);
        }
    }

    fn progress(&mut self) {
        // What others took of the machine, they did not take evenly.
        let known = self.all.stores_per_cpu_second().is_some();
        let (names, speed): (_, fn(&Measured) -> f64) = match self.result.is_disturbed() && known {
            false => (PROGRESS, Measured::stores_per_second),
            true => (PROGRESS_OF_CPU, |all| {
                all.stores_per_cpu_second().unwrap_or_default()
            }),
        };
        let ours = speed(&self.all);
        let none = self.other("no-reaper").filter(|_| self.is(&["hot-set"]));
        if let Some(none) = none {
            self.say(names[0], Bound::AtLeast(0.95), ours / speed(&none));
        }
        let best = self.result.best(speed);
        if self.result.arms.len() > 1 && best > 0.0 {
            self.say(names[1], Bound::AtLeast(0.95), ours / best);
        }
    }

    fn idle(&mut self) {
        if self.is(&["idle"]) {
            let wakeups = self.all.wakeups_per_second();
            self.say("wake-ups/s", Bound::AtMost(4.0), wakeups);
            let percent = self.all.reaper_percent();
            self.say("reaper CPU %", Bound::AtMost(0.1), percent);
        }
    }

    fn overhead(&mut self) {
        const NAME: &str = "reaper CPU beyond passes %";
        let percent = self.all.overhead_percent();
        let fast = self.is(&["fast"]);
        if !fast && !self.is(&["constant", "moderate", "skew"]) {
            return;
        }
        if self.simulated && (64..=256).contains(&self.result.vcpus) {
            self.say(NAME, Bound::AtMost(1.0), percent);
        }
        // Else the reaper may share its core, and passes seem to take what vCPUs took.
        if self.result.vcpus > 1 {
            return;
        }
        if self.result.ring_entries == 4096 {
            let most = if fast { 0.7 } else { 0.15 };
            self.say(NAME, Bound::AtMost(most), percent);
        }
        if let Some(wakeups) = self.all.wakeups_per_pass() {
            self.say("wake-ups a pass", Bound::AtMost(3.0), wakeups);
        }
    }
}

impl Bound {
    pub fn holds(self, figure: f64) -> bool {
        match self {
            Self::AtMost(most) => figure <= most,
            Self::AtLeast(least) => figure >= least,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(0.0) => write!(f, "0"),
            Self::AtMost(most) => write!(f, "≤ {most}"),
            Self::AtLeast(least) => write!(f, "≥ {least}"),
        }
    }
}

fn as_text<S: serde::Serializer>(bound: &Bound, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(bound)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn measured() -> Measured {
        Measured {
            time: Duration::from_secs(1),
            passes: 110,
            minimum: 100.0,
            entries: 400_000,
            stores: 400_000,
            reaper_cpu: Duration::from_millis(20),
            pass_time: Duration::from_millis(19),
            wakeups: 220,
            reaper_passes: 110,
            ..Measured::default()
        }
    }

    fn result(workload: &str, vcpus: u32, arms: &[(&'static str, Measured)]) -> CellResult {
        let arm = |(name, measured): &(&'static str, Measured)| ArmResult {
            rounds: vec![measured.clone()],
            ..ArmResult::new(name)
        };
        CellResult {
            workload: workload.into(),
            vcpus,
            ring_entries: 4096,
            others: None,
            reset_load: None,
            arms: arms.iter().map(arm).collect(),
        }
    }

    /// Target, what was wanted, and whether it was met, as words.
    fn judged(result: CellResult, simulated: bool) -> Vec<String> {
        let verdicts = verdicts(&[result], simulated).into_iter();
        let met = |met| if met { "met" } else { "missed" };
        let words = verdicts.map(|v| format!("{} {}: {}", v.target, v.wanted, met(v.met)));
        words.collect()
    }

    #[test]
    fn one_full_exit_is_one_too_many() {
        let one = Measured {
            full_exits: 1,
            ..measured()
        };
        for (workload, all, fate) in [("constant", measured(), "met"), ("skew", one, "missed")] {
            let judged = judged(result(workload, 2, &[("adaptive", all)]), false);
            let wanted = format!("full exits/s 0: {fate}");
            assert!(judged.contains(&wanted), "{judged:?}");
        }
    }

    #[test]
    fn passes_depend_on_vcpus_rings_and_priority() {
        let most = |vcpus, arm, ring_entries| {
            let mut result = result("constant", vcpus, &[(arm, measured())]);
            result.ring_entries = ring_entries;
            let mut verdicts = verdicts(&[result], false).into_iter();
            let passes = verdicts.find(|verdict| verdict.target == "passes ÷ minimum");
            passes.map(|verdict| verdict.wanted)
        };
        let at_most = |most| Some(Bound::AtMost(most));
        assert_eq!(most(1, "adaptive", 4096), at_most(1.15));
        assert_eq!(most(1, "adaptive-fifo", 4096), at_most(1.1));
        assert_eq!(most(1, "adaptive-fifo", 1024), at_most(1.2));
        assert_eq!(most(2, "adaptive", 4096), at_most(1.6));
        assert_eq!(most(4, "adaptive", 4096), None);
        assert_eq!(most(8, "adaptive", 4096), at_most(1.3));
        assert_eq!(most(1, "fixed", 4096), None);
    }

    #[test]
    fn emulated_guests_are_measured_by_other_arms() {
        let fixed = Measured {
            full_exits: 100,
            stall: Duration::from_millis(50),
            ..measured()
        };
        let few = |full_exits| Measured {
            full_exits,
            stall: Duration::from_micros(500 * full_exits / 2),
            ..measured()
        };
        for (full_exits, fate) in [(2, "met"), (3, "missed")] {
            let arms = [("adaptive", few(full_exits)), ("fixed", fixed.clone())];
            let judged = judged(result("fast", 1, &arms), false);
            let wanted = format!("full exits ÷ fixed ≤ 0.02: {fate}");
            assert!(judged.contains(&wanted), "{judged:?}");
        }
        for (full_exits, met) in [(0, true), (2, true), (3, false)] {
            let arms = [("adaptive", few(full_exits)), ("qemu", fixed.clone())];
            let verdicts = verdicts(&[result("fast", 8, &arms)], false);
            let stall = verdicts
                .iter()
                .find(|v| v.target.starts_with("stall"))
                .unwrap();
            assert_eq!(stall.met, met, "{stall:?}");
            assert_eq!(stall.measured.is_none(), full_exits == 0);
        }
    }

    #[test]
    fn guests_must_not_slow_down() {
        let slow = Measured {
            stores: 379_000,
            ..measured()
        };
        let arms = [("adaptive", slow), ("no-reaper", measured())];
        let judged = judged(result("hot-set", 2, &arms), false);
        let wanted = ["stores ÷ without passes", "stores ÷ best arm"];
        assert_eq!(judged, wanted.map(|name| format!("{name} ≥ 0.95: missed")));
    }

    #[test]
    fn on_a_busy_machine_cpu_time_counts() {
        let cpu = |stores, ms| Measured {
            stores,
            vcpu_cpu: Duration::from_millis(ms),
            ..measured()
        };
        // Half the stores in half the time.
        let arms = [
            ("adaptive", cpu(200_000, 500)),
            ("fixed", cpu(400_000, 1000)),
        ];
        let mut result = result("bursts", 1, &arms);
        let progress = |result: &CellResult| judged(result.clone(), false);
        let quiet = ["stores ÷ best arm ≥ 0.95: missed"];
        assert_eq!(progress(&result), quiet);
        result.others = Some(0.02);
        assert_eq!(progress(&result), quiet);
        result.others = Some(0.4);
        let busy = ["stores a CPU second ÷ best arm ≥ 0.95: met"];
        assert_eq!(progress(&result), busy);
    }

    #[test]
    fn idle_guests_cost_next_to_nothing() {
        let idle = Measured {
            time: Duration::from_secs(1),
            wakeups: 5,
            reaper_cpu: Duration::from_micros(1000),
            ..Measured::default()
        };
        let judged = judged(result("idle", 2, &[("adaptive", idle)]), false);
        let wanted = ["wake-ups/s ≤ 4: missed", "reaper CPU % ≤ 0.1: met"];
        assert_eq!(judged, wanted);
    }

    #[test]
    fn overhead_counts_where_the_reaper_has_a_core() {
        let overhead = |workload, vcpus, simulated| {
            let result = result(workload, vcpus, &[("adaptive", measured())]);
            let judged = judged(result, simulated).into_iter();
            let overhead = judged.filter(|words| words.contains("beyond"));
            overhead.collect::<Vec<_>>()
        };
        let met = |most| [format!("reaper CPU beyond passes % ≤ {most}: met")];
        assert_eq!(overhead("constant", 1, false), met(0.15));
        assert_eq!(overhead("fast", 1, false), met(0.7));
        assert_eq!(overhead("constant", 8, false), [""; 0]);
        assert_eq!(overhead("constant", 256, true), met(1.0));
        assert_eq!(overhead("constant", 1024, true), [""; 0]);
    }

    #[test]
    fn nothing_is_wanted_where_nothing_helps() {
        let targets = |reset_load| {
            let mut result = result("constant", 256, &[("adaptive", measured())]);
            result.reset_load = reset_load;
            judged(result, true).len()
        };
        assert_eq!(targets(Some(0.1)), 3);
        assert_eq!(targets(Some(0.8)), 1);
    }

    #[test]
    fn overruns_are_no_figures() {
        let mut result = result("constant", 1, &[("adaptive", measured())]);
        result.arms[0].overruns = 1;
        assert_eq!(judged(result, false), [""; 0]);
    }
}
