// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Protection and truth of one slot's pages.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub(super) struct SimSlot {
    pages: Box<[SimPage]>,
    /// `KVM_MEM_LOG_DIRTY_PAGES`.
    is_logged: AtomicBool,
}

struct SimPage {
    armed: AtomicBool,
    /// Whether its bit is set in the kernel's bitmap.
    logged: AtomicBool,
    version: AtomicU64,
}

impl SimSlot {
    pub(super) fn new(pages: u64) -> Self {
        let page = || SimPage {
            armed: AtomicBool::new(true),
            logged: AtomicBool::new(false),
            version: AtomicU64::new(0),
        };
        Self {
            pages: (0..pages).map(|_| page()).collect(),
            is_logged: AtomicBool::new(true),
        }
    }

    /// Opens every page, and sets its bit if there is a bitmap: `KVM_DIRTY_LOG_INITIALLY_SET`.
    pub(super) fn begin_dirty(&self, has_bitmap: bool) {
        for page in 0..self.pages.len() as u64 {
            self.disarm(page);
            if has_bitmap {
                self.log(page);
            }
        }
    }

    pub(super) fn is_logged(&self) -> bool {
        // Acquire: pairs with the release in `set_logged`.
        self.is_logged.load(Ordering::Acquire)
    }

    /// Switches the log of the slot, and returns whether that changed anything. On: every page is armed. Off: what was logged is
    /// forgotten.
    pub(super) fn set_logged(&self, logged: bool) -> bool {
        // AcqRel: pairs with the acquire in `is_logged`, and with itself.
        if self.is_logged.swap(logged, Ordering::AcqRel) == logged {
            return false;
        }
        match logged {
            true => self.rearm(),
            false => self.take_logged(u64::MAX).for_each(drop),
        }
        true
    }

    fn page(&self, page: u64) -> Option<&SimPage> {
        self.pages.get(usize::try_from(page).ok()?)
    }

    /// Disarms the page, and returns whether it was armed. `None` if there is no such page.
    pub(super) fn disarm(&self, page: u64) -> Option<bool> {
        // AcqRel: pairs with the release in `arm`, and with itself: one of two vCPUs that fault on
        // the same page logs it.
        Some(self.page(page)?.armed.swap(false, Ordering::AcqRel))
    }

    pub(super) fn has(&self, page: u64) -> bool {
        self.page(page).is_some()
    }

    /// Arms the page, if there is one.
    pub(super) fn arm(&self, page: u64) {
        if let Some(page) = self.page(page) {
            // Release: pairs with the swap in `disarm`.
            page.armed.store(true, Ordering::Release);
        }
    }

    pub(super) fn is_armed(&self, page: u64) -> Option<bool> {
        // Acquire: pairs with the release in `arm`.
        Some(self.page(page)?.armed.load(Ordering::Acquire))
    }

    /// Arms every page, and forgets which were logged.
    pub(super) fn rearm(&self) {
        self.take_logged(u64::MAX).for_each(drop);
        for page in 0..self.pages.len() as u64 {
            self.arm(page);
        }
    }

    /// Sets the page's bit, if there is one.
    pub(super) fn log(&self, page: u64) {
        if let Some(page) = self.page(page) {
            // Release: pairs with the acquire in `take_logged`.
            page.logged.store(true, Ordering::Release);
        }
    }

    /// The bits that are set, ascending; they stay.
    pub(super) fn logged(&self) -> impl Iterator<Item = u64> {
        // Acquire: pairs with the release in `log`.
        let logged = |page: &SimPage| page.logged.load(Ordering::Acquire);
        let pages = (0..).zip(&self.pages);
        pages
            .filter(move |(_, page)| logged(page))
            .map(|(number, _)| number)
    }

    /// Takes the page's bit, if there is one.
    pub(super) fn unlog(&self, page: u64) -> bool {
        // Acquire: pairs with the release in `log`.
        self.page(page)
            .is_some_and(|page| page.logged.swap(false, Ordering::Acquire))
    }

    /// Takes the bits that are set, `most` of them, ascending.
    pub(super) fn take_logged(&self, most: u64) -> impl Iterator<Item = u64> {
        // Acquire: pairs with the release in `log`.
        let taken = |page: &SimPage| page.logged.swap(false, Ordering::Acquire);
        let pages = (0..).zip(&self.pages);
        let logged = pages.filter(move |(_, page)| taken(page));
        logged.map(|(number, _)| number).take(most as usize)
    }

    /// Writes the page. Returns false if there is none.
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
