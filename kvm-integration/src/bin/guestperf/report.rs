// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file that `--json` writes.
//!
//! One object:
//!
//! | key | holds |
//! |---|---|
//! | `schema` | 1: it changes when the meaning of a key does |
//! | `host` | `kvm`, `kernel`, `cores`, `cpu`: the machine that it ran on |
//! | `settings` | `repeat`, `quiet_ms`, `bandwidth_mib` (a second; 0: no limit), `downtime_ms`, `max_rounds` |
//! | `missed_pages` | of all migrations |
//! | `cells` | for each guest `vcpus`, `memory_mib`, `stress_mib`, `ring_entries`, `others` (the share of the machine's CPU time that others took, or null), and `arms` |
//! | `verdicts` | how `adaptive` compares with the best arm, and with the best that has rings |
//!
//! An arm has its name, `arm`, `missed_pages`, and `migrations`. A migration has `figures`, `rounds`,
//! `phases` and `samples`, all with the keys of the library's `guestperf::result`, where units are
//! said.

use kvm_integration::Host;
use kvm_integration::guestperf::{ArmResult, CellResult};
use serde_json::{Value, json};

use crate::plan::Plan;
use crate::verdict::Verdict;

/// Pages that any migration missed.
pub fn missed_pages(results: &[CellResult]) -> u64 {
    let arms = results.iter().flat_map(|cell| &cell.arms);
    arms.map(ArmResult::missed_pages).sum()
}

/// All there is to say.
pub fn json(host: &Host, plan: &Plan, results: &[CellResult], verdicts: &[Verdict]) -> Value {
    let limits = &plan.limits;
    json!({
        // Changes when the meaning of a key does.
        "schema": 1,
        "host": host,
        "settings": {
            "repeat": plan.repeat,
            "quiet_ms": plan.quiet.as_millis() as u64,
            "bandwidth_mib": limits.bandwidth_mib,
            "downtime_ms": limits.downtime.as_millis() as u64,
            "max_rounds": limits.max_rounds,
        },
        "missed_pages": missed_pages(results),
        "cells": results.iter().map(cell).collect::<Vec<_>>(),
        "verdicts": verdicts,
    })
}

fn cell(result: &CellResult) -> Value {
    let arm = |arm: &ArmResult| {
        json!({
            "arm": arm.arm,
            "missed_pages": arm.missed_pages(),
            "migrations": arm.migrations,
        })
    };
    let cell = &result.cell;
    json!({
        "vcpus": cell.vcpus,
        "memory_mib": cell.memory_mib,
        "stress_mib": cell.stress_mib,
        "ring_entries": cell.ring_entries,
        "others": result.others,
        "arms": result.arms.iter().map(arm).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::tests::parse;
    use crate::tests::{cell_result, figures};
    use crate::verdict::verdicts;

    /// Programs that read these files rely on every key.
    #[test]
    fn the_shape_is_the_documented_one() {
        let results = [cell_result(&[
            ("bitmap", &[figures()]),
            ("adaptive", &[figures()]),
        ])];
        let plan = Plan::new(&parse("--quick --repeat 5").unwrap()).unwrap();
        let mut value = super::json(&Host::detect(), &plan, &results, &verdicts(&results));
        let host = value["host"].take();
        assert!(host["kvm"].is_string() && host["kernel"].is_string() && host["cpu"].is_string());
        assert!(host["cores"].is_u64());
        let settings = json!({
            "repeat": 5, "quiet_ms": 800, "bandwidth_mib": 500, "downtime_ms": 300, "max_rounds": 2,
        });
        assert_eq!(value["settings"], settings);
        assert_eq!(
            (&value["schema"], &value["missed_pages"]),
            (&json!(1), &json!(0))
        );
        let cell = &value["cells"][0];
        assert_eq!(cell["vcpus"], 2);
        assert_eq!(cell["others"], 0.25);
        let figures = json!({
            "quiet_ms_per_gb": 50.0, "median_ms_per_gb": 400.0, "worst_ms_per_gb": 900.0,
            "drop_seconds": 1.5, "longest_stall_ms": 7.0, "full_exits": 12, "full_exit_ms": 3.0,
            "resets": 5, "entries": 1000, "guest_pages_per_second": 1e6, "reaper_cpu_ms": 20.0,
            "pages_sent": 30_000, "downtime_ms": 250.0, "total_seconds": 2.8, "converged": true,
            "missed_pages": 0,
        });
        let arm = json!({
            "arm": "adaptive",
            "missed_pages": 0,
            "migrations": [{
                "figures": figures,
                "rounds": [{"pages": 7, "running": true, "begin": 1.0, "seconds": 0.5}],
                "phases": {"begin": 1.0, "stop": 2.0, "resume": 2.5, "end": 3.5},
                "samples": [{"at": 0.5, "ms_per_gb": null, "full_exits": 0, "delay_ms": 2.0}],
            }],
        });
        assert_eq!(cell["arms"][1], arm);
        let verdict = &value["verdicts"][0];
        assert_eq!(verdict["measure"], "drop s");
        let best = json!({"arm": "bitmap", "value": 1.5, "reached": true});
        assert_eq!(verdict["best"], best);
        assert_eq!(verdict["ring_entries"], 4096);
    }
}
