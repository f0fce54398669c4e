// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The report as a page.

mod charts;
mod points;
#[cfg(test)]
mod tests;

use kvm_integration::Host;
use kvm_integration::charts::{
    Arm, Legend, Undrawn, facts, page as whole, remarks, section, table as html,
};
use kvm_integration::guestperf::{self, CellResult};

use self::charts::charts;
use crate::column::{DROP_NOISE, STALL_NOISE};
use crate::report::missed_pages;
use crate::table;
use crate::verdict::Verdict;

/// What is measured, and what the figures are.
const INTRODUCTION: &str = include_str!("introduction.html");

/// All results on one page: on what machine, under which facts, how ours compares, what came of each
/// cell.
///
/// # Errors
/// A chart can't be drawn.
pub fn page(
    host: &Host,
    title_facts: &[(&str, String)],
    results: &[CellResult],
    verdicts: &[Verdict],
) -> Result<String, Undrawn> {
    let legend = legend(results);
    let machine = [("host", host.to_string()), ("CPU", host.cpu.clone())];
    let mut body = facts(&[&machine, title_facts].concat()) + &soundness(results) + INTRODUCTION;
    body += &html(&table::overview(results), &legend);
    if !verdicts.is_empty() {
        body += &format!(
            "<h2>Is adaptive the best?</h2>\n<p>{}. A drop within {} ms of the best, which is one \
             sample, and a stall within {STALL_NOISE} ms cannot be distinguished from it.</p>\n{}",
            table::summary(verdicts),
            DROP_NOISE * 1e3,
            html(&table::verdicts(verdicts), &legend)
        );
    }
    body += &legend.html("Lines (dashed: QEMU's shape)");
    for result in results {
        let said = remarks(&table::remarks(result)) + &html(&table::figures(result), &legend);
        let drawn = charts(result, &legend)?;
        body += &section(&result.cell.to_string(), &(said + &drawn));
    }
    let title = "What the guest feels of its migration";
    Ok(whole(title, &legend, &body))
}

/// A hue a policy; QEMU's shape is dashed.
fn legend(results: &[CellResult]) -> Legend {
    let arms = results.iter().flat_map(|result| &result.arms);
    Legend::new(arms.map(|arm| {
        let policy = arm.arm.trim_start_matches("qemu-");
        let mut policies = guestperf::Arm::ALL.iter();
        let hue = policies.position(|arm| arm.name == policy);
        Arm {
            name: arm.arm,
            hue: hue.unwrap_or_default(),
            dashed: policy != arm.arm,
        }
    }))
}

/// Whether the copies are true: without that all figures are vain.
fn soundness(results: &[CellResult]) -> String {
    let arms = results.iter().flat_map(|result| &result.arms);
    let migrations: usize = arms.map(|arm| arm.migrations.len()).sum();
    match missed_pages(results) {
        0 => format!("<p class=\"sound\">✓ {migrations} migrations, 0 missed pages.</p>\n"),
        missed => format!(
            "<p class=\"alarm\" role=\"alert\">⚠ {missed} pages differ after migrations: the \
             figures of the arms that missed them mean nothing.</p>\n"
        ),
    }
}
