//! Figures for people: tables that are aligned, and Markdown, too.

/// With about three digits that count.
pub fn figure(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        ..0.1 => format!("{value:.3}"),
        ..10.0 => format!("{value:.2}"),
        ..100.0 => format!("{value:.1}"),
        ..1e4 => format!("{value:.0}"),
        ..1e6 => format!("{:.1} k", value / 1e3),
        _ => format!("{:.1} M", value / 1e6),
    }
}

/// Words to the left, figures to the right: a column has one or the other.
pub fn aligned(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let is_figure = |text: &str| text.starts_with(|c: char| c.is_ascii_digit() || c == '-');
    let columns: Vec<(usize, bool)> = (0..head.len())
        .map(|column| {
            let cells = || rows.iter().map(|row| row[column].as_str());
            let width = cells()
                .chain([head[column]])
                .map(|cell| cell.chars().count());
            (width.max().unwrap_or(0), cells().all(is_figure))
        })
        .collect();
    let line = |row: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, &(width, figures)) in row.zip(&columns) {
            text += &match figures {
                true => format!("| {cell:>width$} "),
                false => format!("| {cell:<width$} "),
            };
        }
        text + "|\n"
    };
    let mut text = line(&mut head.iter().copied());
    for &(width, figures) in &columns {
        let end = if figures { ':' } else { '-' };
        text += &format!("|{}{end}", "-".repeat(width + 1));
    }
    text += "|\n";
    for row in &rows {
        text += &line(&mut row.iter().map(String::as_str));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        let cases = [
            (0.0, "0"),
            (0.0123, "0.012"),
            (1.0, "1.00"),
            (45.67, "45.7"),
            (4567.8, "4568"),
            (45_678.0, "45.7 k"),
            (123_456_789.0, "123.5 M"),
        ];
        for (value, text) in cases {
            assert_eq!(figure(value), text);
        }
    }
}
