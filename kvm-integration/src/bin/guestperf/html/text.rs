//! Text and figures, as they stand in a page.

use kvm_integration::guestperf::Spread;

/// What stands where there is no figure.
pub const NONE: &str = "–";

/// Text that says what it says in HTML, too, between tags and in quoted attributes.
pub fn escaped(text: &str) -> String {
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

/// Three digits of a figure; all of a small whole number. What is not finite is no figure.
pub fn figure(value: f64) -> String {
    let (number, unit) = in_thousands(value);
    match unit {
        "" => number,
        unit => format!("{number}\u{a0}{unit}"),
    }
}

/// From the least to the most, if these differ to the eye.
pub fn extremes(spread: Spread) -> Option<String> {
    let (least, most) = (in_thousands(spread.least), in_thousands(spread.most));
    match least {
        _ if least == most => None,
        // The unit need not be said twice.
        (number, unit) if unit == most.1 => Some(format!("{number}–{}", figure(spread.most))),
        _ => Some(format!("{}–{}", figure(spread.least), figure(spread.most))),
    }
}

/// A number, and in what.
fn in_thousands(value: f64) -> (String, &'static str) {
    match value {
        _ if !value.is_finite() => (NONE.into(), ""),
        // So many stand as they are.
        ..9999.5 => (digits(value), ""),
        ..999_500.0 => (digits(value / 1e3), "k"),
        ..999_500_000.0 => (digits(value / 1e6), "M"),
        _ => (digits(value / 1e9), "G"),
    }
}

fn digits(value: f64) -> String {
    match value {
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        ..0.0995 => format!("{value:.3}"),
        ..9.995 => format!("{value:.2}"),
        ..99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_can_not_become_markup() {
        assert_eq!(
            escaped("<b a=\"1\" c='2'>&"),
            "&lt;b a=&quot;1&quot; c=&#39;2&#39;&gt;&amp;"
        );
    }

    #[test]
    fn figures_have_three_digits() {
        let cases = [
            (0.0, "0"),
            (3.0, "3"),
            (0.0123, "0.012"),
            (45.67, "45.7"),
            (9.999, "10.0"),
            (99.96, "100"),
            (1000.0, "1000"),
            (4567.8, "4568"),
            (45_678.0, "45.7\u{a0}k"),
            (99_999.0, "100\u{a0}k"),
            (999_900.0, "1.00\u{a0}M"),
            (10_000.0, "10\u{a0}k"),
            (123_456_789.0, "123\u{a0}M"),
            (5e9, "5\u{a0}G"),
            (f64::NAN, NONE),
            (f64::INFINITY, NONE),
        ];
        for (value, text) in cases {
            assert_eq!(figure(value), text);
        }
    }

    #[test]
    fn equal_extremes_are_none() {
        let spread = |least, most| Spread {
            median: least,
            least,
            most,
        };
        assert_eq!(extremes(spread(1.0, 1.0)), None);
        assert_eq!(extremes(spread(213_800.0, 213_900.0)), None);
        let texts = [
            (1.0, 1.5, "1–1.50"),
            (2e5, 212_345.0, "200–212\u{a0}k"),
            (500.0, 20_500.0, "500–20.5\u{a0}k"),
        ];
        for (least, most, text) in texts {
            assert_eq!(extremes(spread(least, most)).as_deref(), Some(text));
        }
    }
}
