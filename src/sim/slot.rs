//! Protection and truth of one slot's pages.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub(super) struct SimSlot {
    pages: Box<[SimPage]>,
}

struct SimPage {
    armed: AtomicBool,
    version: AtomicU64,
}

impl SimSlot {
    pub(super) fn new(pages: u64) -> Self {
        let page = || SimPage {
            armed: AtomicBool::new(true),
            version: AtomicU64::new(0),
        };
        Self {
            pages: (0..pages).map(|_| page()).collect(),
        }
    }

    fn page(&self, page: u64) -> Option<&SimPage> {
        self.pages.get(usize::try_from(page).ok()?)
    }

    /// Disarms the page; whether it was armed. `None` if there is no such page.
    pub(super) fn disarm(&self, page: u64) -> Option<bool> {
        // AcqRel: pairs with the release in `arm`, and with itself: one of two vCPUs that fault on
        // the same page logs it.
        Some(self.page(page)?.armed.swap(false, Ordering::AcqRel))
    }

    /// Arms the page, if there is one.
    pub(super) fn arm(&self, page: u64) {
        if let Some(page) = self.page(page) {
            // Release: pairs with the swap in `disarm`.
            page.armed.store(true, Ordering::Release);
        }
    }

    pub(super) fn arm_all(&self) {
        for page in 0..self.pages.len() as u64 {
            self.arm(page);
        }
    }

    /// Writes the page. False if there is none.
    pub(super) fn write(&self, page: u64) -> bool {
        // AcqRel: pairs with the acquire load in `version`, and orders writers of one page.
        let write = |page: &SimPage| page.version.fetch_add(1, Ordering::AcqRel);
        self.page(page).map(write).is_some()
    }

    pub(super) fn version(&self, page: u64) -> Option<u64> {
        // Acquire: pairs with the release in `write`.
        Some(self.page(page)?.version.load(Ordering::Acquire))
    }
}
