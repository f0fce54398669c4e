//! The file that `--json` writes.
//!
//! One object:
//!
//! | key | holds |
//! |---|---|
//! | `schema` | 1: it changes when the meaning of a key does |
//! | `simulated` | whether the guests are simulated |
//! | `host` | `kvm`, `kernel`, `cores`, `cpu`: the machine that it ran on |
//! | `settings` | real: `rounds`, `slice_ms`; simulated: `seconds`, `seed`; the others are null |
//! | `guests` | for each guest `workload`, `vcpus`, `ring_entries`, `arms`, and `others` and `reset_load` |
//! | `skipped` | `arm` and `why`: arms that the machine refuses |
//! | `targets` | `target`, `guest`, `arm`, `wanted`, `measured` (null: beyond all bounds), `met` |
//!
//! `others` is the share of the machine's CPU time that others took meanwhile; `reset_load`, of a
//! simulated guest, the share of time that resets would take if no vCPU ever waited. An arm has its
//! name, `arm`; `overruns`, with which its figures mean nothing; `saturated`, turns
//! in which it could not keep up; `total`, and `rounds`: the same of each turn. These hold
//!
//! | key | holds |
//! |---|---|
//! | `seconds` | how long it was measured |
//! | `full_exits`, `stall_ms` | exits for a full ring, and time that vCPUs spent on them |
//! | `passes`, `minimum_passes` | the reaper's and those of full exits, and the fewest that could have done |
//! | `entries` | entries harvested |
//! | `stores` | page stores of the guest |
//! | `vcpu_cpu_ms` | CPU time of its vCPUs' threads; 0 of a simulated guest |
//! | `reaper_cpu_ms`, `pass_ms` | CPU time of the reaper's thread; time that its passes took |
//! | `wakeups`, `reaper_passes` | of the reaper |

use kvm_integration::Host;
use kvm_integration::lab::{ArmResult, CellResult, Measured};
use serde::Serialize;

use crate::options::Options;
use crate::run::Skipped;
use crate::targets::Verdict;

/// Changes when the meaning of a key does.
const SCHEMA: u32 = 1;

/// All there is to say.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    schema: u32,
    simulated: bool,
    host: HostFacts,
    settings: Settings,
    guests: Vec<Guest>,
    skipped: &'a [Skipped],
    targets: &'a [Verdict],
}

#[derive(Debug, Serialize)]
struct HostFacts {
    kvm: String,
    kernel: String,
    cores: usize,
    cpu: String,
}

#[derive(Debug, Serialize)]
struct Settings {
    rounds: Option<u32>,
    slice_ms: Option<u64>,
    seconds: Option<u64>,
    seed: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Guest {
    workload: String,
    vcpus: u32,
    ring_entries: u32,
    others: Option<f64>,
    reset_load: Option<f64>,
    arms: Vec<Arm>,
}

#[derive(Debug, Serialize)]
struct Arm {
    arm: &'static str,
    overruns: u64,
    saturated: u32,
    total: Figures,
    rounds: Vec<Figures>,
}

#[derive(Debug, Serialize)]
struct Figures {
    seconds: f64,
    full_exits: u64,
    stall_ms: f64,
    passes: u64,
    minimum_passes: f64,
    entries: u64,
    stores: u64,
    vcpu_cpu_ms: f64,
    reaper_cpu_ms: f64,
    pass_ms: f64,
    wakeups: u64,
    reaper_passes: u64,
}

impl<'a> Report<'a> {
    /// Sums up. `slice_ms` is what turns were to take.
    pub fn new(
        options: &Options,
        slice_ms: u64,
        results: &[CellResult],
        skipped: &'a [Skipped],
        targets: &'a [Verdict],
    ) -> Self {
        let host = Host::detect();
        let (real, simulated) = (!options.sim, options.sim);
        Self {
            schema: SCHEMA,
            simulated,
            host: HostFacts {
                kvm: host.kvm_kind,
                kernel: host.kernel,
                cores: host.cores,
                cpu: host.cpu,
            },
            settings: Settings {
                rounds: real.then_some(options.rounds),
                slice_ms: real.then_some(slice_ms),
                seconds: simulated.then_some(options.seconds),
                seed: simulated.then_some(options.seed),
            },
            guests: results.iter().map(Guest::new).collect(),
            skipped,
            targets,
        }
    }

    /// As text, with an end of line.
    ///
    /// # Errors
    /// None that is known of.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self).map(|text| text + "\n")
    }
}

impl Guest {
    fn new(result: &CellResult) -> Self {
        Self {
            workload: result.workload.clone(),
            vcpus: result.vcpus,
            ring_entries: result.ring_entries,
            others: result.others,
            reset_load: result.reset_load,
            arms: result.arms.iter().map(Arm::new).collect(),
        }
    }
}

impl Arm {
    fn new(result: &ArmResult) -> Self {
        Self {
            arm: result.arm,
            overruns: result.overruns,
            saturated: result.saturated,
            total: Figures::new(&result.total()),
            rounds: result.rounds.iter().map(Figures::new).collect(),
        }
    }
}

impl Figures {
    fn new(measured: &Measured) -> Self {
        let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        Self {
            seconds: measured.time.as_secs_f64(),
            full_exits: measured.full_exits,
            stall_ms: ms(measured.stall),
            passes: measured.passes,
            minimum_passes: measured.minimum,
            entries: measured.entries,
            stores: measured.stores,
            vcpu_cpu_ms: ms(measured.vcpu_cpu),
            reaper_cpu_ms: ms(measured.reaper_cpu),
            pass_ms: ms(measured.pass_time),
            wakeups: measured.wakeups,
            reaper_passes: measured.reaper_passes,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::options::tests::parse;
    use crate::targets::Bound;

    /// Whoever reads these files relies on every key.
    #[test]
    fn the_shape_is_the_documented_one() {
        let measured = Measured {
            time: Duration::from_millis(1500),
            full_exits: 1,
            stall: Duration::from_micros(2500),
            passes: 3,
            minimum: 2.5,
            entries: 4,
            stores: 5,
            vcpu_cpu: Duration::from_millis(11),
            reaper_cpu: Duration::from_millis(6),
            pass_time: Duration::from_millis(7),
            wakeups: 8,
            reaper_passes: 9,
        };
        let results = [CellResult {
            workload: "ramp".into(),
            vcpus: 2,
            ring_entries: 1024,
            others: Some(0.25),
            reset_load: None,
            arms: vec![ArmResult {
                rounds: vec![measured],
                overruns: 10,
                saturated: 1,
                ..ArmResult::new("poll")
            }],
        }];
        let skipped = [Skipped {
            arm: "look-first-fifo",
            why: "not allowed".into(),
        }];
        let targets = [Verdict {
            target: "wake-ups/s",
            guest: "idle, 1 vCPU, rings of 256".into(),
            arm: "look-first",
            wanted: Bound::AtMost(4.0),
            measured: None,
            met: true,
        }];
        let options = parse("--rounds 3").unwrap();
        let report = Report::new(&options, 700, &results, &skipped, &targets);
        let mut value: Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        let host = value["host"].take();
        for (key, is) in [
            ("kvm", host["kvm"].is_string()),
            ("kernel", host["kernel"].is_string()),
            ("cores", host["cores"].is_u64()),
            ("cpu", host["cpu"].is_string()),
        ] {
            assert!(is, "{key}: {host}");
        }
        let figures = json!({
            "seconds": 1.5, "full_exits": 1, "stall_ms": 2.5, "passes": 3, "minimum_passes": 2.5,
            "entries": 4, "stores": 5, "vcpu_cpu_ms": 11.0, "reaper_cpu_ms": 6.0, "pass_ms": 7.0,
            "wakeups": 8,
            "reaper_passes": 9,
        });
        let wanted = json!({
            "schema": 1,
            "simulated": false,
            "host": null,
            "settings": {"rounds": 3, "slice_ms": 700, "seconds": null, "seed": null},
            "guests": [{
                "workload": "ramp", "vcpus": 2, "ring_entries": 1024,
                "others": 0.25, "reset_load": null,
                "arms": [{
                    "arm": "poll", "overruns": 10, "saturated": 1,
                    "total": figures, "rounds": [figures],
                }],
            }],
            "skipped": [{"arm": "look-first-fifo", "why": "not allowed"}],
            "targets": [{
                "target": "wake-ups/s", "guest": "idle, 1 vCPU, rings of 256", "arm": "look-first",
                "wanted": "≤ 4", "measured": null, "met": true,
            }],
        });
        assert_eq!(value, wanted);
    }

    #[test]
    fn simulated_runs_have_settings_of_their_own() {
        let options = parse("--sim --seconds 5 --seed 7").unwrap();
        let report = Report::new(&options, 2000, &[], &[], &[]);
        let value = serde_json::to_value(&report).unwrap();
        let wanted = json!({"rounds": null, "slice_ms": null, "seconds": 5, "seed": 7});
        assert_eq!(value["settings"], wanted);
        assert_eq!(value["simulated"], true);
    }
}
