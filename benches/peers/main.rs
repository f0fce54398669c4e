//! This crate beside what its users could take instead.
//!
//! `cargo bench --bench peers` prints a table; `-- --quick` takes less than a minute,
//! `-- --json FILE` writes `[{case, ours_ns, peer, peer_ns, ratio}]`. All variants of a case run
//! interleaved in one process; their results are compared before they are timed.

mod drain;
mod harvest;
mod report;

use report::Report;

/// How thorough a run is.
#[derive(Debug, Clone, Copy)]
struct Effort {
    /// Samples of each variant.
    samples: usize,
    quick: bool,
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut effort = Effort {
        samples: 101,
        quick: false,
    };
    let mut json = None;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => {
                effort = Effort {
                    samples: 51,
                    quick: true,
                }
            }
            "--json" => json = Some(arguments.next().expect("--json takes a file")),
            // `cargo bench` passes --bench, `cargo test --benches` passes nothing: then a few
            // samples show that it runs.
            "--bench" => {}
            other => panic!("unknown argument {other}: --quick and --json FILE are known"),
        }
    }
    if !std::env::args().any(|argument| argument == "--bench") {
        effort = Effort {
            samples: 3,
            quick: true,
        };
    }
    let mut report = Report::default();
    harvest::run(effort, &mut report);
    drain::run(effort, &mut report);
    report.print();
    if let Some(file) = json {
        report.write(&file).expect("writing the report");
    }
}
