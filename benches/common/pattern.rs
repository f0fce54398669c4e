// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which pages a guest dirties, in which order.

/// Pages in a GiB.
const GIB: u64 = 1 << 18;

/// An order in which pages are dirtied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Page after page.
    Sequential,
    /// 64 pages in a row at random places.
    Runs,
    /// Every 64th page.
    Stride,
    /// Pages of 1 GiB at random.
    Random1,
    /// Pages of 64 GiB at random.
    Random64,
    /// Pages of four slots of 16 GiB at random.
    FourSlots,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Sequential,
        Self::Runs,
        Self::Stride,
        Self::Random1,
        Self::Random64,
        Self::FourSlots,
    ];

    /// What tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Runs => "64-page runs",
            Self::Stride => "stride 64",
            Self::Random1 => "random 1 GiB",
            Self::Random64 => "random 64 GiB",
            Self::FourSlots => "4 slots, random",
        }
    }

    /// How many slots it needs, and of how many pages each.
    pub fn slots(self) -> (u32, u64) {
        match self {
            Self::Random1 => (1, GIB),
            Self::FourSlots => (4, 16 * GIB),
            _ => (1, 64 * GIB),
        }
    }

    /// Whether the bits of one pass's pages are all over a bitmap that is larger than a near cache.
    pub fn is_large(self) -> bool {
        matches!(self, Self::Runs | Self::Random64 | Self::FourSlots)
    }

    /// `count` pages as (slot, page).
    pub fn pages(self, seed: u64, count: usize) -> Vec<(u32, u64)> {
        let (slots, pages) = self.slots();
        let mut random = Random(seed);
        let mut start = 0;
        (0..count as u64)
            .map(|i| match self {
                Self::Sequential => (0, i % pages),
                Self::Runs => {
                    if i % 64 == 0 {
                        start = random.below(pages - 64);
                    }
                    (0, start + i % 64)
                }
                Self::Stride => (0, i * 64 % pages),
                Self::Random1 | Self::Random64 => (0, random.below(pages)),
                Self::FourSlots => (random.below(slots.into()) as u32, random.below(pages)),
            })
            .collect()
    }
}

/// How much of a guest of 64 GiB is dirty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dirtied {
    /// A page of 100,000.
    Trace,
    /// A page of 1,000, at random.
    Thousandth,
    /// As many, in runs of 256.
    ThousandthInRuns,
    /// A page of ten, at random.
    Tenth,
    /// All.
    All,
}

impl Dirtied {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Trace,
        Self::Thousandth,
        Self::ThousandthInRuns,
        Self::Tenth,
        Self::All,
    ];

    /// Pages of the guest.
    pub const OF: u64 = 64 * GIB;

    /// What tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trace => "0.001 %",
            Self::Thousandth => "0.1 % random",
            Self::ThousandthInRuns => "0.1 % in runs",
            Self::Tenth => "10 % random",
            Self::All => "100 %",
        }
    }

    /// The pages, some of them perhaps twice.
    pub fn pages(self) -> Vec<u64> {
        let mut random = Random(7);
        let mut some = |count| (0..count).map(|_| random.below(Self::OF)).collect();
        match self {
            Self::Trace => some(Self::OF / 100_000),
            Self::Thousandth => some(Self::OF / 1000),
            Self::Tenth => some(Self::OF / 10),
            Self::ThousandthInRuns => {
                let starts: Vec<u64> = some(Self::OF / 1000 / 256);
                let runs = starts.into_iter().map(|page| page / 256 * 256);
                runs.flat_map(|start| start..start + 256).collect()
            }
            Self::All => (0..Self::OF).collect(),
        }
    }
}

/// Numbers that a cache cannot foresee, the same for the same seed.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        let mut x = self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        x ^= x >> 29;
        x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x ^= x >> 32;
        self.0 = self.0.wrapping_add(1);
        ((u128::from(x) * u128::from(bound)) >> 64) as u64
    }
}
