// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The simulated run.

use std::collections::VecDeque;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kvm_integration::cli::interrupt::go_on;
use kvm_integration::cli::options::or;
use kvm_integration::lab::sim::{Guest, Load, Outcome, Recording, Scenario, constants, run};
use kvm_integration::lab::{Arm, ArmResult, CellResult, Sample};

use crate::options::Options;
use crate::run::Report;

/// VMs that real hosts are too small for.
const VCPUS: [u32; 3] = [64, 256, 1024];
const RING_ENTRIES: u64 = 4096;
/// What is run by default.
const WORKLOADS: [&str; 9] = [
    MODERATE, "constant", "trickle", "bursts", "sliced", "skew", "hot-set", "idle", "fast",
];
/// As `constant`, but of a guest that resets can keep up with however many vCPUs it has.
const MODERATE: &str = "moderate";
/// Time that resets take of every second under that load.
const MODERATE_LOAD: f64 = 0.125;
/// Between two samples, for a picture.
const SAMPLE: Duration = Duration::from_millis(2);

/// One guest.
#[derive(Debug, Clone)]
struct SimCell {
    workload: String,
    scenario: Scenario,
}

/// All that is simulated.
#[derive(Debug)]
pub struct SimPlan {
    cells: Vec<SimCell>,
    arms: Vec<Arm>,
    /// What is drawn of each guest, from its start.
    drawn: Option<Duration>,
}

impl SimPlan {
    /// What is asked for.
    pub fn new(options: &Options) -> Result<Self> {
        let scenarios = |vcpus: &[u32], workload: &str, load: &dyn Fn(&Scenario) -> Load| {
            let rings = options.ring_entries.iter().map(|size| size.get().into());
            let rings = or(&rings.collect::<Vec<_>>(), &[RING_ENTRIES]);
            let pairs = vcpus
                .iter()
                .flat_map(|&v| rings.iter().map(move |&r| (v, r)));
            let cells = pairs.map(|(vcpus, ring_entries)| {
                let mut scenario = Scenario::new(vcpus as usize, Load::Idle);
                scenario = scenario.with_rings(ring_entries);
                scenario.time = Duration::from_secs(options.seconds);
                scenario.seed = options.seed;
                if workload.starts_with("fast") {
                    scenario.guest = Guest::FAST;
                }
                scenario.load = load(&scenario);
                let workload = workload.to_string();
                SimCell { workload, scenario }
            });
            cells.collect::<Vec<_>>()
        };
        let cells = match &options.trace {
            Some(path) => {
                let recording = recording(path)?;
                let vcpus = recording.vcpus() as u32;
                scenarios(&[vcpus], "recorded", &|_| Load::Recorded(recording.clone()))
            }
            None => {
                let vcpus = &or(&options.vcpus, &VCPUS);
                let mut cells = Vec::new();
                for name in or(&options.workloads, &WORKLOADS.map(String::from)) {
                    let known = load_name(&name).with_context(|| {
                        let names = Load::NAMES.join(", ");
                        format!(
                            "no workload is called `{name}`: choose one of {names}, moderate, fast, \
                             fast-bursts"
                        )
                    })?;
                    cells.extend(scenarios(vcpus, &name, &|scenario| {
                        let named = Load::named(known, &scenario.guest, scenario.soft_limit);
                        match named.expect("the name is one of those that it knows") {
                            Load::Constant { rate } if name == MODERATE => Load::Constant {
                                rate: rate.min(moderate_rate(scenario)),
                            },
                            load => load,
                        }
                    }));
                }
                cells
            }
        };
        Ok(Self {
            cells,
            arms: match &options.arms[..] {
                [] => Arm::ALL.to_vec(),
                some => some.to_vec(),
            },
            drawn: options.html.is_some().then_some(Duration::from_secs(3)),
        })
    }
}

impl SimCell {
    /// Time that resets take of every second if no vCPU ever waits; `None` of a load that changes.
    fn reset_load(&self) -> Option<f64> {
        let scenario = &self.scenario;
        let (rate, busy) = match scenario.load {
            Load::Constant { rate } => (rate, scenario.vcpus),
            Load::Skew { rate } => (rate, 1),
            _ => return None,
        };
        Some(rate * busy as f64 * entry_seconds(scenario))
    }
}

/// Entries per second of each vCPU with which resets take so much of the time.
fn moderate_rate(scenario: &Scenario) -> f64 {
    MODERATE_LOAD / entry_seconds(scenario) / scenario.vcpus as f64
}

/// What an entry takes in a pass over many.
fn entry_seconds(scenario: &Scenario) -> f64 {
    let costs = &scenario.costs;
    (costs.reset_entry + costs.harvest_entry) as f64 * 1e-9
}

/// What the simulation calls a workload.
fn load_name(name: &str) -> Option<&'static str> {
    let name = match name {
        "fast" | MODERATE => "constant",
        "fast-bursts" => "bursts",
        name => name,
    };
    Load::NAMES.into_iter().find(|&known| known == name)
}

fn recording(path: &Path) -> Result<Recording> {
    let file = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("{file} could not be read"))?;
    let recording: Result<Recording> = text.parse();
    let recording = recording.with_context(|| format!("{file} is no recording"))?;
    ensure!(recording.vcpus() > 0, "{file} has no vCPU in it");
    Ok(recording)
}

/// Runs the plan, and reports guest by guest.
pub fn simulate(plan: &SimPlan, interrupted: &AtomicBool, report: &mut Report<'_>) -> Result<()> {
    let guests = plan.cells.len();
    for (number, cell) in plan.cells.iter().enumerate() {
        let arms = plan.arms.iter();
        let mut result = CellResult {
            workload: cell.workload.clone(),
            vcpus: cell.scenario.vcpus as u32,
            ring_entries: cell.scenario.ring_entries as u32,
            arms: arms.map(|arm| ArmResult::new(arm.name)).collect(),
            others: None,
            reset_load: cell.reset_load(),
        };
        eprintln!("{}/{guests}: {result}", number + 1);
        let outcomes = start(plan, cell);
        for _ in &plan.arms {
            let (place, outcome) = next(&outcomes, interrupted)?;
            let arm = &mut result.arms[place];
            if let Some(&source) = outcome.failures.first() {
                return Err(source)
                    .with_context(|| format!("the policy of arm {} failed", arm.arm));
            }
            arm.rounds.push(outcome.measured);
            arm.samples = outcome.samples;
        }
        report(result)?;
    }
    Ok(())
}

/// What each number of adaptive is good for.
pub fn constants(options: &Options) -> impl Iterator<Item = constants::Row> {
    constants::rows(options.seed, Duration::from_secs(options.seconds))
}

/// Simulates the arms, as many at a time as there are cores. The threads are not waited for: a long
/// simulation can't be interrupted, but left behind.
fn start(plan: &SimPlan, cell: &SimCell) -> Receiver<(usize, Outcome)> {
    let (done, outcomes) = mpsc::channel();
    let jobs: VecDeque<_> = plan.arms.iter().copied().enumerate().collect();
    let jobs = Arc::new(Mutex::new(jobs));
    let workers = thread::available_parallelism().map_or(1, usize::from);
    for _ in 0..workers.min(plan.arms.len()) {
        let (done, jobs, scenario) = (done.clone(), Arc::clone(&jobs), cell.scenario.clone());
        let drawn = plan.drawn;
        thread::spawn(move || {
            let next = || {
                jobs.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .pop_front()
            };
            while let Some((place, arm)) = next() {
                let mut outcome = run(&scenario, &arm);
                if let Some(drawn) = drawn {
                    outcome.samples = samples(&scenario, &arm, drawn);
                }
                if done.send((place, outcome)).is_err() {
                    return;
                }
            }
        });
    }
    outcomes
}

/// The first moments once more, in detail.
fn samples(scenario: &Scenario, arm: &Arm, time: Duration) -> Vec<Sample> {
    let scenario = Scenario {
        warm_up: Duration::ZERO,
        time,
        sample_every: Some(SAMPLE),
        ..scenario.clone()
    };
    run(&scenario, arm).samples
}

fn next(
    outcomes: &Receiver<(usize, Outcome)>,
    interrupted: &AtomicBool,
) -> Result<(usize, Outcome)> {
    loop {
        go_on(interrupted)?;
        match outcomes.recv_timeout(Duration::from_millis(50)) {
            Ok(outcome) => return Ok(outcome),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => bail!("a simulation has ended without a result"),
        }
    }
}
