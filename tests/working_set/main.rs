// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The writable working set on the simulated kernel, beside everything else that a log does.

mod bitmap;
mod joining;
mod last_sync;
mod machine;
mod on_demand;
mod refresh;
mod slots;
mod suspicion;
mod unsent;
mod void_entries;
