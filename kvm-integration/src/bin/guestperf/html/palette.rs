//! Colours and dashes: an arm has the same everywhere.
//!
//! Plotters knows neither themes nor dashes. What it is given as a colour is a key, which the style
//! of the page looks up. Without the style the keys are the colours of the light theme.

use kvm_integration::guestperf::CellResult;
use plotters::style::RGBColor;

/// The policies that are known to be compared, and how they look in the light and in the dark.
///
/// Hues that differ for those who confuse red and green, too; and they differ in lightness.
const POLICIES: [(&str, RGBColor, RGBColor); 6] = [
    ("bitmap", RGBColor(110, 110, 110), RGBColor(175, 175, 175)),
    ("fixed", RGBColor(213, 94, 0), RGBColor(255, 122, 51)),
    (
        "run-levels-as-posted",
        RGBColor(214, 155, 0),
        RGBColor(240, 212, 66),
    ),
    (
        "run-levels",
        RGBColor(181, 72, 150),
        RGBColor(240, 150, 205),
    ),
    (
        "halve-and-creep",
        RGBColor(0, 140, 100),
        RGBColor(40, 200, 150),
    ),
    ("look-first", RGBColor(0, 90, 190), RGBColor(90, 170, 255)),
];

/// For policies that are not: in order of appearance.
const OTHERS: [(RGBColor, RGBColor); 4] = [
    (RGBColor(30, 160, 200), RGBColor(120, 220, 240)),
    (RGBColor(120, 70, 20), RGBColor(200, 150, 100)),
    (RGBColor(90, 60, 160), RGBColor(170, 150, 255)),
    (RGBColor(20, 20, 20), RGBColor(255, 255, 255)),
];

/// What stands before a policy's name if it ran in QEMU's shape.
const QEMU: &str = "qemu-";

/// The arms of a page.
#[derive(Debug)]
pub struct Palette {
    paints: Vec<Paint>,
}

/// How one arm looks.
#[derive(Debug, Clone, Copy)]
pub struct Paint {
    /// The arm.
    pub arm: &'static str,
    /// Its place among the arms of the page.
    pub number: usize,
    /// Its colour in the light theme, nearly: nobody else's.
    pub key: RGBColor,
    dark: RGBColor,
}

/// The arm's policy, and whether it ran in QEMU's shape.
pub fn policy(arm: &str) -> (&str, bool) {
    match arm.strip_prefix(QEMU) {
        Some(policy) => (policy, true),
        None => (arm, false),
    }
}

impl Palette {
    /// Of all arms of these results, in order of appearance.
    pub fn of(results: &[CellResult]) -> Self {
        let mut paints: Vec<Paint> = Vec::new();
        let mut others: Vec<&str> = Vec::new();
        for arm in results.iter().flat_map(|result| &result.arms) {
            let arm = arm.arm;
            if paints.iter().any(|paint| paint.arm == arm) {
                continue;
            }
            let (policy, qemu) = policy(arm);
            let known = POLICIES.iter().find(|(name, ..)| *name == policy);
            let (light, dark) = known.map_or_else(
                || {
                    let number = others.iter().position(|other| *other == policy);
                    let number = number.unwrap_or_else(|| {
                        others.push(policy);
                        others.len() - 1
                    });
                    OTHERS[number % OTHERS.len()]
                },
                |(_, light, dark)| (*light, *dark),
            );
            let mut key = RGBColor(light.0, light.1, light.2 ^ u8::from(qemu));
            // Two steps keep to the policy's kind, and the eye does not see them.
            while paints.iter().any(|paint| paint.key == key) {
                key.1 = key.1.wrapping_add(2);
            }
            let number = paints.len();
            paints.push(Paint {
                arm,
                number,
                key,
                dark,
            });
        }
        Self { paints }
    }

    /// Everyone's.
    pub fn paints(&self) -> &[Paint] {
        &self.paints
    }

    /// This arm's, which is one of those results.
    pub fn paint(&self, arm: &str) -> Option<Paint> {
        self.paints.iter().find(|paint| paint.arm == arm).copied()
    }

    /// The rules that make colours and dashes of keys, and hide who is switched off.
    pub fn css(&self) -> String {
        let mut css = String::new();
        for paint in &self.paints {
            let Paint { number, key, .. } = paint;
            let key = hex(*key);
            css += &format!(
                ":root {{ --arm-{number}: {key}; }}\n\
                 [stroke=\"{key}\"] {{ stroke: var(--arm-{number}); }}\n\
                 [fill=\"{key}\"] {{ fill: var(--arm-{number}); }}\n\
                 body:has(#arm-{number}:not(:checked)) .charts \
                 :is([stroke=\"{key}\"], [fill=\"{key}\"], .of-arm-{number}) {{ display: none; }}\n"
            );
            if policy(paint.arm).1 {
                // An arm by itself needs none, and every sample of it is hard to read in dashes.
                css += &format!(
                    ":is(.swatch line, .charts:not(.strips) polyline)[stroke=\"{key}\"] \
                     {{ stroke-dasharray: 5 3; }}\n"
                );
            }
        }
        css += "@media screen and (prefers-color-scheme: dark) {\n:root {\n";
        for Paint { number, dark, .. } in &self.paints {
            css += &format!("--arm-{number}: {};\n", hex(*dark));
        }
        css + "}\n}\n"
    }
}

impl Paint {
    /// A piece of its line, for a legend.
    pub fn swatch(&self) -> String {
        let key = hex(self.key);
        format!(
            "<svg class=\"swatch\" viewBox=\"0 0 30 10\" aria-hidden=\"true\">\
             <line x1=\"0\" y1=\"5\" x2=\"30\" y2=\"5\" stroke-width=\"3\" stroke=\"{key}\"/></svg>"
        )
    }
}

/// As plotters writes it.
fn hex(color: RGBColor) -> String {
    let RGBColor(r, g, b) = color;
    format!("#{r:02X}{g:02X}{b:02X}")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::synthetic;
    use super::*;

    #[test]
    fn every_arm_has_a_key_of_its_own() {
        let mut results = synthetic::results(1);
        for name in ["new", "newer", "newest", "last", "one-more", "qemu-new"] {
            let arm = synthetic::arm(name, 1, 0);
            results[0].arms.push(arm);
        }
        let palette = Palette::of(&results);
        let keys: HashSet<String> = palette
            .paints()
            .iter()
            .map(|paint| hex(paint.key))
            .collect();
        assert_eq!(keys.len(), results[0].arms.len());
    }

    #[test]
    fn a_policy_has_one_colour_and_qemu_is_dashed() {
        let palette = Palette::of(&synthetic::results(1));
        let [own, qemu] = ["look-first", "qemu-look-first"].map(|arm| palette.paint(arm).unwrap());
        assert_eq!(own.dark, qemu.dark);
        let css = palette.css();
        let dashed = |paint: Paint| {
            let rule = format!("[stroke=\"{}\"] {{ stroke-dasharray", hex(paint.key));
            css.contains(&rule)
        };
        assert!(dashed(qemu) && !dashed(own), "{css}");
    }
}
