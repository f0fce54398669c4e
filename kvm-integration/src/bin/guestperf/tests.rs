// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Results that were never measured.

use kvm_integration::guestperf::{
    ArmResult, Cell, CellResult, Figures, Migration, Phases, Round, Sample,
};

pub fn figures() -> Figures {
    Figures {
        quiet_ms_per_gb: 50.0,
        median_ms_per_gb: 400.0,
        worst_ms_per_gb: 900.0,
        drop_seconds: 1.5,
        longest_stall_ms: 7.0,
        full_exits: 12,
        full_exit_ms: 3.0,
        resets: 5,
        entries: 1000,
        guest_pages_per_second: 1e6,
        reaper_cpu_ms: 20.0,
        pages_sent: 30_000,
        downtime_ms: 250.0,
        total_seconds: 2.8,
        converged: true,
        missed_pages: 0,
    }
}

/// Arms, and the figures of each of their migrations.
pub fn cell_result(arms: &[(&'static str, &[Figures])]) -> CellResult {
    let migration = |figures: &Figures| Migration {
        figures: *figures,
        rounds: vec![Round {
            pages: 7,
            running: true,
            begin: 1.0,
            seconds: 0.5,
        }],
        phases: Phases {
            begin: 1.0,
            stop: 2.0,
            resume: 2.5,
            end: 3.5,
        },
        samples: vec![Sample {
            at: 0.5,
            ms_per_gb: None,
            full_exits: 0,
            delay_ms: Some(2.0),
        }],
    };
    let arms = arms.iter().map(|&(arm, figures)| ArmResult {
        arm,
        migrations: figures.iter().map(migration).collect(),
    });
    CellResult {
        cell: Cell {
            vcpus: 2,
            memory_mib: 1024,
            stress_mib: 512,
            ring_entries: 4096,
        },
        others: Some(0.25),
        arms: arms.collect(),
    }
}
