// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is compared: ways to track what a guest writes.

use crate::reaping::Shape::{self, AllRings, OwnRing};
use crate::reaping::policy::Policy::{self, Adaptive, Aimd, Fixed, RunLevels, RunLevelsAsPosted};

/// One way to track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arm {
    /// Its name, in tables and on the command line.
    pub name: &'static str,
    /// What it is.
    pub tracking: Tracking,
    /// Whether pages that the guest writes again and again stay open until the last round.
    pub leaves_open: bool,
}

/// Where the written pages are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracking {
    /// KVM's bitmap, by `KVM_GET_DIRTY_LOG`: no rings, no reaper, no full exits. Where pages are to stay open, by
    /// the crate's log, which leaves their bits.
    Bitmap,
    /// Dirty rings, emptied by a reaper of that policy, and at full exits in that shape.
    Rings(Shape, Policy),
}

/// The crate's own way, to which the others are compared.
pub const OURS: &str = "adaptive";

impl Arm {
    /// Every arm, in the order in which they are shown.
    pub const ALL: [Self; 13] = [
        Self {
            name: "bitmap",
            tracking: Tracking::Bitmap,
            leaves_open: false,
        },
        Self::rings("fixed", OwnRing, Fixed),
        Self::rings("run-levels-as-posted", OwnRing, RunLevelsAsPosted),
        Self::rings("run-levels", OwnRing, RunLevels),
        Self::rings("aimd", OwnRing, Aimd),
        Self::rings(OURS, OwnRing, Adaptive),
        Self {
            leaves_open: true,
            ..Self::rings("adaptive+ws", OwnRing, Adaptive)
        },
        Self {
            name: "bitmap+ws",
            tracking: Tracking::Bitmap,
            leaves_open: true,
        },
        Self::rings("qemu-fixed", AllRings, Fixed),
        Self::rings("qemu-run-levels-as-posted", AllRings, RunLevelsAsPosted),
        Self::rings("qemu-run-levels", AllRings, RunLevels),
        Self::rings("qemu-aimd", AllRings, Aimd),
        Self::rings("qemu-adaptive", AllRings, Adaptive),
    ];

    const fn rings(name: &'static str, shape: Shape, policy: Policy) -> Self {
        Self {
            name,
            tracking: Tracking::Rings(shape, policy),
            leaves_open: false,
        }
    }

    /// The arm of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|arm| arm.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_policy_and_shape() {
        for arm in Arm::ALL {
            assert_eq!(Arm::named(arm.name), Some(arm));
            if let Tracking::Rings(shape, policy) = arm.tracking {
                let prefix = match shape {
                    Shape::OwnRing => "",
                    Shape::AllRings => "qemu-",
                };
                let suffix = if arm.leaves_open { "+ws" } else { "" };
                let policy = <&str>::from(policy);
                assert_eq!(arm.name, format!("{prefix}{policy}{suffix}"));
            }
        }
        assert!(Arm::named(OURS).is_some());
    }
}
