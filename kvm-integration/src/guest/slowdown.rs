// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A tiny guest that is slower than its machine, so that a fast one shows what holds on fast ones only.
//!
//! What the first write to a protected page costs differs tenfold among machines, and what a test
//! takes for granted on one never happens on another. With `TINY_GUEST_TURNS=60000` in the environment
//! each vCPU with a [`Load`](crate::Load) at [`Mode::Native`](crate::Mode::Native) goes through so many
//! turns of an empty loop for each page that it stores to, about a clock cycle each: some 20 µs.
//! Programs started by a test inherit it; what they measure then is the slower guest.

use std::env;
use std::sync::OnceLock;

/// The variable.
pub const VARIABLE: &str = "TINY_GUEST_TURNS";
/// A day of cycles for each store is enough, and no sum of them overflows.
const MOST: u64 = 1 << 48;

/// How many turns for each store: none, unless the environment says otherwise.
///
/// # Panics
/// If what it says is no number, or too large.
pub fn turns_per_store() -> u64 {
    static TURNS: OnceLock<u64> = OnceLock::new();
    *TURNS.get_or_init(|| env::var(VARIABLE).map_or(0, |value| parse(&value)))
}

fn parse(value: &str) -> u64 {
    let turns = value.parse().ok().filter(|&turns| turns <= MOST);
    turns.unwrap_or_else(|| panic!("{VARIABLE} is `{value}`: give it a number, at most {MOST}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_and_others_refused() {
        assert_eq!([parse("0"), parse("60000")], [0, 60_000]);
        for value in ["", "-1", "60us", "281474976710657"] {
            assert!(
                std::panic::catch_unwind(|| parse(value)).is_err(),
                "{value}"
            );
        }
    }
}
