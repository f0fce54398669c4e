//! The figures of a table: what they are called, what they are, which is best.

use kvm_integration::guestperf::{ArmResult, CellResult, Figures};

use crate::verdict::WITHIN;

/// One figure of every arm.
#[derive(Debug)]
pub struct Column {
    /// Its name.
    pub name: &'static str,
    /// Its unit, if it is not a number of things.
    pub unit: &'static str,
    /// What it is.
    pub what: &'static str,
    /// Where it is.
    pub of: fn(&Figures) -> f64,
    /// Who is compared, if the least is the best.
    pub best: Option<Among>,
}

/// Which arms are compared; those that missed pages never are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Among {
    /// All.
    All,
    /// Those whose migrations all converged: who gives up early is not fast.
    Converged,
}

/// How a figure compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// None is less.
    Best,
    /// Nearly so.
    Close,
    /// There is a better one, or they are not compared.
    Plain,
}

/// What it is about.
pub const FELT: [Column; 5] = [
    DROP,
    WORST,
    Column {
        name: "median",
        unit: "ms/GB",
        what: "the median time that a vCPU took for a GB during the migration",
        of: |figures| figures.median_ms_per_gb,
        best: None,
    },
    Column {
        name: "longest stall",
        unit: "ms",
        what: "the longest time between two pages of one vCPU during the migration",
        of: |figures| figures.longest_stall_ms,
        best: Some(Among::All),
    },
    Column {
        name: "total",
        unit: "s",
        what: "from the start of dirty logging until the last page was sent",
        of: |figures| figures.total_seconds,
        best: Some(Among::Converged),
    },
];

/// What it took.
pub const SPENT: [Column; 8] = [
    Column {
        name: "full exits",
        unit: "",
        what: "how often a vCPU left the guest because its ring was full",
        of: |figures| figures.full_exits as f64,
        best: None,
    },
    Column {
        name: "time in them",
        unit: "ms",
        what: "what vCPUs spent on full exits, all vCPUs together",
        of: |figures| figures.full_exit_ms,
        best: None,
    },
    Column {
        name: "resets",
        unit: "",
        what: "ioctls that reset rings; in bitmap mode those that fetch the bitmap",
        of: |figures| figures.resets as f64,
        best: None,
    },
    Column {
        name: "entries",
        unit: "",
        what: "ring entries harvested; in bitmap mode pages found dirty",
        of: |figures| figures.entries as f64,
        best: None,
    },
    Column {
        name: "entries per reset",
        unit: "",
        what: "the one by the other",
        of: Figures::entries_per_reset,
        best: None,
    },
    Column {
        name: "reaper CPU",
        unit: "ms",
        what: "CPU time of the reaper's thread",
        of: |figures| figures.reaper_cpu_ms,
        best: None,
    },
    Column {
        name: "pages sent",
        unit: "",
        what: "pages of 4 KiB, each as often as it was sent",
        of: |figures| figures.pages_sent as f64,
        best: None,
    },
    Column {
        name: "downtime",
        unit: "ms",
        what: "from the wish to stop the vCPUs until the last page was sent",
        of: |figures| figures.downtime_ms,
        best: None,
    },
];

/// How long the guest feels the migration.
pub const DROP: Column = Column {
    name: "drop",
    unit: "s",
    what: "the time of the migration in which a vCPU took, on average, more than twice as long for \
           a GB as in the quiet phase before; the guest's being stopped in the end is not part of it",
    of: |figures| figures.drop_seconds,
    best: Some(Among::All),
};

/// How much it does.
pub const WORST: Column = Column {
    name: "worst",
    unit: "ms/GB",
    what: "the longest that any vCPU took for one GB during the migration; of one that did not get \
           through a GB, what it would have taken at its pace",
    of: |figures| figures.worst_ms_per_gb,
    best: Some(Among::All),
};

impl Column {
    /// How this arm's median compares to that of the others.
    pub fn standing(&self, arm: &ArmResult, result: &CellResult) -> Standing {
        let best = result.arms.iter().filter_map(|arm| self.compared(arm));
        let (Some(own), Some(best)) = (self.compared(arm), best.min_by(f64::total_cmp)) else {
            return Standing::Plain;
        };
        match own {
            _ if own <= best => Standing::Best,
            _ if own <= best * WITHIN => Standing::Close,
            _ => Standing::Plain,
        }
    }

    /// This arm's median, if it takes part in a comparison.
    fn compared(&self, arm: &ArmResult) -> Option<f64> {
        let fit = match self.best? {
            Among::All => true,
            Among::Converged => arm.migrations.iter().all(|one| one.figures.converged),
        };
        let median = arm.spread(self.of)?.median;
        (fit && arm.missed_pages() == 0 && median.is_finite()).then_some(median)
    }

    /// With its unit.
    pub fn heading(&self) -> String {
        match self.unit {
            "" => self.name.into(),
            unit => format!("{}, {unit}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::synthetic;
    use super::*;

    /// Drops and totals of four arms: drop 10, 10.4, 12, 1; total the same.
    fn result() -> CellResult {
        let mut result = synthetic::results(1).remove(0);
        result.arms.truncate(4);
        for (arm, drop) in result.arms.iter_mut().zip([10.0, 10.4, 12.0, 1.0]) {
            for one in &mut arm.migrations {
                one.figures.drop_seconds = drop;
                one.figures.total_seconds = drop;
                one.figures.converged = true;
                one.figures.missed_pages = 0;
            }
        }
        result
    }

    fn standings(column: &Column, result: &CellResult) -> Vec<Standing> {
        let arms = result.arms.iter();
        arms.map(|arm| column.standing(arm, result)).collect()
    }

    #[test]
    fn the_least_is_best_and_5_percent_more_is_close() {
        use Standing::{Best, Close, Plain};
        let mut result = result();
        assert_eq!(standings(&DROP, &result), [Plain, Plain, Plain, Best]);
        result.arms.pop();
        assert_eq!(standings(&DROP, &result), [Best, Close, Plain]);
    }

    #[test]
    fn who_misses_pages_is_never_best() {
        let mut result = result();
        result.arms[3].migrations[0].figures.missed_pages = 1;
        assert_eq!(standings(&DROP, &result)[0], Standing::Best);
        assert_eq!(standings(&DROP, &result)[3], Standing::Plain);
    }

    #[test]
    fn who_does_not_converge_is_not_fast() {
        let mut result = result();
        result.arms[3].migrations[0].figures.converged = false;
        let total = FELT.iter().find(|column| column.name == "total");
        assert_eq!(standings(total.unwrap(), &result)[0], Standing::Best);
        assert_eq!(standings(&DROP, &result)[3], Standing::Best);
    }
}
