// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages: the legend, tables, and what stands around charts.

use plotters::style::Color;

use super::{Chart, Undrawn};
use crate::cli::markdown::Table;

/// Readable in light and dark, narrow and wide, and on paper.
const STYLE: &str = include_str!("style.css");

/// One of those that are compared, the same everywhere on a page.
#[derive(Debug, Clone, Copy)]
pub struct Arm {
    /// Its name.
    pub name: &'static str,
    /// The number of its hue in the style.
    pub hue: usize,
    /// Whether its lines are dashed.
    pub dashed: bool,
}

/// The arms of a page, each with a colour.
#[derive(Debug)]
pub struct Legend {
    /// By their numbers.
    pub arms: Vec<Arm>,
}

impl Legend {
    /// Of these arms; each counts once.
    pub fn new(arms: impl IntoIterator<Item = Arm>) -> Self {
        let mut distinct: Vec<Arm> = Vec::new();
        for arm in arms {
            if distinct.iter().all(|other| other.name != arm.name) {
                distinct.push(arm);
            }
        }
        Self { arms: distinct }
    }

    /// Its place among the arms, if it is one.
    pub fn number(&self, name: &str) -> Option<usize> {
        self.arms.iter().position(|arm| arm.name == name)
    }

    /// The name, after a piece of the line if it is an arm's.
    pub fn named(&self, name: &str) -> String {
        let swatch = self.number(name).map(|number| {
            format!(
                "<svg class=\"swatch\" viewBox=\"0 0 30 10\" aria-hidden=\"true\"><path \
                 d=\"M0 5h30\" stroke-width=\"3\" stroke=\"{}\"/></svg>",
                key(number)
            )
        });
        swatch.unwrap_or_default() + &escaped(name)
    }

    /// The legend of the charts; each arm can be switched off.
    pub fn html(&self, title: &str) -> String {
        let mut html = format!("<fieldset class=\"legend\">\n<legend>{title}</legend>\n");
        for (number, arm) in self.arms.iter().enumerate() {
            let named = self.named(arm.name);
            html += &format!(
                "<label><input type=\"checkbox\" id=\"arm-{number}\" checked>{named}</label>\n"
            );
        }
        html + "</fieldset>\n"
    }

    /// The rules that give an arm its hue and its dashes, and hide it if it is switched off.
    fn css(&self) -> String {
        let mut css = String::new();
        for (number, Arm { hue, dashed, .. }) in self.arms.iter().enumerate() {
            let key = key(number);
            css += &format!(
                "[stroke=\"{key}\"] {{ stroke: var(--hue-{hue}); }}\n\
                 [fill=\"{key}\"] {{ fill: var(--hue-{hue}); }}\n\
                 body:has(#arm-{number}:not(:checked)) .charts \
                 :is([stroke=\"{key}\"], [fill=\"{key}\"], .of-arm-{number}) {{ display: none; }}\n"
            );
            if *dashed {
                // An arm by itself needs none, and every sample of it is hard to read in dashes.
                css += &format!(
                    ":is(.swatch path, .charts:not(.strips) polyline)[stroke=\"{key}\"] \
                     {{ stroke-dasharray: 5 3; }}\n"
                );
            }
        }
        css
    }
}

/// The key of an arm, as plotters writes it.
fn key(number: usize) -> String {
    let (r, g, b) = super::arm(number).rgb();
    format!("#{r:02X}{g:02X}{b:02X}")
}

/// The whole of it.
pub fn page(title: &str, legend: &Legend, body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{title}</title>\n<style>\n{STYLE}{}</style>\n</head>\n<body>\n<h1>{title}</h1>\n\
         {body}</body>\n</html>\n",
        legend.css()
    )
}

/// What is to be known first: name and value.
pub fn facts(facts: &[(&str, String)]) -> String {
    let fact = |(name, value): &(&str, String)| {
        format!("<dt>{}</dt><dd>{}</dd>\n", escaped(name), escaped(value))
    };
    let facts: String = facts.iter().map(fact).collect();
    format!("<dl class=\"facts\">\n{facts}</dl>\n")
}

/// What is said of a guest, under its name, to which tables link.
pub fn section(guest: &str, body: &str) -> String {
    format!(
        "<section class=\"cell\" id=\"{}\">\n<h2>{}</h2>\n{body}</section>\n",
        anchor(guest),
        escaped(guest)
    )
}

/// What spoils figures.
pub fn remarks(remarks: &[String]) -> String {
    let remark = |text: &String| format!("<p class=\"{}\">{}</p>\n", class(text), escaped(text));
    remarks.iter().map(remark).collect()
}

/// A chart under its caption, which is HTML, and is there for those, too, who can't see the chart.
/// One of a single arm is of the class `of-arm-NUMBER`.
///
/// # Errors
/// It can't be drawn.
pub fn figure(class: &str, caption: &str, chart: &Chart<'_>) -> Result<String, Undrawn> {
    let after_tag = |part| str::split_once(part, '>').map_or(part, |(_, text)| text);
    let text: String = caption.split('<').map(after_tag).collect();
    let named = format!("<svg role=\"img\" aria-label=\"{text}\" ");
    // What is so anyway is said thousands of times.
    let svg = chart
        .draw()?
        .replace(" opacity=\"1\"", "")
        .replacen("<svg ", &named, 1);
    let caption = format!("<figcaption>{caption}</figcaption>");
    Ok(format!(
        "<figure class=\"{class}\">\n{caption}\n{svg}</figure>\n"
    ))
}

/// A table, whose cells are marked as their signs say. What is in parentheses, or after a stroke,
/// stands below. Guests, if rows are theirs, link to their sections.
pub fn table(table: &Table, legend: &Legend) -> String {
    let mut html = String::from("<div class=\"wide\">\n<table>\n<thead><tr>");
    for head in &table.head {
        html += &format!("<th scope=\"col\">{}</th>", legend.named(head));
    }
    html += "</tr></thead>\n<tbody>\n";
    for row in &table.rows {
        for (column, cell) in row.iter().enumerate() {
            html += &match column {
                0 if table.head[0] == "guest" => format!(
                    "<tr><th scope=\"row\"><a href=\"#{}\">{}</a></th>",
                    anchor(cell),
                    escaped(cell)
                ),
                0 => format!("<tr><th scope=\"row\">{}</th>", legend.named(cell)),
                _ => format!("<td>{}</td>", parts(cell)),
            };
        }
        html += "</tr>\n";
    }
    html + "</tbody>\n</table>\n</div>\n"
}

fn parts(cell: &str) -> String {
    let (cell, remark) = cell.split_once(" (").unwrap_or((cell, ""));
    let part = |part: &str| {
        let class = class(part);
        format!("<span class=\"{class}\">{}</span>", escaped(part))
    };
    let mut html: String = cell.split(" / ").map(part).collect();
    if let Some(remark) = remark.strip_suffix(')') {
        html += &format!("<small>{}</small>", escaped(remark));
    }
    html
}

/// How something is marked that begins with this sign.
fn class(text: &str) -> &'static str {
    match text.chars().next() {
        Some('★') => "best",
        Some('≈') => "close",
        Some('✓') => "good",
        Some('✗') => "bad",
        Some('⚠') => "alarm",
        _ => "",
    }
}

fn anchor(guest: &str) -> String {
    let fit = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    guest.chars().map(fit).collect()
}

/// Text that says what it says in HTML, too, between tags and in quoted attributes.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe += "&amp;",
            '<' => safe += "&lt;",
            '>' => safe += "&gt;",
            '"' => safe += "&quot;",
            '\'' => safe += "&#39;",
            other => safe.push(other),
        }
    }
    safe
}
