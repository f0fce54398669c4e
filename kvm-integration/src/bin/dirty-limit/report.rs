// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What came of it: a line for each limit for people, an object for programs.

use kvm_integration::Host;
use serde::Serialize;

use crate::measure::Measured;
use crate::options::Options;

/// All there is to say, with the names of the JSON object.
#[derive(Debug, Serialize)]
pub struct Report {
    host: String,
    vcpus: u32,
    memory_mib: u64,
    ring_entries: u32,
    pacing: &'static str,
    tolerance_percent: u64,
    /// Whether each limit held.
    pub holds: bool,
    runs: Vec<Run>,
}

#[derive(Debug, Serialize)]
struct Run {
    /// Of each vCPU, as are those below that say so.
    limit: Option<u64>,
    seconds: f64,
    /// By the guest's own count; a vCPU.
    written_per_second: f64,
    deviation_percent: Option<f64>,
    /// A vCPU.
    synced_per_second: f64,
    /// Of each vCPU.
    logged_per_second: Vec<f64>,
    asleep_percent: f64,
    longest_stop_ms: f64,
    full_exits: u64,
}

impl Report {
    /// Nothing yet.
    pub fn new(options: &Options) -> Self {
        Self {
            host: Host::detect().to_string(),
            vcpus: options.vcpus,
            memory_mib: options.memory_mib,
            ring_entries: options.ring_entries.get(),
            pacing: match options.at_full_rings {
                true => "none, at full rings",
                false => options.pacing.into(),
            },
            tolerance_percent: options.tolerance,
            holds: true,
            runs: Vec::new(),
        }
    }

    /// What is above the lines.
    pub fn head(&self) -> String {
        format!(
            "{}; {} vCPUs, {} MiB, rings of {}, pacing {}\n{:>9} {:>12} {:>9} {:>12} {:>12} {:>9} {:>12} {:>10}",
            self.host,
            self.vcpus,
            self.memory_mib,
            self.ring_entries,
            self.pacing,
            "limit",
            "pages/s",
            "off by",
            "synced/s",
            "logged/s",
            "asleep",
            "longest stop",
            "full exits",
        )
    }

    /// One line more, all of it a vCPU.
    pub fn add(&mut self, measured: &Measured) -> String {
        let run = Run::new(measured, self.vcpus);
        let tolerance = self.tolerance_percent as f64;
        self.holds &= run
            .deviation_percent
            .is_none_or(|percent| percent.abs() <= tolerance);
        let logged: f64 = run.logged_per_second.iter().sum();
        let line = format!(
            "{:>9} {:>12.0} {:>9} {:>12.0} {:>12.0} {:>7.1} % {:>9.1} ms {:>10}",
            run.limit.map_or("none".into(), |limit| limit.to_string()),
            run.written_per_second,
            run.deviation_percent
                .map_or("-".into(), |percent| format!("{percent:+.2} %")),
            run.synced_per_second,
            logged / f64::from(self.vcpus),
            run.asleep_percent,
            run.longest_stop_ms,
            run.full_exits,
        );
        self.runs.push(run);
        line
    }
}

impl Run {
    fn new(measured: &Measured, vcpus: u32) -> Self {
        let seconds = measured.time.as_secs_f64();
        let each = |count: u64| count as f64 / seconds / f64::from(vcpus);
        let limit = measured.limit.map(u64::from);
        let written = each(measured.stores);
        Self {
            limit,
            seconds,
            written_per_second: written,
            deviation_percent: limit.map(|limit| (written / limit as f64 - 1.0) * 100.0),
            synced_per_second: each(measured.pages),
            logged_per_second: measured
                .logged
                .iter()
                .map(|&count| count as f64 / seconds)
                .collect(),
            asleep_percent: measured.asleep.as_secs_f64() / seconds / f64::from(vcpus) * 100.0,
            longest_stop_ms: measured.longest_stop.as_secs_f64() * 1e3,
            full_exits: measured.full_exits,
        }
    }
}
