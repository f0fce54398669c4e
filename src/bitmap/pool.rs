// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which thread may write which shard.

use crate::sync::{Condvar, Mutex, MutexGuard, lock, wait};

/// Shards of a log. So many threads harvest at once, and more wait for one of them. Each shard costs one bit per page, where pages are
/// dirty.
pub(crate) const MAX_SHARDS: usize = 4;

/// The shards' tokens. A pass holds one from its first harvested entry until its pages are published. So the next holder of a shard finds
/// only published pages in it, or the note of what is still to be done.
pub(crate) struct ShardPool {
    tokens: Mutex<Tokens>,
    returned: Condvar,
}

struct Tokens {
    shards: Box<[Token]>,
    /// Threads that wait for a shard. A wake-up that wakes no thread costs a system call, too.
    waiting: usize,
}

struct Token {
    held: bool,
    /// Threads that wait for this shard and no other. They come first; otherwise they might never.
    wanted: usize,
    /// See [`ShardGuard`].
    has_pages: bool,
    unreset: Option<Unreset>,
}

/// The work that is left where a pass ended before its reset: its pages are in the shard and their entries are marked, but no reset
/// that could protect them has completed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unreset {
    /// The number of faulty resets when the first of the entries was marked.
    pub(crate) faults: u64,
}

impl ShardPool {
    pub(crate) fn new(shards: usize) -> Self {
        assert!(shards <= MAX_SHARDS);
        let token = || Token {
            held: false,
            wanted: 0,
            has_pages: false,
            unreset: None,
        };
        let tokens = Tokens {
            shards: (0..shards).map(|_| token()).collect(),
            waiting: 0,
        };
        Self {
            tokens: Mutex::new(tokens),
            returned: Condvar::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.tokens).shards.len()
    }

    /// Waits for any shard, and takes the lowest that is free: the fewer are in use, the less is merged.
    pub(crate) fn acquire_any(&self) -> ShardGuard<'_> {
        let mut tokens = lock(&self.tokens);
        loop {
            let free = |token: &Token| !token.held && token.wanted == 0;
            if let Some(index) = tokens.shards.iter().position(free) {
                return self.hand_out(&mut tokens, index);
            }
            tokens = self.wait(tokens);
        }
    }

    /// Waits for the shard `index`, and so for the pass that holds it to end.
    pub(crate) fn acquire(&self, index: usize) -> ShardGuard<'_> {
        let mut tokens = lock(&self.tokens);
        tokens.shards[index].wanted += 1;
        while tokens.shards[index].held {
            tokens = self.wait(tokens);
        }
        tokens.shards[index].wanted -= 1;
        self.hand_out(&mut tokens, index)
    }

    fn wait<'a>(&self, mut tokens: MutexGuard<'a, Tokens>) -> MutexGuard<'a, Tokens> {
        tokens.waiting += 1;
        tokens = wait(&self.returned, tokens);
        tokens.waiting -= 1;
        tokens
    }

    fn hand_out(&self, tokens: &mut Tokens, index: usize) -> ShardGuard<'_> {
        let token = &mut tokens.shards[index];
        token.held = true;
        ShardGuard {
            pool: self,
            index,
            has_pages: token.has_pages,
            unreset: token.unreset.take(),
        }
    }
}

/// The right to read and write one shard of every slot.
pub(crate) struct ShardGuard<'a> {
    pool: &'a ShardPool,
    index: usize,
    /// Whether entries were harvested since its pages were last taken; if not, no thread need look for any. It outlives the
    /// guard.
    pub(crate) has_pages: bool,
    /// `Some` while the shard holds pages whose reset is outstanding. It outlives the guard.
    pub(crate) unreset: Option<Unreset>,
}

impl ShardGuard<'_> {
    pub(crate) fn index(&self) -> usize {
        self.index
    }
}

impl Drop for ShardGuard<'_> {
    fn drop(&mut self) {
        // The lock orders the holder's plain accesses to the shard before the next holder's.
        let mut tokens = lock(&self.pool.tokens);
        let token = &mut tokens.shards[self.index];
        token.held = false;
        token.has_pages = self.has_pages;
        token.unreset = self.unreset;
        let waiting = tokens.waiting > 0;
        drop(tokens);
        if waiting {
            // All, because threads that wait for one shard and those that wait for any share the condition.
            self.pool.returned.notify_all();
        }
    }
}
