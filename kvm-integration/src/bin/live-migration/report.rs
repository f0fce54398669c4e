// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What came of it: a table for people, an object for programs.

use std::fmt::Write;
use std::time::Duration;

use kvm_dirty_ring::{Mode, Stats};
use kvm_integration::Host;
use kvm_integration::migration::{Outcome, Round, mib};
use serde_json::{Value, json};

use crate::options::Options;

/// All there is to say.
pub struct Report<'a> {
    pub options: &'a Options,
    pub backend: &'static str,
    pub mode: Mode,
    pub stats: Stats,
    pub outcome: &'a Outcome,
}

impl Report<'_> {
    /// For programs.
    pub fn json(&self) -> Value {
        let (options, stats, outcome) = (self.options, &self.stats, self.outcome);
        json!({
            "backend": self.backend,
            "mode": self.mode.to_string(),
            "host": Host::detect().to_string(),
            "vcpus": options.vcpus,
            "memory_mib": options.memory_mib,
            "ring_entries": options.ring_entries.get(),
            "workload": options.workload.to_string(),
            "pacing": <&str>::from(options.pacing),
            "seed": options.seed,
            "write_rate": options.write_rate,
            "bandwidth_mib": options.bandwidth_mib,
            "max_rounds": options.max_rounds,
            "downtime_limit_ms": options.downtime_ms,
            "converge": options.converge,
            "working_set": options.working_set.to_string(),
            "break_after": options.break_after,
            "broken_round": outcome.broken_round(),
            "rounds": outcome.rounds.len(),
            "converged": outcome.converged,
            // What the guest would have had to be limited to, if it did not get there as it wrote.
            "hopeless_pages_per_second": outcome.hopeless,
            "pages_total": outcome.pages_total,
            "pages_sent": outcome.pages_sent(),
            "ring_full_exits": stats.full_exits(),
            "ring_full_ms": ms(Duration::from_nanos(stats.stall_ns())),
            "limited_ms": self.limited_ms(),
            "resets": stats.resets,
            "short_resets": stats.short_resets,
            "overruns": stats.overruns,
            "rearms": outcome.rearms,
            "members_joined": stats.working_set.joined,
            "refreshes": outcome.refreshes,
            "refreshing_ms": ms(outcome.refreshing),
            "working_set_useless": stats.working_set.useless,
            "entries_harvested": stats.entries,
            "guest_stores": outcome.stores,
            "stopping_ms": ms(outcome.stopping),
            "downtime_ms": ms(outcome.downtime),
            "total_ms": ms(outcome.total),
            "mismatched_pages": outcome.mismatched_pages,
            "per_round": outcome.rounds.iter().map(round_json).collect::<Vec<_>>(),
        })
    }

    /// Time that vCPUs slept for their limits.
    fn limited_ms(&self) -> f64 {
        let limited = self.stats.vcpus.iter().map(|vcpu| vcpu.limited_ns).sum();
        ms(Duration::from_nanos(limited))
    }

    /// For people: several lines, without the last line's end.
    pub fn table(&self) -> String {
        let mut text = String::new();
        self.write_table(&mut text)
            .expect("a String takes all that is written to it");
        text
    }

    /// What stayed open.
    fn working_set(&self) -> String {
        let (outcome, seen) = (self.outcome, &self.stats.working_set);
        if outcome.rounds.iter().all(|round| round.members == 0) {
            return "none".into();
        }
        let (joined, refreshes, pause) = (seen.joined, outcome.refreshes, ms(outcome.refreshing));
        let told = format!(
            "pages have joined {} times; {refreshes} refreshes, the guest stopped for {pause:.2} ms",
            grouped(joined)
        );
        match seen.useless {
            true => format!("{told}; this kernel protects what it was asked to leave open"),
            false => told,
        }
    }

    /// Whether the link broke.
    fn broken_link(&self, after: u64) -> String {
        let Some(number) = self.outcome.broken_round() else {
            return format!("no, no round had more than {} pages", grouped(after));
        };
        let cut_off = grouped(self.outcome.rounds[number].cut_off);
        format!(
            "in round {number}, after {} pages; {cut_off} were left to be sent",
            grouped(after)
        )
    }

    /// How the guest was limited.
    fn limits(&self) -> String {
        let rounds = self.outcome.rounds.iter().enumerate();
        let limits = rounds.filter_map(|(number, round)| Some((number, round.limit?.get())));
        let mut limits: Vec<_> = limits.collect();
        limits.dedup_by_key(|&mut (_, limit)| limit);
        if limits.is_empty() {
            return "none was needed".into();
        }
        let tell = |&(number, limit): &(usize, u64)| {
            format!("{} pages/s a vCPU from round {number} on", grouped(limit))
        };
        let limits: Vec<_> = limits.iter().map(tell).collect();
        let (limits, asleep) = (limits.join(", "), self.limited_ms());
        format!("{limits}; {asleep:.1} ms of vCPU time asleep")
    }

    fn write_table(&self, out: &mut String) -> std::fmt::Result {
        let (options, stats, outcome) = (self.options, &self.stats, self.outcome);
        let limit = |limit: u64, unit| match limit {
            0 => "as fast as it goes".to_string(),
            limit => format!("{} {unit}", grouped(limit)),
        };
        let log = match self.mode {
            Mode::Bitmap => self.mode.to_string(),
            mode => format!("{mode} of {}", grouped(options.ring_entries.get().into())),
        };
        writeln!(out, "{}", Host::detect())?;
        writeln!(
            out,
            "{} vCPUs, {} MiB in two slots, {log}, {}; {} ({}), link {}, seed {}\n",
            options.vcpus,
            grouped(options.memory_mib),
            <&str>::from(options.pacing),
            options.workload,
            limit(options.write_rate, "stores/s"),
            limit(options.bandwidth_mib, "MiB/s"),
            options.seed,
        )?;
        writeln!(
            out,
            "{:>8} {:>12} {:>10} {:>10} {:>10} {:>10} {:>10} {:>16}",
            "round", "pages", "MiB", "left open", "sync ms", "send ms", "MiB/s", "dirtied pages/s",
        )?;
        for (number, round) in outcome.rounds.iter().enumerate() {
            let number = match round.running {
                true => number.to_string(),
                false => "stopped".into(),
            };
            let link = round.mib_per_second();
            let dirtied = round.dirty_rate().map_or("-".into(), |r| grouped(r as u64));
            writeln!(
                out,
                "{number:>8} {:>12} {:>10.1} {:>10} {:>10.2} {:>10.1} {:>10} {dirtied:>16}",
                grouped(round.pages),
                round.mib(),
                grouped(round.members),
                ms(round.sync),
                ms(round.send),
                link.map_or("-".into(), |rate| format!("{rate:.1}")),
            )?;
        }
        let (sent, sent_mib) = (grouped(outcome.pages_sent()), mib(outcome.pages_sent()));
        writeln!(out, "{:>8} {sent:>12} {sent_mib:>10.1}\n", "all")?;
        let mut line = |name: &str, value: String| writeln!(out, "{name:<18} {value}");
        let end = match (outcome.converged, outcome.hopeless) {
            (true, _) => "converged",
            (false, Some(_)) if !options.converge => "not converged, and no hope for it",
            _ => "not converged: the limit came before the rest fitted into the downtime",
        };
        line("rounds", format!("{} ({end})", outcome.rounds.len()))?;
        if let Some(would_do) = outcome.hopeless {
            let would_do = grouped(would_do.get());
            let told = format!("would end with a guest that dirties {would_do} pages/s");
            line("without hope", told)?;
        }
        if let Some(after) = options.break_after {
            line("broken link", self.broken_link(after))?;
        }
        line("working set", self.working_set())?;
        let (full_exits, stall) = (grouped(stats.full_exits()), stats.stall_ns());
        let stall = ms(Duration::from_nanos(stall));
        let full_exits = format!("{full_exits}, {stall:.2} ms of vCPU time");
        line("ring-full exits", full_exits)?;
        if options.converge {
            line("dirty limit", self.limits())?;
        }
        line("resets", grouped(stats.resets))?;
        if stats.short_resets + stats.overruns > 0 {
            line("short resets", grouped(stats.short_resets))?;
            line("overruns", grouped(stats.overruns))?;
            line("stops to re-arm", grouped(outcome.rearms.into()))?;
        }
        line("entries harvested", grouped(stats.entries))?;
        let per_second = outcome.stores as f64 / outcome.running().as_secs_f64();
        let (stores, per_second) = (grouped(outcome.stores), grouped(per_second as u64));
        line("page stores", format!("{stores}, {per_second}/s"))?;
        let (downtime, stopping) = (ms(outcome.downtime), ms(outcome.stopping));
        let downtime = format!("{downtime:.2} ms, of which {stopping:.2} to stop the vCPUs");
        line("downtime", downtime)?;
        line("total time", format!("{:.1} ms", ms(outcome.total)))?;
        let first = outcome
            .first_mismatch
            .map_or(String::new(), |(slot, page)| {
                format!(", the first being page {page} of slot {slot}")
            });
        let (missed, all) = (
            grouped(outcome.mismatched_pages),
            grouped(outcome.pages_total),
        );
        write!(out, "{:<18} {missed} of {all}{first}", "mismatched pages")
    }
}

fn round_json(round: &Round) -> Value {
    json!({
        "pages": round.pages,
        // To be sent, too, when the link broke.
        "cut_off": round.cut_off,
        // Not sent: they stayed open.
        "members": round.members,
        "guest_running": round.running,
        "sync_ms": ms(round.sync),
        "send_ms": ms(round.send),
        "mib_per_second": round.mib_per_second(),
        "dirty_pages_per_second": round.dirty_rate(),
        // What each vCPU was allowed to dirty.
        "limit_per_second": round.limit,
    })
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
