// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What came of it: a table for people, an object for programs.

use std::collections::BTreeMap;
use std::time::Duration;

use kvm_integration::Host;
use serde::Serialize;
use strum::VariantArray;

use crate::episodes::{Chaos, Episode, Fault, Finding};

/// All there is to say, with the names of the JSON object.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    backend: &'static str,
    mode: String,
    host: String,
    seed: u64,
    /// That came to their end.
    episodes: u64,
    seconds: f64,
    slowest_episode: u64,
    slowest_seconds: f64,
    /// Harvested.
    entries: u64,
    comparisons: u64,
    exact_comparisons: u64,
    faults: BTreeMap<&'static str, u64>,
    not_applicable: Vec<&'static str>,
    /// Written and not reported.
    missed_pages: u64,
    stray_pages: u64,
    strange_entries: u64,
    failed_episodes: Vec<u64>,
}

impl Report {
    /// Of nothing yet.
    pub fn new(chaos: &Chaos, seed: u64) -> Self {
        Self {
            backend: chaos.backend().name(),
            mode: chaos.backend().mode().to_string(),
            host: Host::detect().to_string(),
            seed,
            ..Self::default()
        }
    }

    /// Takes in an episode, and says what was wrong with it, if anything was.
    pub fn add(&mut self, number: u64, time: Duration, episode: &Episode) -> Option<String> {
        self.episodes += 1;
        let seconds = seconds(time);
        if seconds > self.slowest_seconds {
            (self.slowest_episode, self.slowest_seconds) = (number, seconds);
        }
        self.entries += episode.entries;
        self.comparisons += episode.comparisons;
        self.exact_comparisons += episode.exact_comparisons;
        self.missed_pages += episode.missed_pages;
        self.stray_pages += episode.stray_pages;
        self.strange_entries += episode.strange_entries;
        if episode.is_well() {
            return None;
        }
        self.failed_episodes.push(number);
        let first = episode.first.map_or(String::new(), |first| {
            let Finding { slot, page, when } = first;
            format!("; the first is page {page} of slot {slot}, {when}")
        });
        Some(format!(
            "episode {number}: {} pages missed, {} stray{first}; {} strange entries",
            episode.missed_pages, episode.stray_pages, episode.strange_entries
        ))
    }

    /// Episodes with which something was wrong.
    pub fn failures(&self) -> u64 {
        self.failed_episodes.len() as u64
    }

    /// Sums up.
    pub fn end(&mut self, chaos: &Chaos, time: Duration) {
        self.seconds = seconds(time);
        for &fault in Fault::VARIANTS {
            match chaos.backend().can(fault) {
                true => drop(self.faults.insert(fault.into(), chaos.counts().get(fault))),
                false => self.not_applicable.push(fault.into()),
            }
        }
    }

    /// How far it is, in one line.
    pub fn progress(&self, time: Duration) -> String {
        let (episodes, entries, missed) = (self.episodes, self.entries, self.missed_pages);
        let seconds = time.as_secs();
        format!("{episodes} episodes in {seconds} s, {entries} entries, {missed} pages missed")
    }

    /// Several lines, without the last line's end.
    pub fn table(&self) -> String {
        let mut lines = vec![format!(
            "{}; {}, {}, seed {}",
            self.host, self.backend, self.mode, self.seed
        )];
        let mut line = |name: &str, value: String| lines.push(format!("{name:<26} {value:>12}"));
        for name in Fault::VARIANTS.iter().map(<&str>::from) {
            let times = self.faults.get(name);
            line(name, times.map_or("not here".into(), u64::to_string));
        }
        line("episodes", self.episodes.to_string());
        line("comparisons", self.comparisons.to_string());
        line("exact comparisons", self.exact_comparisons.to_string());
        line("entries", self.entries.to_string());
        line("strange entries", self.strange_entries.to_string());
        line("stray pages", self.stray_pages.to_string());
        line("missed pages", self.missed_pages.to_string());
        line("seconds", format!("{:.1}", self.seconds));
        line(
            "seconds of the slowest",
            format!("{:.1}", self.slowest_seconds),
        );
        lines.join("\n")
    }
}

/// To the millisecond.
fn seconds(time: Duration) -> f64 {
    time.as_millis() as f64 / 1e3
}
