// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a vCPU stores into a page, and where.

use crate::guest::memory::PAGE_SIZE;

/// Bytes between the places in a page of two vCPUs.
const LANE: u64 = 64;

/// How many vCPUs there can be: each has a cache line of its own in every page.
pub const MAX_VCPUS: u32 = 32;
const _: () = assert!(MAX_VCPUS as u64 * LANE <= PAGE_SIZE);

/// Where in each page vCPU `index` stores its stamp, in bytes.
pub fn stamp_offset(index: u32) -> u64 {
    u64::from(index) * LANE
}

/// What vCPU `index` stores in its pass number `pass`, of which the first is number 1.
pub fn stamp(index: u32, pass: u64) -> u64 {
    (u64::from(index) + 1) << 40 | pass
}

/// Which vCPU's stamp this is, and of which pass; `None` if it is no stamp.
pub fn split_stamp(stamp: u64) -> Option<(u32, u64)> {
    let index = u32::try_from(stamp >> 40).ok()?.checked_sub(1)?;
    let pass = stamp & ((1 << 40) - 1);
    (index < MAX_VCPUS && pass > 0).then_some((index, pass))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_split() {
        assert_eq!(split_stamp(stamp(31, 5)), Some((31, 5)));
        assert_eq!(split_stamp(0), None);
        assert_eq!(split_stamp(77), None);
    }
}
