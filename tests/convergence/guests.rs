// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guests that migrate.

use crate::guest::{Guest, Order};

pub const GUESTS: &[Guest] = &[
    Guest::sweeps("sweeps 96 MiB", 24_576),
    Guest::sweeps("sweeps 256 MiB", 65_536),
    Guest::sweeps("sweeps 512 MiB", 131_072),
    Guest::sweeps("sweeps 1 GiB", 262_144),
    Guest {
        order: Order::Zipf,
        hopeless_after: 5,
        ..Guest::sweeps("zipf over 1 GiB", 262_144)
    },
    hot_and_cold("hot 20 k + cold 10 k/s", 20_000, 10_000),
    hot_and_cold("hot 30 k + cold 20 k/s", 30_000, 20_000),
    hot_and_cold("hot 30 k + cold 40 k/s", 30_000, 40_000),
    Guest {
        order: Order::Random,
        ..hot_and_cold("hot 30 k in any order + cold 40 k/s", 30_000, 40_000)
    },
    Guest {
        moves_each_ms: Some(1000),
        ..hot_and_cold("hot 30 k that move each second + cold 5 k/s", 30_000, 5_000)
    },
    Guest {
        moves_each_ms: Some(200),
        ..hot_and_cold("hot 8 k that move each 200 ms + cold 5 k/s", 8_000, 5_000)
    },
    paced("100 k rewritten each 2 s", 100_000, 50_000),
    paced("a stream of 60 k/s", 262_144, 60_000),
    paced("a stream of 4 k/s", 262_144, 4_000),
    Guest {
        order: Order::Random,
        ..paced("nearly idle", 262_144, 500)
    },
];

const fn hot_and_cold(name: &'static str, hot: u64, cold_per_second: u64) -> Guest {
    Guest {
        cold_per_second,
        hopeless_after: 25,
        ..Guest::sweeps(name, hot)
    }
}

const fn paced(name: &'static str, pages: u64, per_second: u64) -> Guest {
    Guest {
        paced: Some(per_second),
        hopeless_after: 25,
        ..Guest::sweeps(name, pages)
    }
}
