//! What the property tests share: scripts, the machine that runs them, and the slow oracles.

pub mod machine;
pub mod script;
pub mod shape;
