// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of figures, and what there is to say beside it.

use kvm_integration::cli::markdown::{NONE, Table, figure};
#[cfg(tiny_guest)]
use kvm_integration::lab::migrations::kvm::Timed;
use kvm_integration::lab::migrations::{End, Figures};

use super::result::{GuestResult, Results};

const FIGURES: &str = "guest | arm | speed | rounds | refreshes | entries | open | pages sent | seconds | \
                       downtime ms | end | missed pages";

/// A row for each migration.
pub fn figures(guests: &[GuestResult]) -> Table {
    let rows = guests.iter().flat_map(|guest| {
        let row = |figures: &Figures| row(guest, figures);
        guest.arms.iter().map(row)
    });
    Table::new(FIGURES, rows)
}

fn row(guest: &GuestResult, figures: &Figures) -> Vec<String> {
    let count = |count: u64| figure(count as f64);
    vec![
        guest.load.to_string(),
        figures.arm.into(),
        format!("{:.3}", figures.speed),
        count(figures.rounds.into()),
        count(figures.refreshes.into()),
        figures.entries.map_or_else(|| NONE.into(), count),
        count(figures.members),
        count(figures.pages_sent),
        format!("{:.2}", figures.seconds),
        figure(figures.downtime_ms),
        match figures.end {
            End::Ends => "ends".into(),
            end => format!("{end} after {}", figures.rounds),
        },
        count(figures.missed_pages),
    ]
}

/// What is in no table: what the columns mean, the last sync, and what others took.
pub fn remarks(results: &Results) -> String {
    let mut text = String::from(
        "speed: stores against those of the time before, untracked; open: pages at the last sync before the guest stops\n",
    );
    #[cfg(tiny_guest)]
    if let Some(last) = &results.last_sync {
        let timed = |timed: &Timed| {
            let percent = timed.full * 100.0;
            format!("{} ms, {percent:.0} % full", figure(timed.ms))
        };
        text += &format!(
            "{} rings of {} entries: last sync {}; sync {}\n",
            last.rings,
            last.ring_entries,
            timed(&last.last_sync),
            timed(&last.sync),
        );
    }
    if let Some(others) = results.others {
        text += &format!("others took {:.0} % of the machine\n", others * 100.0);
    }
    text
}
