// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Recorded loads.

use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};

/// The most vCPUs that a VM may have.
pub const MOST_VCPUS: usize = 1024;

/// How many page stores a second each vCPU made, over time.
///
/// As text it is a line for each change, `seconds,vcpu,rate`: from then on the vCPU makes so many
/// page stores a second, until its next line. Before its first it makes none, and after its last it
/// goes on at that rate. A vCPU's lines are in order of time. Empty lines are skipped, and what
/// follows a `#`.
///
/// ```
/// use kvm_integration::lab::sim::Recording;
///
/// let text = "# two vCPUs\n0,0,45000\n0.5,1,2000\n1.25,0,0\n";
/// let recording: Recording = text.parse()?;
/// assert_eq!(recording.vcpus(), 2);
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Recording {
    /// Each vCPU's changes: seconds, and the rate from then on.
    changes: Vec<Vec<(f64, f64)>>,
}

impl Recording {
    /// vCPUs that appear in it, and those of lower numbers.
    pub fn vcpus(&self) -> usize {
        self.changes.len()
    }

    /// vCPUs that ever store anything.
    pub fn busy(&self) -> usize {
        let stores = |changes: &&Vec<(f64, f64)>| changes.iter().any(|&(_, rate)| rate > 0.0);
        self.changes.iter().filter(stores).count()
    }

    /// The highest rate of any vCPU.
    pub fn peak(&self) -> f64 {
        let rates = self.changes.iter().flatten().map(|&(_, rate)| rate);
        rates.fold(0.0, f64::max)
    }

    /// The changes of one vCPU; none if it does not appear.
    pub(super) fn of(&self, vcpu: usize) -> &[(f64, f64)] {
        self.changes.get(vcpu).map_or(&[], Vec::as_slice)
    }

    fn add(&mut self, line: &str) -> Result<()> {
        let fields: Vec<_> = line.split(',').map(str::trim).collect();
        let &[at, vcpu, rate] = &fields[..] else {
            let found = fields.len();
            bail!("{found} fields instead of seconds, vcpu, rate");
        };
        let (at, rate) = (number(at)?, number(rate)?);
        let index = vcpu.parse::<usize>();
        let vcpu = index.with_context(|| format!("`{vcpu}` is no vCPU"))?;
        ensure!(
            vcpu < MOST_VCPUS,
            "vCPU {vcpu} is beyond the {MOST_VCPUS} there can be"
        );
        if self.changes.len() <= vcpu {
            self.changes.resize(vcpu + 1, Vec::new());
        }
        let changes = &mut self.changes[vcpu];
        let in_order = changes.last().is_none_or(|&(last, _)| last <= at);
        ensure!(
            in_order,
            "the line before of vCPU {vcpu} is of a later time"
        );
        changes.push((at, rate));
        Ok(())
    }
}

fn number(field: &str) -> Result<f64> {
    let number = field.parse::<f64>();
    let number = number.with_context(|| format!("`{field}` is no number"))?;
    let is_sound = number.is_finite() && number >= 0.0;
    ensure!(is_sound, "`{field}` is negative or not finite");
    Ok(number)
}

impl FromStr for Recording {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut recording = Self::default();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or_default().trim();
            if !line.is_empty() {
                recording
                    .add(line)
                    .with_context(|| format!("line {number}"))?;
            }
        }
        Ok(recording)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_changes() {
        let text = "0,0,45000\n1.25,0,0\n0.5,2,2000\n0.5,2,1\n";
        let recording: Recording = text.parse().unwrap();
        assert_eq!(recording.vcpus(), 3);
        assert_eq!(recording.peak(), 45_000.0);
        assert!(recording.of(1).is_empty() && recording.of(3).is_empty());
        assert_eq!(recording.of(0), [(0.0, 45_000.0), (1.25, 0.0)]);
        assert_eq!(recording.of(2), [(0.5, 2000.0), (0.5, 1.0)]);
        let dressed = "# at 1 Hz\n\n 0 , 0 , 45000 # busy\n0.5,2,2000\r\n1.25,0,0\n0.5,2,1";
        assert_eq!(dressed.parse::<Recording>().unwrap(), recording);
        assert_eq!("".parse::<Recording>().unwrap(), Recording::default());
    }

    #[test]
    fn says_which_line_is_wrong_and_why() {
        for (text, line, words) in [
            ("0,0", 1, "2 fields"),
            ("0,0,1\n0,0,1,1", 2, "4 fields"),
            ("\n\nx,0,1", 3, "`x` is no number"),
            ("0,0,", 1, "`` is no number"),
            ("0,0,-1", 1, "`-1` is negative"),
            ("NaN,0,1", 1, "`NaN` is negative or not finite"),
            ("0,0,inf", 1, "`inf` is negative or not finite"),
            ("0,-1,1", 1, "`-1` is no vCPU"),
            ("0,1024,1", 1, "vCPU 1024 is beyond"),
            ("1,0,1\n0,1,1\n0.5,0,1", 3, "later time"),
        ] {
            let error = format!("{:#}", text.parse::<Recording>().unwrap_err());
            let wanted = error.starts_with(&format!("line {line}: ")) && error.contains(words);
            assert!(wanted, "{text:?}: {error}");
        }
    }
}
