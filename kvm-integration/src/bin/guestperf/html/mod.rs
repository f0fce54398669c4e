//! The report as a page: one file, which needs no other and no network.

mod axis;
mod cell;
mod charts;
mod column;
mod frame;
mod palette;
mod points;
mod table;
mod text;
mod verdicts;

#[cfg(test)]
mod synthetic;
#[cfg(test)]
mod tests;

use kvm_integration::Host;
use kvm_integration::guestperf::{ArmResult, CellResult};

use self::column::{Column, FELT, SPENT};
pub use self::frame::Undrawn;
use self::palette::Palette;
use self::text::escaped;
use crate::verdict::Verdict;

/// Readable in light and dark, narrow and wide, and on paper.
const STYLE: &str = include_str!("style.css");

const TITLE: &str = "What the guest feels of its migration";

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
    let palette = Palette::of(results);
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>guestperf: {}</title>\n<style>\n{STYLE}{}</style>\n</head>\n<body>\n",
        escaped(&host.to_string()),
        palette.css()
    );
    html += &format!("<header>\n<h1>{TITLE}</h1>\n{}", facts(host, title_facts));
    html += &verdict(results);
    html += &format!("</header>\n<main>\n{}", introduction());
    html += &format!(
        "<section>\n<h2>At a glance</h2>\n<p>Upper figure: drop, s. Lower figure: worst, ms/GB. \
         Medians; marked as in the tables below.</p>\n<div class=\"wide\">\n{}</div>\n</section>\n",
        table::at_a_glance(results, &palette)
    );
    html += &verdicts::section(verdicts);
    html += &legend(&palette);
    for (number, result) in results.iter().enumerate() {
        html += &cell::section(number, result, &palette)?;
    }
    Ok(html + "</main>\n</body>\n</html>\n")
}

/// The machine, and what else is to be known of the run.
fn facts(host: &Host, title_facts: &[(&str, String)]) -> String {
    let machine = [("host", host.to_string()), ("CPU", host.cpu.clone())];
    let mut html = String::from("<dl class=\"facts\">\n");
    for (name, value) in machine.iter().chain(title_facts) {
        html += &format!("<dt>{}</dt><dd>{}</dd>\n", escaped(name), escaped(value));
    }
    html + "</dl>\n"
}

/// Whether the copies are true: without that all figures are vain.
fn verdict(results: &[CellResult]) -> String {
    let arms = || results.iter().flat_map(|result| &result.arms);
    let migrations: usize = arms().map(|arm| arm.migrations.len()).sum();
    let missed: u64 = arms().map(ArmResult::missed_pages).sum();
    match missed {
        0 => format!("<p class=\"sound\">✓ {migrations} migrations, 0 missed pages.</p>\n"),
        _ => format!(
            "<p class=\"missed\" role=\"alert\">⚠ {missed} pages differ after migrations: the \
             figures of the arms that missed them mean nothing.</p>\n"
        ),
    }
}

fn introduction() -> String {
    let mut html = String::from(
        "<section>\n<h2>What is measured</h2>\n\
         <p>Each vCPU of a guest XORs its share of the stressed memory with random bytes, page by \
         page, as fast as it can. The guest is left alone for a while, then migrated by pre-copy, \
         then left alone again. Its progress is sampled all the while. The arms take turns. An arm is bitmap mode, \
         or dirty rings under a pacing policy; those called <i>qemu-</i> have QEMU's shape, in \
         which one lock is held by whoever empties rings, and a full exit empties every ring. A \
         GB is 2<sup>30</sup> bytes.</p>\n<details open>\n<summary>The figures</summary>\n\
         <dl class=\"figures\">\n",
    );
    let explained = |column: &Column| {
        let (name, what) = (column.heading(), column.what);
        format!("<div><dt>{name}</dt><dd>{what}</dd></div>\n")
    };
    html.extend(FELT.iter().map(explained));
    html += "<div><dt>converged</dt><dd>migrations whose last pages could be sent within the \
             downtime limit before the rounds ran out</dd></div>\n\
             <div><dt>missed pages</dt><dd>pages that differ in the end: there must be none\
             </dd></div>\n";
    html.extend(SPENT.iter().map(explained));
    html += "</dl>\n";
    html += "<p>Tables show the median of an arm's migrations, and below it the least and the \
             most. Of drop, worst, longest stall and total the <span class=\"best\">best</span> is \
             marked, and what is <span class=\"close\">within 5 %</span> of it. An arm that missed \
             pages is not compared, and the total of one that did not always converge is not, \
             either. Charts show the migration of each arm whose drop is the median.</p>\n\
             </details>\n</section>\n";
    html
}

/// Who is who in the charts; each can be switched off.
fn legend(palette: &Palette) -> String {
    let mut html = String::from(
        "<fieldset class=\"legend\">\n<legend>Lines (dashed: QEMU's shape)</legend>\n",
    );
    for paint in palette.paints() {
        html += &format!(
            "<label><input type=\"checkbox\" id=\"arm-{}\" checked>{}{}</label>\n",
            paint.number,
            paint.swatch(),
            escaped(paint.arm)
        );
    }
    html + "</fieldset>\n"
}
