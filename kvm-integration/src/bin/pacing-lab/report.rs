// SPDX-License-Identifier: Apache-2.0 OR MIT
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

use std::time::Duration;

use kvm_integration::Host;
use kvm_integration::lab::{ArmResult, CellResult, Measured};
use serde_json::{Value, json};

use crate::options::Options;
use crate::run::Skipped;
use crate::targets::Verdict;

/// All there is to say. `slice_ms` is what turns were to take.
pub fn json(
    options: &Options,
    slice_ms: u64,
    results: &[CellResult],
    skipped: &[Skipped],
    targets: &[Verdict],
) -> Value {
    let (real, simulated) = (!options.sim, options.sim);
    json!({
        // Changes when the meaning of a key does.
        "schema": 1,
        "simulated": simulated,
        "host": Host::detect(),
        "settings": {
            "rounds": real.then_some(options.rounds),
            "slice_ms": real.then_some(slice_ms),
            "seconds": simulated.then_some(options.seconds),
            "seed": simulated.then_some(options.seed),
        },
        "guests": results.iter().map(guest).collect::<Vec<_>>(),
        "skipped": skipped,
        "targets": targets,
    })
}

fn guest(result: &CellResult) -> Value {
    json!({
        "workload": result.workload,
        "vcpus": result.vcpus,
        "ring_entries": result.ring_entries,
        "others": result.others,
        "reset_load": result.reset_load,
        "arms": result.arms.iter().map(arm).collect::<Vec<_>>(),
    })
}

fn arm(result: &ArmResult) -> Value {
    json!({
        "arm": result.arm,
        "overruns": result.overruns,
        "saturated": result.saturated,
        "total": figures(&result.total()),
        "rounds": result.rounds.iter().map(figures).collect::<Vec<_>>(),
    })
}

fn figures(measured: &Measured) -> Value {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    json!({
        "seconds": measured.time.as_secs_f64(),
        "full_exits": measured.full_exits,
        "stall_ms": ms(measured.stall),
        "passes": measured.passes,
        "minimum_passes": measured.minimum,
        "entries": measured.entries,
        "stores": measured.stores,
        "vcpu_cpu_ms": ms(measured.vcpu_cpu),
        "reaper_cpu_ms": ms(measured.reaper_cpu),
        "pass_ms": ms(measured.pass_time),
        "wakeups": measured.wakeups,
        "reaper_passes": measured.reaper_passes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::tests::parse;
    use crate::targets::Bound;

    /// Programs that read these files rely on every key.
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
            arm: "adaptive-fifo",
            why: "not allowed".into(),
        }];
        let targets = [Verdict {
            target: "wake-ups/s",
            guest: "idle, 1 vCPU, rings of 256".into(),
            arm: "adaptive",
            wanted: Bound::AtMost(4.0),
            measured: None,
            met: true,
        }];
        let options = parse("--rounds 3").unwrap();
        let mut value = super::json(&options, 700, &results, &skipped, &targets);
        let host = value["host"].take();
        assert!(host["kvm"].is_string() && host["kernel"].is_string() && host["cpu"].is_string());
        assert!(host["cores"].is_u64());
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
            "skipped": [{"arm": "adaptive-fifo", "why": "not allowed"}],
            "targets": [{
                "target": "wake-ups/s", "guest": "idle, 1 vCPU, rings of 256", "arm": "adaptive",
                "wanted": "≤ 4", "measured": null, "met": true,
            }],
        });
        assert_eq!(value, wanted);
    }

    #[test]
    fn simulated_runs_have_settings_of_their_own() {
        let options = parse("--sim --seconds 5 --seed 7").unwrap();
        let value = super::json(&options, 2000, &[], &[], &[]);
        let wanted = json!({"rounds": null, "slice_ms": null, "seconds": 5, "seed": 7});
        assert_eq!(value["settings"], wanted);
        assert_eq!(value["simulated"], true);
    }
}
