//! Results of no machine, to draw.

use kvm_integration::guestperf::{
    ArmResult, Cell, CellResult, Figures, Migration, Phases, Round, Sample,
};

/// The arms of a full run.
pub const ARMS: [&str; 11] = [
    "bitmap",
    "fixed",
    "run-levels-as-posted",
    "run-levels",
    "halve-and-creep",
    "look-first",
    "qemu-fixed",
    "qemu-run-levels-as-posted",
    "qemu-run-levels",
    "qemu-halve-and-creep",
    "qemu-look-first",
];

/// So many cells, each with every arm.
pub fn results(cells: u32) -> Vec<CellResult> {
    let cell = |number: u32| CellResult {
        cell: Cell {
            vcpus: 1 << (number % 4),
            memory_mib: 1024 + 512 * u64::from(number),
            stress_mib: 768,
            ring_entries: [1024, 4096, 65_536][number as usize % 3],
        },
        others: (number == 1).then_some(0.12),
        arms: (0..ARMS.len())
            .map(|arm| self::arm(ARMS[arm], arm, number))
            .collect(),
    };
    (0..cells).map(cell).collect()
}

/// Three migrations of an arm.
pub fn arm(name: &'static str, number: usize, cell: u32) -> ArmResult {
    let migration = |turn: u64| migration(name, turn * 100 + number as u64 + 7 * u64::from(cell));
    ArmResult {
        arm: name,
        migrations: (0..3).map(migration).collect(),
    }
}

fn migration(arm: &str, seed: u64) -> Migration {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let slow = match arm.trim_start_matches("qemu-") {
        "bitmap" => 2.5,
        "fixed" => 8.0,
        "look-first" => 1.4,
        _ => 3.0,
    } * if arm.starts_with("qemu-") { 1.6 } else { 1.0 };
    let quiet = 240.0 + 30.0 * random();
    let (begin, total) = (1.5, 2.0 + slow * (0.6 + 0.1 * random()));
    let (stop, resume) = (begin + total - 0.2, begin + total);
    let phases = Phases {
        begin,
        stop,
        resume,
        end: resume + 1.5,
    };
    let (mut full_exits, mut at, mut delay) = (0.0, 0.0, 1000.0f64);
    let mut samples = Vec::new();
    while at < phases.end {
        at += 0.02;
        let during = (begin..resume).contains(&at);
        let stopped = (stop..resume).contains(&at);
        let noise = 1.0 + 0.2 * random();
        let pace = match () {
            () if stopped || (during && slow > 4.0 && random() < 0.05) => None,
            () if during => Some(quiet * noise * (1.0 + slow * random() * random())),
            () => Some(quiet * noise),
        };
        if during && !stopped {
            full_exits += (slow - 1.0) * random();
            delay = match arm.trim_start_matches("qemu-") {
                "fixed" => 1000.0,
                "look-first" => (delay * 0.6).max(2.0 + 3.0 * random()),
                "halve-and-creep" => (delay * 0.97 + 5.0).clamp(100.0, 1000.0),
                _ => (delay - 20.0).max(80.0),
            };
        }
        samples.push(Sample {
            at,
            ms_per_gb: pace,
            full_exits: full_exits as u64,
            delay_ms: (during && arm != "bitmap").then_some(delay),
        });
    }
    let mut rounds = Vec::new();
    let (mut pages, mut since) = (262_144.0, begin);
    while pages > 600.0 && rounds.len() < 25 {
        let seconds = (stop - since) / 2.0;
        rounds.push(Round {
            pages: pages as u64,
            running: true,
            begin: since,
            seconds,
        });
        since += seconds;
        pages *= 0.25 + 0.07 * slow.min(8.0) * random();
    }
    rounds.push(Round {
        pages: pages as u64,
        running: false,
        begin: stop,
        seconds: resume - stop,
    });
    let worst = samples.iter().filter_map(|sample| sample.ms_per_gb);
    Migration {
        figures: Figures {
            quiet_ms_per_gb: quiet * 1.1,
            median_ms_per_gb: quiet * slow * 0.7,
            worst_ms_per_gb: worst.fold(0.0, f64::max),
            drop_seconds: total * slow / 14.0,
            longest_stall_ms: 4.0 * slow * (1.0 + random()),
            full_exits: full_exits as u64,
            full_exit_ms: full_exits * 1.3,
            resets: if arm == "bitmap" {
                8
            } else {
                (total * 90.0) as u64
            },
            entries: (total * 61_000.0) as u64,
            guest_pages_per_second: 9e5 / slow,
            reaper_cpu_ms: if arm == "bitmap" { 0.0 } else { 70.0 * total },
            pages_sent: rounds.iter().map(|round| round.pages).sum(),
            downtime_ms: 200.0 + 20.0 * random(),
            total_seconds: total,
            converged: pages <= 600.0,
            missed_pages: 0,
        },
        rounds,
        phases,
        samples,
    }
}
