// SPDX-License-Identifier: Apache-2.0 OR MIT
// The pages of docs/, for readers of the documentation. They link to each other by reference (`[text][label]`).
// Markdown takes a label's first definition, so rustdoc.links, which stands before each page, leads to rustdoc's pages
// in place of the page's own files. `kvm-integration/tests/links.rs` compares the two.
#![doc = include_str!("../docs/rustdoc.links")]
#![doc = include_str!("../docs/guide.md")]

#[doc = include_str!("../docs/rustdoc.links")]
#[doc = include_str!("../docs/slots.md")]
pub mod slots {}

#[doc = include_str!("../docs/rustdoc.links")]
#[doc = include_str!("../docs/threads.md")]
pub mod threads {}

#[doc = include_str!("../docs/rustdoc.links")]
#[doc = include_str!("../docs/migration.md")]
pub mod migration {}

#[doc = include_str!("../docs/rustdoc.links")]
#[doc = include_str!("../docs/limits.md")]
pub mod limits {}

#[doc = include_str!("../docs/rustdoc.links")]
#[doc = include_str!("../docs/operations.md")]
pub mod operations {}

#[doc = include_str!("../docs/rustdoc.links")]
#[doc = include_str!("../docs/terms.md")]
pub mod terms {}

#[doc = include_str!("../docs/rustdoc.links")]
#[doc = include_str!("../docs/working-set.md")]
pub mod working_set {}

#[doc = include_str!("../docs/rustdoc.links")]
#[doc = include_str!("../docs/pacing.md")]
pub mod pacing {}

#[doc = include_str!("../docs/rustdoc.links")]
#[doc = include_str!("../docs/performance.md")]
pub mod performance {}

#[doc = include_str!("../docs/rustdoc.links")]
#[doc = include_str!("../docs/guestperf.md")]
pub mod guestperf {}

#[doc = include_str!("../docs/rustdoc.links")]
#[doc = include_str!("../docs/tested-on.md")]
pub mod tested_on {}
