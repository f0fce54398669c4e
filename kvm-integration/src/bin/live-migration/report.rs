//! What came of it: a table for people, an object for programs.

use std::fmt::Write;
use std::time::Duration;

use kvm_dirty_ring::{DirtyLog, Mode};
use kvm_integration::Host;
use kvm_integration::migration::{Outcome, Round, mib};
use serde::Serialize;

use crate::options::Options;

/// All there is to say, with the names of the JSON object.
#[derive(Debug, Serialize)]
pub struct Report {
    backend: &'static str,
    mode: String,
    host: String,
    vcpus: u32,
    memory_mib: u64,
    ring_entries: u32,
    workload: &'static str,
    pacing: &'static str,
    seed: u64,
    write_rate: u64,
    bandwidth_mib: u64,
    max_rounds: u32,
    downtime_limit_ms: u64,
    converge: bool,
    rounds: usize,
    converged: bool,
    pages_total: u64,
    pages_sent: u64,
    ring_full_exits: u64,
    ring_full_ms: f64,
    limited_ms: f64,
    resets: u64,
    short_resets: u64,
    overruns: u64,
    rearms: u32,
    entries_harvested: u64,
    guest_stores: u64,
    stopping_ms: f64,
    downtime_ms: f64,
    total_ms: f64,
    mismatched_pages: u64,
    per_round: Vec<RoundReport>,
}

#[derive(Debug, Serialize)]
struct RoundReport {
    pages: u64,
    guest_running: bool,
    sync_ms: f64,
    send_ms: f64,
    mib_per_second: Option<f64>,
    dirty_pages_per_second: Option<f64>,
    /// What each vCPU was allowed to dirty.
    limit_per_second: Option<u64>,
}

impl Report {
    /// Sums up.
    pub fn new(
        options: &Options,
        backend: &'static str,
        outcome: &Outcome,
        log: &DirtyLog,
    ) -> Self {
        let stats = log.stats();
        let stall: u64 = stats.vcpus.iter().map(|vcpu| vcpu.stall_ns).sum();
        let limited: u64 = stats.vcpus.iter().map(|vcpu| vcpu.limited_ns).sum();
        Self {
            backend,
            mode: log.mode().to_string(),
            host: Host::detect().to_string(),
            vcpus: options.vcpus,
            memory_mib: options.memory_mib,
            ring_entries: options.ring_entries.get(),
            workload: options.workload.name(),
            pacing: options.pacing.name(),
            seed: options.seed,
            write_rate: options.write_rate,
            bandwidth_mib: options.bandwidth_mib,
            max_rounds: options.max_rounds,
            downtime_limit_ms: options.downtime_ms,
            converge: options.converge,
            rounds: outcome.rounds.len(),
            converged: outcome.converged,
            pages_total: outcome.pages_total,
            pages_sent: outcome.pages_sent(),
            ring_full_exits: stats.full_exits(),
            ring_full_ms: ms(Duration::from_nanos(stall)),
            limited_ms: ms(Duration::from_nanos(limited)),
            resets: stats.resets,
            short_resets: stats.short_resets,
            overruns: stats.overruns,
            rearms: outcome.rearms,
            entries_harvested: stats.entries,
            guest_stores: outcome.stores,
            stopping_ms: ms(outcome.stopping),
            downtime_ms: ms(outcome.downtime),
            total_ms: ms(outcome.total),
            mismatched_pages: outcome.mismatched_pages,
            per_round: outcome.rounds.iter().map(RoundReport::new).collect(),
        }
    }

    /// One line of JSON.
    ///
    /// # Errors
    /// None that is known of.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }

    /// Several lines, without the last line's end.
    pub fn table(&self, outcome: &Outcome) -> String {
        let mut text = String::new();
        self.write_table(outcome, &mut text)
            .expect("a String takes all that is written to it");
        text
    }

    /// How the guest was limited.
    fn limits(&self) -> String {
        let mut limits: Vec<(usize, u64)> = Vec::new();
        for (number, round) in self.per_round.iter().enumerate() {
            match round.limit_per_second {
                Some(limit) if limits.last().is_none_or(|last| last.1 != limit) => {
                    limits.push((number, limit));
                }
                _ => {}
            }
        }
        if limits.is_empty() {
            return "none was needed".into();
        }
        let tell = |(number, limit): &(usize, u64)| {
            format!("{} pages/s a vCPU from round {number} on", grouped(*limit))
        };
        let limits: Vec<_> = limits.iter().map(tell).collect();
        format!(
            "{}; {:.1} ms of vCPU time asleep",
            limits.join(", "),
            self.limited_ms
        )
    }

    fn write_table(&self, outcome: &Outcome, out: &mut String) -> std::fmt::Result {
        let limit = |limit: u64, unit| match limit {
            0 => "as fast as it goes".to_string(),
            limit => format!("{} {unit}", grouped(limit)),
        };
        writeln!(out, "{}", self.host)?;
        writeln!(
            out,
            "{} vCPUs, {} MiB in two slots, {}, {}; {} ({}), link {}, seed {}",
            self.vcpus,
            grouped(self.memory_mib),
            match self.mode == Mode::Bitmap.to_string() {
                true => self.mode.clone(),
                false => format!("{} of {}", self.mode, grouped(self.ring_entries.into())),
            },
            self.pacing,
            self.workload,
            limit(self.write_rate, "stores/s"),
            limit(self.bandwidth_mib, "MiB/s"),
            self.seed,
        )?;
        writeln!(out)?;
        writeln!(
            out,
            "{:>8} {:>12} {:>10} {:>10} {:>10} {:>10} {:>16}",
            "round", "pages", "MiB", "sync ms", "send ms", "MiB/s", "dirtied pages/s",
        )?;
        for (number, round) in outcome.rounds.iter().enumerate() {
            let rate = |rate: Option<f64>, digits| {
                rate.map_or("-".into(), |rate| format!("{rate:.digits$}"))
            };
            let dirty_rate = round.dirty_rate().map_or("-".into(), |r| grouped(r as u64));
            writeln!(
                out,
                "{:>8} {:>12} {:>10.1} {:>10.2} {:>10.1} {:>10} {:>16}",
                if round.running {
                    number.to_string()
                } else {
                    "stopped".into()
                },
                grouped(round.pages),
                round.mib(),
                ms(round.sync),
                ms(round.send),
                rate(round.mib_per_second(), 1),
                dirty_rate,
            )?;
        }
        writeln!(
            out,
            "{:>8} {:>12} {:>10.1}",
            "all",
            grouped(self.pages_sent),
            mib(self.pages_sent),
        )?;
        writeln!(out)?;
        let mut line = |name: &str, value: String| writeln!(out, "{name:<18} {value}");
        line(
            "rounds",
            format!(
                "{} ({})",
                self.rounds,
                match self.converged {
                    true => "converged",
                    false =>
                        "not converged: the limit came before the rest fitted into the downtime",
                }
            ),
        )?;
        line(
            "ring-full exits",
            format!(
                "{}, {:.2} ms of vCPU time",
                grouped(self.ring_full_exits),
                self.ring_full_ms,
            ),
        )?;
        if self.converge {
            line("dirty limit", self.limits())?;
        }
        line("resets", grouped(self.resets))?;
        if self.short_resets + self.overruns > 0 {
            line("short resets", grouped(self.short_resets))?;
            line("overruns", grouped(self.overruns))?;
            line("stops to re-arm", grouped(self.rearms.into()))?;
        }
        line("entries harvested", grouped(self.entries_harvested))?;
        let per_second = self.guest_stores as f64 / outcome.running().as_secs_f64();
        line(
            "page stores",
            format!(
                "{}, {}/s",
                grouped(self.guest_stores),
                grouped(per_second as u64)
            ),
        )?;
        line(
            "downtime",
            format!(
                "{:.2} ms, of which {:.2} to stop the vCPUs",
                self.downtime_ms, self.stopping_ms,
            ),
        )?;
        line("total time", format!("{:.1} ms", self.total_ms))?;
        let first = outcome
            .first_mismatch
            .map_or(String::new(), |(slot, page)| {
                format!(", the first being page {page} of slot {slot}")
            });
        write!(
            out,
            "{:<18} {} of {}{first}",
            "mismatched pages",
            grouped(self.mismatched_pages),
            grouped(self.pages_total),
        )
    }
}

impl RoundReport {
    fn new(round: &Round) -> Self {
        Self {
            pages: round.pages,
            guest_running: round.running,
            sync_ms: ms(round.sync),
            send_ms: ms(round.send),
            mib_per_second: round.mib_per_second(),
            dirty_pages_per_second: round.dirty_rate(),
            limit_per_second: round.limit.map(u64::from),
        }
    }
}

/// To the microsecond.
fn ms(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e3
}

/// With a comma before each three digits.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_digits() {
        let cases = [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ];
        for (number, text) in cases {
            assert_eq!(grouped(number), text);
        }
    }
}
