// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The dirty pages of one slot, by kind.

use crate::bitmap::pages::PageBits;
use crate::slots::table::Slot;
use crate::sync::Arc;

/// The dirty pages of one slot.
pub(super) struct SlotPages {
    /// Not its id alone: another slot may have got the id since the last round.
    pub(super) slot: Arc<Slot>,
    /// All dirty pages.
    pub(super) bits: PageBits,
    /// Which of them stay open, and which do not; made when some do for the first time.
    pub(super) kinds: Option<Box<Kinds>>,
}

pub(super) struct Kinds {
    pub(super) members: PageBits,
    pub(super) others: PageBits,
}

/// Which of the dirty pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    All,
    Members,
    Others,
}

impl SlotPages {
    /// Makes a slot without a dirty page; `None` if there is no memory for it.
    pub(super) fn new(slot: &Arc<Slot>) -> Option<Self> {
        Some(Self {
            bits: PageBits::new(slot.pages())?,
            slot: Arc::clone(slot),
            kinds: None,
        })
    }

    /// Returns the pages of that kind; `None` if there can be none.
    pub(super) fn of(&self, kind: Kind) -> Option<&PageBits> {
        let kinds = self.kinds.as_deref();
        let kinds = kinds.filter(|kinds| kind != Kind::All && !kinds.members.is_empty());
        match (kind, kinds) {
            (Kind::Members, kinds) => kinds.map(|kinds| &kinds.members),
            (Kind::Others, Some(kinds)) => Some(&kinds.others),
            (Kind::All | Kind::Others, _) => Some(&self.bits),
        }
    }

    pub(super) fn forget_kinds(&mut self) {
        if let Some(kinds) = &mut self.kinds {
            kinds.members.clear();
            kinds.others.clear();
        }
    }

    /// Makes the kinds, empty; `None` if there is no memory for them.
    pub(super) fn make_kinds(&mut self) -> Option<()> {
        self.forget_kinds();
        if self.kinds.is_none() {
            let pages = self.slot.pages();
            let (members, others) = (PageBits::new(pages)?, PageBits::new(pages)?);
            self.kinds = Some(Box::new(Kinds { members, others }));
        }
        Some(())
    }
}
