//! Whether the crate's own way is the best, as a section of a page.

use super::text::{escaped, figure};
use crate::verdict::{Best, DROP_NOISE, STALL_NOISE, Verdict};

/// Nothing, if nothing was compared.
pub fn section(verdicts: &[Verdict]) -> String {
    if verdicts.is_empty() {
        return String::new();
    }
    let reached = |best: fn(&Verdict) -> &Best| {
        let reached = verdicts.iter().filter(|verdict| best(verdict).reached);
        reached.count()
    };
    let (all, rings) = (reached(|one| &one.best), reached(|one| &one.best_of_rings));
    let (of, drop_ms) = (verdicts.len(), DROP_NOISE * 1e3);
    let mut html = format!(
        "<section>\n<h2>Is look-first the best?</h2>\n<p>It is the best or within 5 % of it in \
         {all} of {of} cases, and in {rings} of {of} among the arms with rings. A drop within \
         {drop_ms} ms of the best, which is one sample, and a stall within {STALL_NOISE} ms can't be \
         told from it.</p>\n<div class=\"wide\">\n<table>\n<thead><tr><th scope=\"col\">guest</th>\
         <th scope=\"col\">measure</th><th scope=\"col\">look-first</th>\
         <th scope=\"col\">best of all</th><th scope=\"col\">best with rings</th></tr></thead>\n\
         <tbody>\n"
    );
    for verdict in verdicts {
        html += &format!(
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td>{}{}</tr>\n",
            escaped(&verdict.cell.to_string()),
            escaped(verdict.measure),
            figure(verdict.ours),
            best(&verdict.best),
            best(&verdict.best_of_rings)
        );
    }
    html + "</tbody>\n</table>\n</div>\n</section>\n"
}

fn best(best: &Best) -> String {
    let (class, sign) = match best.reached {
        true => ("close", "✓"),
        false => ("not", "✗"),
    };
    let (arm, value) = (escaped(best.arm), figure(best.value));
    format!("<td class=\"{class}\">{sign} {arm}: {value}</td>")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{cell_result, figures};
    use crate::verdict::verdicts;

    #[test]
    fn what_was_not_reached_is_marked() {
        let slow = kvm_integration::guestperf::Figures {
            drop_seconds: 3.0,
            ..figures()
        };
        let result = cell_result(&[("bitmap", &[figures()]), ("look-first", &[slow])]);
        let html = section(&verdicts(&[result]));
        assert!(
            html.contains("in 3 of 4 cases, and in 4 of 4 among"),
            "{html}"
        );
        assert!(html.contains("<td class=\"not\">✗ bitmap: 1.5"), "{html}");
        assert_eq!(html.matches("✗").count(), 1, "{html}");
        assert_eq!(html.matches("✓").count(), 7, "{html}");
        assert_eq!(section(&[]), "");
    }
}
