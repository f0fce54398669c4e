//! What came of it: a table for people, an object for programs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use kvm_integration::Host;
use kvm_integration::chaos::{Chaos, Episode, Fault, Finding};
use serde::Serialize;

/// All there is to say, with the names of the JSON object.
#[derive(Debug, Serialize)]
pub struct Report {
    backend: &'static str,
    host: String,
    seed: u64,
    /// Episodes that came to their end.
    pub episodes: u64,
    seconds: f64,
    slowest_episode: u64,
    slowest_seconds: f64,
    /// Entries harvested.
    pub entries: u64,
    comparisons: u64,
    exact_comparisons: u64,
    faults: BTreeMap<&'static str, u64>,
    not_applicable: Vec<&'static str>,
    /// Pages that were written and not reported.
    pub missed_pages: u64,
    stray_pages: u64,
    strange_entries: u64,
    failed_episodes: Vec<u64>,
}

impl Report {
    /// Of nothing yet.
    pub fn new(chaos: &Chaos, seed: u64) -> Self {
        Self {
            backend: chaos.backend().name(),
            host: Host::detect().to_string(),
            seed,
            episodes: 0,
            seconds: 0.0,
            slowest_episode: 0,
            slowest_seconds: 0.0,
            entries: 0,
            comparisons: 0,
            exact_comparisons: 0,
            faults: BTreeMap::new(),
            not_applicable: Vec::new(),
            missed_pages: 0,
            stray_pages: 0,
            strange_entries: 0,
            failed_episodes: Vec::new(),
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
    pub fn failures(&self) -> usize {
        self.failed_episodes.len()
    }

    /// Whether all was well.
    pub fn is_well(&self) -> bool {
        self.failed_episodes.is_empty()
    }

    /// Sums up.
    pub fn end(&mut self, chaos: &Chaos, time: Duration) {
        self.seconds = seconds(time);
        for fault in Fault::ALL {
            match chaos.backend().can(fault) {
                true => drop(self.faults.insert(fault.name(), chaos.counts().get(fault))),
                false => self.not_applicable.push(fault.name()),
            }
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
    pub fn table(&self) -> String {
        let mut text = String::new();
        self.write_table(&mut text)
            .expect("a String takes all that is written to it");
        text
    }

    fn write_table(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "{}; {}, seed {}", self.host, self.backend, self.seed)?;
        for fault in Fault::ALL {
            let name = fault.name();
            match self.faults.get(name) {
                Some(times) => writeln!(out, "{name:<26} {times:>12}")?,
                None => writeln!(out, "{name:<26} {:>12}", "not here")?,
            }
        }
        for (name, value) in [
            ("episodes", self.episodes),
            ("comparisons", self.comparisons),
            ("exact comparisons", self.exact_comparisons),
            ("entries", self.entries),
            ("strange entries", self.strange_entries),
            ("stray pages", self.stray_pages),
            ("missed pages", self.missed_pages),
        ] {
            writeln!(out, "{name:<26} {value:>12}")?;
        }
        writeln!(out, "{:<26} {:>12.1}", "seconds", self.seconds)?;
        let slowest = "seconds of the slowest";
        write!(out, "{slowest:<26} {:>12.1}", self.slowest_seconds)
    }
}

/// To the millisecond.
fn seconds(time: Duration) -> f64 {
    time.as_millis() as f64 / 1e3
}
