// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The figures of a table: what they are called, what they are, which is best.

use kvm_integration::guestperf::{ArmResult, CellResult, Figures};

/// So much worse than the best is as good.
const WITHIN: f64 = 1.05;
/// Of a drop, in seconds: a sample comes each 20 ms.
pub const DROP_NOISE: f64 = 0.02;
/// Of a stall, in milliseconds: threads that share a core wait for one another so long.
pub const STALL_NOISE: f64 = 4.0;

/// One figure of every arm.
#[derive(Debug)]
pub struct Column {
    /// Its name and unit.
    pub name: &'static str,
    /// Where it is.
    pub of: fn(&Figures) -> f64,
    /// If the least is the best: how much is too little to distinguish.
    noise: Option<f64>,
    /// Whether an arm that gives up early must not win by it.
    needs_convergence: bool,
}

/// All there are. The page's introduction says what they are.
pub const COLUMNS: [Column; 14] = [
    least("drop s", |of| of.drop_seconds, DROP_NOISE),
    least("worst ms/GB", |of| of.worst_ms_per_gb, 0.0),
    plain("median ms/GB", |of| of.median_ms_per_gb),
    plain("quiet ms/GB", |of| of.quiet_ms_per_gb),
    least("longest stall ms", |of| of.longest_stall_ms, STALL_NOISE),
    Column {
        needs_convergence: true,
        ..least("total s", |of| of.total_seconds, 0.0)
    },
    plain("full exits", |of| of.full_exits as f64),
    plain("in them ms", |of| of.full_exit_ms),
    plain("resets", |of| of.resets as f64),
    plain("entries", |of| of.entries as f64),
    plain("a reset", Figures::entries_per_reset),
    plain("reaper CPU ms", |of| of.reaper_cpu_ms),
    plain("pages sent", |of| of.pages_sent as f64),
    plain("downtime ms", |of| of.downtime_ms),
];

const fn plain(name: &'static str, of: fn(&Figures) -> f64) -> Column {
    Column {
        name,
        of,
        noise: None,
        needs_convergence: false,
    }
}

const fn least(name: &'static str, of: fn(&Figures) -> f64, noise: f64) -> Column {
    Column {
        noise: Some(noise),
        ..plain(name, of)
    }
}

impl Column {
    /// This arm's median, if it takes part in a comparison. Figures of one that missed pages mean
    /// nothing, and who gives up early is not fast.
    pub fn counted(&self, arm: &ArmResult, result: &CellResult) -> Option<f64> {
        self.noise?;
        let anybody_converged = result.arms.iter().any(ArmResult::always_converged);
        let in_time = arm.always_converged() || !anybody_converged;
        let fit = arm.missed_pages() == 0 && (in_time || !self.needs_convergence);
        let median = arm.spread(self.of)?.median;
        (fit && median.is_finite()).then_some(median)
    }

    /// Whether this is as good as the best, or within 5 %, or cannot be distinguished.
    pub fn reaches(&self, own: f64, best: f64) -> bool {
        own <= WITHIN * best || own <= best + self.noise.unwrap_or_default()
    }

    /// How this arm compares: `★ ` if none is better, `≈ ` if it reaches the best.
    pub fn sign(&self, arm: &ArmResult, result: &CellResult) -> &'static str {
        let all = result.arms.iter();
        let best = all.filter_map(|arm| self.counted(arm, result));
        match (self.counted(arm, result), best.min_by(f64::total_cmp)) {
            (Some(own), Some(best)) if own <= best => "★ ",
            (Some(own), Some(best)) if self.reaches(own, best) => "≈ ",
            _ => "",
        }
    }
}
