//! Whether entries wait for their reset that name no page which the log knows.

use std::collections::BTreeSet;

use crate::sync::{Counter, Mutex, lock};

/// What the last look at all entries of all rings has found. To look takes milliseconds, and who stops a thousand slots
/// asks a thousand times.
#[derive(Default)]
pub(crate) struct Strays {
    last: Mutex<Look>,
    /// Entries looked at so far.
    pub(crate) looked_at: Counter,
}

#[derive(Default)]
struct Look {
    /// How many strays had been counted before it.
    counted: u64,
    /// The slots that they name which waited then.
    slots: BTreeSet<u32>,
}

impl Strays {
    /// Whether a stray that waits names `slot`, or may. `counted` is how many strays passes have counted by now, `look` adds
    /// the slots of those that wait, and returns at how many entries it looked.
    ///
    /// Entries only cease to wait, but for those that are harvested, and of these each stray is counted. So what a look
    /// has found holds until more are counted: it names too many slots, if any. It is made anew for a slot that it
    /// names. While none was ever counted there is none, and nobody looks.
    pub(crate) fn may_name(
        &self,
        slot: u32,
        counted: impl FnOnce() -> u64,
        look: impl FnOnce(&mut BTreeSet<u32>) -> u64,
    ) -> bool {
        let mut last = lock(&self.last);
        // Before the look: one that is counted meanwhile has the next one made.
        let counted = counted();
        if last.counted != counted || last.slots.contains(&slot) {
            let mut slots = BTreeSet::new();
            let entries = look(&mut slots);
            *last = Look { counted, slots };
            self.looked_at.add(entries);
        }
        last.slots.contains(&slot)
    }
}
