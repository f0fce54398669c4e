// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rings, and the pages of the guest: what is protected, what is open, what a sync reports.

use kvm_dirty_ring::convergence::Extent;

use crate::guest::{PAGES, SCALE, VCPUS};

/// Entries at which a vCPU's ring of 4,096 is emptied.
const FULL: usize = (3968 / SCALE) as usize;

/// Written to without a fault.
const OPEN: u8 = 1;
/// Of the working set.
const MEMBER: u8 = 2;
/// Harvested since the last sync.
const COLLECTED: u8 = 4;
/// Reported and not sent.
const UNSENT: u8 = 8;
/// Closed by the last refresh.
const CLOSED: u8 = 16;

/// Which pages join the working set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Joining {
    /// As long as there are fewer members than this, any page.
    pub places: u64,
    /// As long as there are fewer than this, a page that comes again within a round.
    pub most: u64,
}

impl Joining {
    /// No page stays open.
    pub const NONE: Self = Self { places: 0, most: 0 };
}

pub struct Tracker {
    pages: Vec<u8>,
    rings: Vec<Vec<u16>>,
    joining: Joining,
    members: u64,
    closed: u64,
}

impl Tracker {
    /// At a migration's begin all of the guest is to be sent.
    pub fn new(joining: Joining) -> Self {
        Self {
            pages: vec![UNSENT; PAGES as usize],
            rings: vec![Vec::with_capacity(FULL); VCPUS as usize],
            joining,
            members: 0,
            closed: 0,
        }
    }

    /// Other pages join from now on.
    pub fn join(&mut self, joining: Joining) {
        self.joining = joining;
    }

    /// A vCPU writes to a page. Whether that was a fault.
    pub fn write(&mut self, vcpu: usize, page: usize) -> bool {
        if self.pages[page] & OPEN != 0 {
            return false;
        }
        self.pages[page] |= OPEN;
        self.rings[vcpu].push(page as u16);
        if self.rings[vcpu].len() >= FULL {
            self.harvest(vcpu);
        }
        true
    }

    fn harvest(&mut self, vcpu: usize) {
        for page in self.rings[vcpu].drain(..) {
            let page = &mut self.pages[usize::from(page)];
            if *page & MEMBER != 0 {
                continue;
            }
            let comes_again = *page & COLLECTED != 0 && self.members < self.joining.most;
            if self.members < self.joining.places || comes_again {
                *page |= MEMBER;
                self.members += 1;
            } else {
                *page = (*page | COLLECTED) & !OPEN;
            }
        }
    }

    /// What is dirty: the others, all that is unsent among them, and the members.
    pub fn sync(&mut self) -> (Extent, Extent) {
        for vcpu in 0..self.rings.len() {
            self.harvest(vcpu);
        }
        let (mut others, mut members) = (Extent::default(), Extent::default());
        let mut before = 0;
        for page in &mut self.pages {
            let kind = match *page {
                flags if flags & MEMBER != 0 => MEMBER,
                flags if flags & (COLLECTED | UNSENT) != 0 => UNSENT,
                _ => 0,
            };
            *page &= !(COLLECTED | UNSENT);
            *page |= kind & UNSENT;
            let extent = match kind {
                0 => &mut Extent::default(),
                MEMBER => &mut members,
                _ => &mut others,
            };
            extent.pages += 1;
            extent.runs += u64::from(kind != before);
            before = kind;
        }
        (others, members)
    }

    /// The others have been sent.
    pub fn send(&mut self) {
        self.pages.iter_mut().for_each(|page| *page &= !UNSENT);
    }

    pub fn refresh(&mut self) {
        for page in &mut self.pages {
            *page &= !CLOSED;
            if *page & MEMBER != 0 {
                *page = (*page & !(MEMBER | OPEN)) | COLLECTED | CLOSED;
            }
        }
        self.closed = self.members;
        self.members = 0;
    }

    /// How many pages the last refresh has closed, and how many of them are members again.
    pub fn closed_and_back(&self) -> (u64, u64) {
        let is_back = |page: &&u8| **page & (MEMBER | CLOSED) == MEMBER | CLOSED;
        let back = self.pages.iter().filter(is_back).count();
        (self.closed, back as u64)
    }
}
