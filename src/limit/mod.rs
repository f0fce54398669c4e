// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Dirty limits: what a vCPU owes, and how its thread sleeps that off.
//!
//! A vCPU pays for the entries that it has logged: those taken from the ring, by any thread, plus those that wait. A vCPU that is
//! ahead of its limit sleeps for as long as the limit takes to catch up, on its own thread and out of the guest. So the mean
//! is the limit, however late looks and wake-ups are.
//!
//! May import: ground.

pub(crate) mod account;
mod budget;
