//! Tables: how arms do as VMs grow.

use super::{Outcome, Scenario, run};
use crate::lab::Arm;

/// VMs that are large, in vCPUs.
pub const SIZES: [usize; 3] = [64, 256, 1024];

/// How one arm did in a VM of one size.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The arm's name.
    pub arm: &'static str,
    /// The VM's size.
    pub vcpus: usize,
    /// What came of it.
    pub outcome: Outcome,
}

impl Row {
    /// What is in [`cells`](Self::cells).
    pub const HEADER: [&'static str; 9] = [
        "vCPUs",
        "arm",
        "full exits/s",
        "stall, ms/s",
        "passes / minimum",
        "stores, M/s",
        "reaper CPU, %",
        "looks, % CPU",
        "wake-ups/s",
    ];

    /// Runs one arm.
    pub fn of(scenario: &Scenario, arm: &Arm) -> Self {
        Self {
            arm: arm.name,
            vcpus: scenario.vcpus,
            outcome: run(scenario, arm),
        }
    }

    /// The row of a table, in words.
    pub fn cells(&self) -> [String; 9] {
        let measured = &self.outcome.measured;
        let passes = measured.passes_by_minimum();
        [
            self.vcpus.to_string(),
            self.arm.to_string(),
            format!("{:.1}", measured.full_exits_per_second()),
            format!("{:.2}", measured.stall_ms_per_second()),
            passes.map_or("-".into(), |passes| format!("{passes:.2}")),
            format!("{:.2}", measured.stores_per_second() / 1e6),
            format!("{:.2}", measured.reaper_percent()),
            format!("{:.2}", measured.overhead_percent()),
            format!("{:.1}", measured.wakeups_per_second()),
        ]
    }
}

/// Runs each arm in VMs of each size, which are otherwise as `scenario` says: one row at a time, as
/// it is asked for.
pub fn rows<'a>(
    scenario: &'a Scenario,
    sizes: &'a [usize],
    arms: &'a [Arm],
) -> impl Iterator<Item = Row> + 'a {
    let pairs = sizes
        .iter()
        .flat_map(move |&vcpus| arms.iter().map(move |arm| (vcpus, arm)));
    pairs.map(move |(vcpus, arm)| {
        let scenario = Scenario {
            vcpus,
            ..scenario.clone()
        };
        Row::of(&scenario, arm)
    })
}
