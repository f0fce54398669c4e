// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file that `--migrations --json` writes.
//!
//! One object: `schema`, 1, which changes when the meaning of a key does; `simulated`; `host`, as in the other file;
//! `guests`, each with its `workload` and for each of its `arms` the fields of
//! [`Figures`](kvm_integration::lab::migrations::Figures); `last_sync`, null of simulated guests; `others`, the share of the
//! machine's CPU time that others took; `missed_pages`, of all; and `targets`, as in the other file.

use kvm_integration::Host;
use serde_json::{Value, json};

use super::result::{GuestResult, Results};
use crate::targets::Verdict;

/// All there is to say.
pub fn json(simulated: bool, host: &Host, results: &Results, targets: &[Verdict]) -> Value {
    let guest =
        |guest: &GuestResult| json!({"workload": guest.load.to_string(), "arms": guest.arms});
    #[cfg(tiny_guest)]
    let last_sync = json!(results.last_sync);
    #[cfg(not(tiny_guest))]
    let last_sync = results
        .last_sync
        .map_or(Value::Null, |never| match never {});
    json!({
        "schema": 1,
        "simulated": simulated,
        "host": host,
        "guests": results.guests.iter().map(guest).collect::<Vec<_>>(),
        "last_sync": last_sync,
        "others": results.others,
        "missed_pages": results.missed_pages(),
        "targets": targets,
    })
}
