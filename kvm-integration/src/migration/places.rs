// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How many pages may stay open, whatever they are.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

/// Free places in the guest's working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Places {
    /// Half of what the link takes within the downtime; where either is without a limit, as with
    /// [`Off`](Self::Off).
    Auto,
    /// There is no working set: every page that is reported is protected, and sent.
    Off,
    /// So many pages.
    Pages(u64),
}

impl FromStr for Places {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            pages => Ok(Self::Pages(pages.parse()?)),
        }
    }
}

impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Pages(pages) => pages.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_read_as_they_are_written() {
        for (text, places) in [
            ("auto", Places::Auto),
            ("off", Places::Off),
            ("0", Places::Pages(0)),
            ("38400", Places::Pages(38_400)),
        ] {
            assert_eq!(text.parse(), Ok(places));
            assert_eq!(places.to_string(), text);
        }
        assert!("on".parse::<Places>().is_err());
    }
}
