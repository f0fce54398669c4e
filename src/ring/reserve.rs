// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The room that kernels leave in a ring.

use crate::kernel::RESERVED_ENTRIES;

/// Half of the entries that a kernel keeps free before a vCPU stops, for those that are logged on its way out: without those for the
/// hardware's buffer, and at most a small ring's share.
pub(super) fn half_reserve(reserved: u32, entries: u32) -> u32 {
    let kept = reserved.min(RESERVED_ENTRIES).min(entries / 32);
    (kept / 2).max(1)
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;

    #[test]
    fn half_of_a_reserve_leaves_the_hardwares_buffer_out() {
        let halves = [
            (64, 4096, 32),
            (64, 65536, 32),
            (64 + 512, 4096, 32),
            (8, 4096, 4),
            (64, 1024, 16),
            (64, 128, 2),
            (64, 8, 1),
            (1, 4096, 1),
        ];
        for (reserved, entries, half) in halves {
            assert_eq!(
                half_reserve(reserved, entries),
                half,
                "{reserved} of {entries}"
            );
        }
    }
}
