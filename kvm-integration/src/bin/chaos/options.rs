// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line.

use std::time::Duration;

use clap::{Parser, ValueEnum};
use kvm_integration::cli::backend::Wanted;
use kvm_integration::cli::output::Teller;

use kvm_dirty_ring::Mode;

/// Torments guests and their dirty logs, and looks whether a page gets lost.
///
/// Episode after episode makes a guest, and does to it and to its log what a VMM, its devices and its
/// users might: storms of signals, slots that come and go, vCPUs that come late, syncs beside syncs,
/// full rings, overrun rings, reapers that stop and policies that fail. In half of the episodes pages stay
/// open that are written again and again, and are closed at any time. Meanwhile a copy is made of
/// what syncs report and of nothing else; with the vCPUs stopped it must be equal to the original. What
/// happens in an episode is a function of the seed and the episode's number. Exit status: 0 if it
/// was equal each time and no entry was taken for another slot's, 1 if not, 2 if it could not be tried, 130 if interrupted.
#[derive(Debug, Clone, Parser)]
#[command(version)]
pub struct Options {
    /// For how long, in minutes, up to 10000 [default: 1, or as long as --episodes take]
    #[arg(long, value_name = "N", value_parser = minutes)]
    pub minutes: Option<f64>,

    /// How many episodes at the most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub episodes: Option<u64>,

    /// What the episodes are drawn from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// This episode alone; with --episodes, so many times
    #[arg(long, value_name = "K")]
    pub only_episode: Option<u64>,

    /// The backend that runs the guests
    #[arg(long, value_enum, default_value_t = Wanted::Auto)]
    pub backend: Wanted,

    /// How the guests' writes are logged
    #[arg(long, value_enum, default_value_t = Logging::Rings)]
    pub mode: Logging,

    #[command(flatten)]
    pub teller: Teller,
}

/// How the guests' writes are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Logging {
    /// Into dirty rings
    Rings,
    /// Into bitmaps: without all that befalls rings and their resets
    Bitmap,
}

impl From<Logging> for Mode {
    fn from(logging: Logging) -> Self {
        match logging {
            Logging::Rings => Self::Rings,
            Logging::Bitmap => Self::Bitmap,
        }
    }
}

impl Options {
    /// The numbers of the episodes.
    pub fn numbers(&self) -> Box<dyn Iterator<Item = u64>> {
        match (self.only_episode, self.episodes, self.minutes) {
            (Some(only), None, None) => Box::new(std::iter::once(only)),
            (Some(only), None, Some(_)) => Box::new(std::iter::repeat(only)),
            (Some(only), Some(times), _) => Box::new((0..times).map(move |_| only)),
            (None, Some(times), _) => Box::new(0..times),
            (None, None, _) => Box::new(0..),
        }
    }

    /// How long they may take.
    pub fn time(&self) -> Option<Duration> {
        let is_counted = self.episodes.is_some() || self.only_episode.is_some();
        let minutes = self.minutes.or((!is_counted).then_some(1.0))?;
        Some(Duration::from_secs_f64(minutes * 60.0))
    }

    /// How to have an episode again.
    pub fn again(&self, number: u64) -> String {
        let seed = self.seed;
        let mode = match self.mode {
            Logging::Rings => "",
            Logging::Bitmap => "--mode bitmap ",
        };
        format!("again: {mode}--seed {seed} --only-episode {number}")
    }
}

fn minutes(text: &str) -> Result<f64, String> {
    let wanted = || "more than 0 and at most 10000 minutes are wanted".to_string();
    let minutes: f64 = text.parse().map_err(|_| wanted())?;
    let is_sound = minutes > 0.0 && minutes <= 10_000.0;
    is_sound.then_some(minutes).ok_or_else(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &str) -> Result<Options, clap::Error> {
        Options::try_parse_from(["chaos"].into_iter().chain(args.split_whitespace()))
    }

    #[test]
    fn an_end_is_always_known() {
        let minute = Some(Duration::from_secs(60));
        let numbers = |args| -> Vec<u64> { parse(args).unwrap().numbers().take(5).collect() };
        for (args, time, expected) in [
            ("", minute, vec![0, 1, 2, 3, 4]),
            ("--minutes 0.5", minute.map(|m| m / 2), vec![0, 1, 2, 3, 4]),
            ("--episodes 2", None, vec![0, 1]),
            ("--only-episode 7", None, vec![7]),
            ("--only-episode 7 --episodes 3", None, vec![7, 7, 7]),
            ("--only-episode 7 --minutes 1", minute, vec![7; 5]),
        ] {
            assert_eq!(parse(args).unwrap().time(), time, "{args}");
            assert_eq!(numbers(args), expected, "{args}");
        }
    }
}
