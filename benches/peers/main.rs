// SPDX-License-Identifier: Apache-2.0 OR MIT
//! This crate beside what its users could take instead.
//!
//! `cargo bench --bench peers` prints a table; `-- --quick` takes less than a minute,
//! `-- TEXT` takes only cases with TEXT in their names, `-- --json FILE` writes `{processor: [name, family, model],
//! rows: [{case, ours_ns, peer, peer_ns, ratio}]}`. All variants of a case run
//! interleaved in one process; their results are compared before they are timed.

mod drain;
mod harvest;
mod report;

use report::Report;

/// How thorough a run is.
#[derive(Debug, Clone)]
struct Effort {
    /// Samples of each variant.
    samples: usize,
    quick: bool,
    /// What the names of the cases to run contain.
    only: String,
}

impl Effort {
    fn takes(&self, case: &str) -> bool {
        case.contains(&self.only)
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut effort = Effort {
        samples: 101,
        quick: false,
        only: String::new(),
    };
    let mut json = None;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => (effort.samples, effort.quick) = (51, true),
            "--json" => json = Some(arguments.next().expect("--json takes a file")),
            // `cargo bench` passes --bench, `cargo test --benches` passes nothing: then a few
            // samples show that it runs.
            "--bench" => {}
            only if !only.starts_with('-') => effort.only = only.into(),
            other => panic!("unknown argument {other}: --quick, --json FILE and TEXT are known"),
        }
    }
    if !std::env::args().any(|argument| argument == "--bench") {
        (effort.samples, effort.quick) = (1, true);
    }
    let mut report = Report::default();
    harvest::run(&effort, &mut report);
    drain::run(&effort, &mut report);
    report.print();
    if let Some(file) = json {
        report.write(&file).expect("writing the report");
    }
}
