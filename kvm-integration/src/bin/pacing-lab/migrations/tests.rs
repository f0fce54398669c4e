// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Simulated migrations, which come out the same each time.

use super::*;

fn results() -> Results {
    simulate(Load::VARIANTS, &AtomicBool::new(false)).unwrap()
}

#[test]
fn every_target_is_met_in_the_simulation() {
    let results = results();
    println!("{}", table::figures(&results.guests));
    let judged = targets::verdicts(&results);
    println!("{}", verdicts(&judged));
    assert!(judged.len() >= 28, "{} targets", judged.len());
    let missed: Vec<_> = judged.iter().filter(|verdict| !verdict.met).collect();
    assert!(missed.is_empty(), "{missed:#?}");
}
