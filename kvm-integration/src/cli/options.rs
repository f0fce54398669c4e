// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Arguments that several command lines parse.

use kvm_dirty_ring::RingEntries;

/// The size of a ring.
pub fn ring_entries(text: &str) -> Result<RingEntries, String> {
    let wanted = || "a power of two from 256 to 65536 is wanted".to_string();
    let entries = text.parse().map_err(|_| wanted())?;
    RingEntries::new(entries).map_err(|error| error.to_string())
}

/// The one of `all` that has this name.
pub fn named<T: Clone>(
    all: &[T],
    name_of: fn(&T) -> &'static str,
    name: &str,
) -> Result<T, String> {
    let found = all.iter().find(|one| name_of(one) == name);
    found.cloned().ok_or_else(|| {
        let names: Vec<_> = all.iter().map(name_of).collect();
        format!("choose one of {}", names.join(", "))
    })
}

/// What was given, or `default`.
pub fn or<T: Clone>(given: &[T], default: &[T]) -> Vec<T> {
    match given {
        [] => default.to_vec(),
        some => some.to_vec(),
    }
}
