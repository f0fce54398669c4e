//! Recorded loads.

use std::fmt;
use std::num::{ParseFloatError, ParseIntError};
use std::str::FromStr;

use super::MOST_VCPUS;

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
/// # Ok::<(), kvm_integration::lab::sim::RecordingError>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Recording {
    /// Each vCPU's changes: seconds, and the rate from then on.
    changes: Vec<Vec<(f64, f64)>>,
}

/// What is wrong with a recording.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {fault}")]
pub struct RecordingError {
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong with it.
    #[source]
    pub fault: Fault,
}

/// What is wrong with a line of a recording.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It is no `seconds,vcpu,rate`.
    #[error("{found} fields instead of seconds, vcpu, rate")]
    Fields {
        /// Fields there are.
        found: usize,
    },
    /// Seconds or the rate is no number.
    #[error("`{field}` is no number")]
    Number {
        /// The field.
        field: String,
        /// What is wrong with it.
        source: ParseFloatError,
    },
    /// Seconds or the rate is a number that means nothing.
    #[error("`{field}` is negative or not finite")]
    Range {
        /// The field.
        field: String,
    },
    /// The vCPU is no whole number.
    #[error("`{field}` is no vCPU")]
    Vcpu {
        /// The field.
        field: String,
        /// What is wrong with it.
        source: ParseIntError,
    },
    /// There are no VMs with so many vCPUs here.
    #[error("vCPU {vcpu} is beyond the {MOST_VCPUS} there can be")]
    TooManyVcpus {
        /// The vCPU.
        vcpu: usize,
    },
    /// The vCPU has a line of a later time before it.
    #[error("the line before of vCPU {vcpu} is of a later time")]
    Order {
        /// The vCPU.
        vcpu: usize,
    },
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

    fn add(&mut self, line: &str) -> Result<(), Fault> {
        let fields: Vec<_> = line.split(',').map(str::trim).collect();
        let &[at, vcpu, rate] = &fields[..] else {
            let found = fields.len();
            return Err(Fault::Fields { found });
        };
        let at = number(at)?;
        let rate = number(rate)?;
        let vcpu: usize = vcpu.parse().map_err(|source| Fault::Vcpu {
            field: vcpu.into(),
            source,
        })?;
        if vcpu >= MOST_VCPUS {
            return Err(Fault::TooManyVcpus { vcpu });
        }
        if self.changes.len() <= vcpu {
            self.changes.resize(vcpu + 1, Vec::new());
        }
        let changes = &mut self.changes[vcpu];
        if changes.last().is_some_and(|&(last, _)| last > at) {
            return Err(Fault::Order { vcpu });
        }
        changes.push((at, rate));
        Ok(())
    }
}

fn number(field: &str) -> Result<f64, Fault> {
    let number: f64 = field.parse().map_err(|source| Fault::Number {
        field: field.into(),
        source,
    })?;
    match number.is_finite() && number >= 0.0 {
        true => Ok(number),
        false => Err(Fault::Range {
            field: field.into(),
        }),
    }
}

impl FromStr for Recording {
    type Err = RecordingError;

    fn from_str(text: &str) -> Result<Self, RecordingError> {
        let mut recording = Self::default();
        for (index, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if !line.is_empty() {
                let line_number = index + 1;
                recording.add(line).map_err(|fault| RecordingError {
                    line: line_number,
                    fault,
                })?;
            }
        }
        Ok(recording)
    }
}

impl fmt::Display for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (vcpu, changes) in self.changes.iter().enumerate() {
            for (at, rate) in changes {
                writeln!(f, "{at},{vcpu},{rate}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let text = "0,0,45000\n1.25,0,0\n0.5,2,2000\n0.5,2,1\n";
        let recording: Recording = text.parse().unwrap();
        assert_eq!(recording.to_string(), text);
        assert_eq!(recording.vcpus(), 3);
        assert_eq!(recording.peak(), 45_000.0);
        assert!(recording.of(1).is_empty() && recording.of(3).is_empty());
        assert_eq!(recording.of(2), [(0.5, 2000.0), (0.5, 1.0)]);
        let dressed = "# at 1 Hz\n\n 0 , 0 , 45000 # busy\n0.5,2,2000\r\n1.25,0,0\n0.5,2,1";
        assert_eq!(dressed.parse(), Ok(recording));
        assert_eq!("".parse(), Ok(Recording::default()));
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
            let error = text.parse::<Recording>().unwrap_err();
            assert_eq!(error.line, line, "{text:?}");
            assert!(error.to_string().contains(words), "{text:?}: {error}");
        }
    }
}
