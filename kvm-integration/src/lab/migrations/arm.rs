// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a migration tracks what the guest writes.

use kvm_dirty_ring::Mode;

use crate::migration::Places;

/// Rings or bitmaps, with or without a working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arm {
    /// What it is called.
    pub name: &'static str,
    /// How writes are logged.
    pub mode: Mode,
    /// Whether pages may stay open.
    pub has_working_set: bool,
}

impl Arm {
    /// Rings that protect every page.
    pub const RINGS: Self = Self::new("rings", Mode::Rings, false);
    /// Rings with a working set.
    pub const RINGS_WS: Self = Self::new("rings+ws", Mode::Rings, true);
    /// Bitmaps, all of whose bits are cleared.
    pub const BITMAP: Self = Self::new("bitmap", Mode::Bitmap, false);
    /// Bitmaps with a working set.
    pub const BITMAP_WS: Self = Self::new("bitmap+ws", Mode::Bitmap, true);

    /// Every arm.
    pub const ALL: [Self; 4] = [Self::RINGS, Self::BITMAP, Self::RINGS_WS, Self::BITMAP_WS];

    const fn new(name: &'static str, mode: Mode, has_working_set: bool) -> Self {
        Self {
            name,
            mode,
            has_working_set,
        }
    }

    pub(super) fn places(&self) -> Places {
        match self.has_working_set {
            true => Places::Auto,
            false => Places::Off,
        }
    }
}
