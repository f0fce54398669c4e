//! The tables of a page.

use kvm_integration::guestperf::{ArmResult, CellResult};

use super::column::{Column, DROP, FELT, SPENT, Standing, WORST};
use super::palette::Palette;
use super::text::{NONE, escaped, extremes, figure};

/// All figures of one cell: a row an arm.
pub fn of_cell(result: &CellResult, palette: &Palette) -> String {
    let mut html = String::from("<table>\n<thead><tr><th scope=\"col\">arm</th>");
    html.extend(FELT.iter().map(heading));
    html += "<th scope=\"col\">con\u{ad}verged</th><th scope=\"col\">missed pages</th>";
    html.extend(SPENT.iter().map(heading));
    html += "</tr></thead>\n<tbody>\n";
    for arm in &result.arms {
        let swatch = palette.paint(arm.arm).map(|paint| paint.swatch());
        let class = if arm.missed_pages() > 0 { "missed" } else { "" };
        html += &format!(
            "<tr><th scope=\"row\" class=\"{class}\">{}{}</th>",
            swatch.unwrap_or_default(),
            escaped(arm.arm)
        );
        html.extend(FELT.iter().map(|column| cell(column, arm, result)));
        html += &converged(arm);
        html += &missed(arm);
        html.extend(SPENT.iter().map(|column| cell(column, arm, result)));
        html += "</tr>\n";
    }
    html + "</tbody>\n</table>\n"
}

/// Drop and worst of all cells and arms; each cell links to what else there is of it.
pub fn at_a_glance(results: &[CellResult], palette: &Palette) -> String {
    let mut html =
        String::from("<table class=\"glance\">\n<thead><tr><th scope=\"col\">guest</th>");
    for paint in palette.paints() {
        html += &format!(
            "<th scope=\"col\">{}{}</th>",
            paint.swatch(),
            // A long name may break where its parts meet.
            escaped(paint.arm).replace('-', "-<wbr>")
        );
    }
    html += "</tr></thead>\n<tbody>\n";
    for (number, result) in results.iter().enumerate() {
        html += &format!(
            "<tr><th scope=\"row\"><a href=\"#cell-{number}\">{}</a></th>",
            escaped(&result.cell.to_string())
        );
        for paint in palette.paints() {
            let arm = result.arms.iter().find(|arm| arm.arm == paint.arm);
            html += &arm.map_or_else(|| format!("<td>{NONE}</td>"), |arm| glance(arm, result));
        }
        html += "</tr>\n";
    }
    html + "</tbody>\n</table>\n"
}

/// Drop over worst; how the drop compares is marked.
fn glance(arm: &ArmResult, result: &CellResult) -> String {
    let median = |column: &Column| {
        let spread = arm.spread(column.of);
        spread.map_or_else(|| NONE.into(), |spread| figure(spread.median))
    };
    if arm.missed_pages() > 0 {
        return missed(arm);
    }
    let part = |column: &Column, class: &str| {
        let standing = class_of(column.standing(arm, result));
        format!(
            "<span class=\"{class} {standing}\">{}</span>",
            median(column)
        )
    };
    let all = arm.migrations.iter().all(|one| one.figures.converged);
    format!(
        "<td>{}{}{}</td>",
        part(&DROP, "drop"),
        part(&WORST, "worst"),
        if all {
            ""
        } else {
            "<span class=\"spread\">not converged</span>"
        }
    )
}

fn cell(column: &Column, arm: &ArmResult, result: &CellResult) -> String {
    let Some(spread) = arm.spread(column.of) else {
        return format!("<td>{NONE}</td>");
    };
    let extremes = extremes(spread).unwrap_or_default();
    format!(
        "<td class=\"{}\">{}<span class=\"spread\">{extremes}</span></td>",
        class_of(column.standing(arm, result)),
        figure(spread.median)
    )
}

fn class_of(standing: Standing) -> &'static str {
    match standing {
        Standing::Best => "best",
        Standing::Close => "close",
        Standing::Plain => "",
    }
}

fn converged(arm: &ArmResult) -> String {
    let all = arm.migrations.len();
    let converged = arm.migrations.iter().filter(|one| one.figures.converged);
    let converged = converged.count();
    let class = if converged < all { "not" } else { "" };
    format!("<td class=\"{class}\">{converged} of {all}</td>")
}

/// Nobody is to overlook these.
fn missed(arm: &ArmResult) -> String {
    match arm.missed_pages() {
        0 if arm.migrations.is_empty() => format!("<td>{NONE}</td>"),
        0 => "<td>0</td>".into(),
        pages => format!("<td class=\"missed\">⚠ {pages} missed</td>"),
    }
}

fn heading(column: &Column) -> String {
    let Column { name, what, .. } = column;
    let unit = match column.unit {
        "" => String::new(),
        unit => format!("<span class=\"unit\">{unit}</span>"),
    };
    format!("<th scope=\"col\" title=\"{what}\">{name}{unit}</th>")
}
