//! What programs have in common: how they are told what to do, and how they say what came of it.

pub mod backend;
pub mod interrupt;
pub mod markdown;
pub mod options;
pub mod order;
pub mod output;
pub mod progress;
pub mod watchdog;
