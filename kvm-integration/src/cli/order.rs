// SPDX-License-Identifier: Apache-2.0 OR MIT
//! In which order arms take turns.

/// The places of `count` arms in round `round`: each second round goes backwards, and each two begin
/// one place further on, so that no arm always comes after the same other one.
pub fn places(count: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |turn| {
        let turn = if round % 2 == 0 {
            turn
        } else {
            count - 1 - turn
        };
        (turn + round / 2) % count
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_arm_has_a_turn_and_another_one_before_it() {
        for count in [1, 2, 5, 11] {
            let order = |round| places(count, round).collect::<Vec<_>>();
            for round in 0..5 {
                let mut sorted = order(round);
                sorted.sort_unstable();
                assert_eq!(sorted, (0..count).collect::<Vec<_>>());
            }
            let pairs = |round| {
                order(round)
                    .windows(2)
                    .map(|pair| [pair[0], pair[1]])
                    .collect()
            };
            let [first, second]: [HashSet<_>; 2] = [pairs(0), pairs(1)];
            assert!(first.is_disjoint(&second), "{count}: {first:?}, {second:?}");
        }
    }
}
