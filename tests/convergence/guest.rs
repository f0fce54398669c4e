// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests by what their vCPUs write, at a reduced scale: a page here stands for [`SCALE`] pages.

/// Pages that one page of the simulation stands for. Whatever takes a time for a page takes as many
/// times that, so times and shares come out as at full scale.
pub const SCALE: u64 = 64;

/// 1 GiB of pages of 4 KiB.
pub const PAGES: u64 = 262_144 / SCALE;
pub const VCPUS: u64 = 2;

/// What a write to an open page takes at full scale.
const WRITE_NS: u64 = 300;

/// Which of its hot pages a vCPU writes next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Order {
    Sweep,
    Random,
    /// By Zipf's law with the exponent 0.99.
    Zipf,
}

/// A guest, in numbers of full scale.
#[derive(Debug, Clone, Copy)]
pub struct Guest {
    pub name: &'static str,
    /// Pages that are written over and over, of all vCPUs.
    pub hot: u64,
    pub order: Order,
    /// After how many milliseconds the hot pages are others.
    pub moves_each_ms: Option<u64>,
    /// How long before the migration they were others for the first time.
    pub moved_before_ms: u64,
    /// Writes in a second to pages of which each is as likely, as soon as they are due.
    pub cold_per_second: u64,
    /// Writes in a second of an untracked guest, if it does not write as fast as it can.
    pub paced: Option<u64>,
    /// After how many rounds it is called hopeless, at most.
    pub hopeless_after: u32,
}

impl Guest {
    pub const fn sweeps(name: &'static str, hot: u64) -> Self {
        Self {
            name,
            hot,
            order: Order::Sweep,
            moves_each_ms: None,
            moved_before_ms: 0,
            cold_per_second: 0,
            paced: None,
            hopeless_after: 3,
        }
    }
}

/// Numbers that look random and are the same each time (splitmix64).
pub struct Dice(u64);

impl Dice {
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.roll()) * u128::from(end)) >> 64) as u64
    }
}

/// What one vCPU writes.
pub struct Vcpu<'a> {
    guest: &'a Guest,
    zipf: &'a Zipf,
    dice: Dice,
    /// Where its hot pages are, how many, and the next of them.
    first: u64,
    hot: u64,
    at: u64,
    /// Nanoseconds from one cold page to the next, and when that is due.
    cold_each: Option<u64>,
    cold_at: u64,
    /// What a write takes.
    ns: u64,
    moves_at: u64,
}

impl<'a> Vcpu<'a> {
    pub fn new(guest: &'a Guest, zipf: &'a Zipf, index: u64) -> Self {
        // In nanoseconds for a write of one of its pages, which stands for many.
        let each = |per_second: u64| 1_000_000_000 * VCPUS * SCALE / per_second;
        let ns = guest.paced.map_or(WRITE_NS * SCALE, each);
        let cold_each = (guest.cold_per_second > 0).then(|| each(guest.cold_per_second));
        Self {
            guest,
            zipf,
            dice: Dice(index + 1),
            first: index * PAGES / VCPUS,
            hot: guest.hot / SCALE / VCPUS,
            at: 0,
            cold_each,
            cold_at: 0,
            ns,
            moves_at: guest
                .moves_each_ms
                .unwrap_or(0)
                .saturating_sub(guest.moved_before_ms)
                * 1_000_000,
        }
    }

    /// What it writes at this time, in nanoseconds, and how long that takes unless the page is
    /// protected.
    pub fn next(&mut self, now: u64) -> (usize, u64) {
        if let Some(each) = self.cold_each {
            if now >= self.cold_at {
                self.cold_at += each;
                return (self.dice.below(PAGES) as usize, self.ns);
            }
        }
        if let Some(each) = self.guest.moves_each_ms {
            if now >= self.moves_at {
                self.moves_at += each * 1_000_000;
                self.first = self.dice.below(PAGES);
            }
        }
        let page = match self.guest.order {
            Order::Zipf => self.zipf.page(&mut self.dice),
            Order::Random => self.first + self.dice.below(self.hot),
            Order::Sweep => {
                self.at = if self.at + 1 < self.hot {
                    self.at + 1
                } else {
                    0
                };
                self.first + self.at
            }
        };
        ((page % PAGES) as usize, self.ns)
    }
}

/// Pages as often as they are written: one of these is as likely as another.
pub struct Zipf(Vec<u16>);

impl Zipf {
    pub fn new() -> Self {
        const PLACES: usize = 1 << 16;
        let share = |rank: u64| (rank as f64).powf(-0.99);
        let all: f64 = (1..=PAGES * SCALE).map(share).sum();
        let mut places = Vec::with_capacity(PLACES);
        let mut sum = 0.0;
        for page in 0..PAGES {
            let ranks = page * SCALE + 1..=(page + 1) * SCALE;
            sum += ranks.map(share).sum::<f64>();
            // Hot pages don't lie side by side.
            let page = page * 2_654_435_761 % PAGES;
            let end = (sum / all * PLACES as f64).round() as usize;
            places.resize(end.max(places.len()), page as u16);
        }
        Self(places)
    }

    fn page(&self, dice: &mut Dice) -> u64 {
        u64::from(self.0[dice.below(self.0.len() as u64) as usize])
    }
}
