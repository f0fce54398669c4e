//! What a page says of one cell.

use kvm_integration::guestperf::CellResult;

use super::charts::Charts;
use super::frame::Undrawn;
use super::palette::{Palette, policy};
use super::table;
use super::text::{escaped, figure};

/// A share of the machine's CPU time that is not worth a word if others take it.
const QUIET: f64 = 0.03;

/// The section of a cell, with its table and its charts.
pub fn section(number: usize, result: &CellResult, palette: &Palette) -> Result<String, Undrawn> {
    let mut html = format!(
        "<section class=\"cell\" id=\"cell-{number}\">\n<h2>{}</h2>\n",
        escaped(&result.cell.to_string())
    );
    html += &warnings(result);
    html += &format!(
        "<div class=\"wide\">\n{}</div>\n",
        table::of_cell(result, palette)
    );
    let charts = Charts::new(result, palette);
    if charts.arms().is_empty() {
        return Ok(html + "<p>Nothing to draw.</p>\n</section>\n");
    }
    html += "<div class=\"charts\">\n";
    let pace = format!(
        "Guest speed: milliseconds a vCPU takes for a GB, less is faster; the mean of every {} s. A \
         dot ends a migration. In the lane <i>still</i> each arm has a row, with bars where its \
         guest stood still.",
        charts.window()
    );
    html += &drawn(&charts.pace()?, &pace);
    if let Some(delays) = charts.delays()? {
        html += &drawn(&delays, "Delay that each policy chose for its reaper.");
    }
    html += &drawn(&charts.full_exits()?, "Full exits, added up.");
    html += &drawn(
        &charts.rounds()?,
        "Pages sent per round. The large dot is the round with the guest stopped.",
    );
    html += "</div>\n";
    html += &strips(&charts)?;
    Ok(html + "</section>\n")
}

/// Each arm's guest by itself, those of one policy side by side.
fn strips(charts: &Charts<'_>) -> Result<String, Undrawn> {
    let mut arms: Vec<_> = charts.arms().iter().collect();
    let place = |arm: &str| {
        let same = |other: &str| policy(other).0 == policy(arm).0;
        charts.arms().iter().position(|(paint, _)| same(paint.arm))
    };
    arms.sort_by_key(|(paint, _)| (place(paint.arm), policy(paint.arm).1));
    let shapes = [false, true].map(|qemu| arms.iter().any(|(one, _)| policy(one.arm).1 == qemu));
    let pairs = if shapes == [true, true] { "pairs" } else { "" };
    let mut html = format!(
        "<details open>\n<summary>Each arm by itself, every sample</summary>\n\
         <p>ms/GB over seconds since the migration began. The thin line is the quiet median, the \
         dotted one twice as much: above it the guest is in its drop, which is filled. Bars in the \
         lane <i>still</i> are samples in which the guest did nothing. \
         <span class=\"quiet\">Quiet phases</span> and <span class=\"stopped\">the time with the \
         guest stopped</span> are shaded.</p>\n<div class=\"charts strips {pairs}\">\n"
    );
    for (paint, one) in arms {
        let shape = if policy(paint.arm).1 { "qemu" } else { "own" };
        let figures = &one.figures;
        let mut remark = format!(
            "drop {} s, worst {} ms/GB, stall {} ms",
            figure(figures.drop_seconds),
            figure(figures.worst_ms_per_gb),
            figure(figures.longest_stall_ms)
        );
        if !figures.converged {
            remark += ", did not converge";
        }
        if figures.missed_pages > 0 {
            let pages = figures.missed_pages;
            remark += &format!(", <span class=\"missed\">⚠ {pages} pages missed</span>");
        }
        html += &format!(
            "<figure class=\"{shape} of-arm-{}\">\n<figcaption>{}<b>{}</b>: {remark}</figcaption>\n\
             {}</figure>\n",
            paint.number,
            paint.swatch(),
            escaped(paint.arm),
            charts.strip(*paint, one)?
        );
    }
    Ok(html + "</div>\n</details>\n")
}

fn drawn(svg: &str, caption: &str) -> String {
    format!("<figure>\n<figcaption>{caption}</figcaption>\n{svg}</figure>\n")
}

/// What spoils figures.
fn warnings(result: &CellResult) -> String {
    let mut html = String::new();
    for arm in result.arms.iter().filter(|arm| arm.missed_pages() > 0) {
        html += &format!(
            "<p class=\"missed\">⚠ {} missed {} pages: its figures mean nothing.</p>\n",
            escaped(arm.arm),
            arm.missed_pages()
        );
    }
    if let Some(others) = result.others.filter(|others| *others > QUIET) {
        let percent = others * 100.0;
        html += &format!(
            "<p class=\"warning\">Other programs took {percent:.0} % of the machine: figures \
             suffer.</p>\n"
        );
    }
    html
}
