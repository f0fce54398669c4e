// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What programs have in common: their options, and how they print their results.

pub mod backend;
pub mod interrupt;
pub mod markdown;
pub mod options;
pub mod order;
pub mod output;
pub mod progress;
pub mod watchdog;
