//! What a vCPU may dirty: what it owes by its limit, and how its thread sleeps that off.
//!
//! What a vCPU has logged is what counts, whoever takes it from the ring and when: entries taken
//! plus entries that wait. A vCPU that is ahead of its limit sleeps for as long as the limit takes
//! to catch up, on its own thread and out of the guest. So the mean is the limit, however late
//! anybody looks or wakes up.
//!
//! May import: ground.

pub(crate) mod account;
mod budget;
