//! What a guest feels of its migration, and for how long: `cargo run --release --bin guestperf -- --help`.
//!
//! Exit status: 0 if no page was missed, 1 if any was, 2 for a usage error or where something that
//! is needed is missing, 130 if interrupted.

mod column;
mod html;
#[cfg(target_arch = "x86_64")]
mod measure;
mod options;
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "what is planned is run on x86-64 only")
)]
mod plan;
mod report;
mod table;
mod verdict;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use kvm_integration::Host;
use kvm_integration::guestperf::CellResult;
use kvm_integration::interrupt::watch_signals;
use kvm_integration::output::{Output, exit_status, fail, say};

#[cfg(target_arch = "x86_64")]
use measure::measure;
use options::Options;
use plan::Plan;

fn main() -> ExitCode {
    let options = Options::parse();
    let interrupted = match watch_signals() {
        Ok(interrupted) => interrupted,
        Err(error) => return fail(&error),
    };
    exit_status(run(&options, &interrupted), &interrupted)
}

fn run(options: &Options, interrupted: &AtomicBool) -> Result<ExitCode, Box<dyn Error>> {
    let plan = Plan::new(options)?;
    // Now, not after minutes of work, is the time to find out that there is no such place.
    let output = |path: &Option<PathBuf>| path.as_deref().map(Output::to).transpose();
    let (json, html) = (output(&options.json)?, output(&options.html)?);
    let host = Host::detect();
    say(&format!("{host}\n"))?;
    let mut results = Vec::new();
    let measured = measure(&plan, interrupted, &mut |result: CellResult| {
        say(&table::text(&result))?;
        results.push(result);
        Ok(())
    });
    if results.is_empty() {
        return measured.map(|()| ExitCode::SUCCESS);
    }
    // What there is is worth something, even if there should be more.
    let overview = table::overview(&results);
    say(&format!(
        "### Drop in seconds / worst ms per GB\n\n{overview}"
    ))?;
    let verdicts = verdict::verdicts(&results);
    if !verdicts.is_empty() {
        let (summary, table) = (table::summary(&verdicts), table::verdicts(&verdicts));
        say(&format!("### {summary}\n\n{table}"))?;
    }
    if let Some(json) = json {
        let report = report::json(&host, &plan, &results, &verdicts);
        json.write(&format!("{report}\n"))?;
    }
    if let Some(html) = html {
        html.write(&html::page(&host, &plan.facts(), &results, &verdicts)?)?;
    }
    measured?;
    let missed = report::missed_pages(&results);
    Ok(ExitCode::from(status(missed)))
}

/// The exit status of a run that came to its end.
fn status(missed_pages: u64) -> u8 {
    u8::from(missed_pages > 0)
}

#[cfg(not(target_arch = "x86_64"))]
fn measure(
    _: &Plan,
    _: &AtomicBool,
    _: &mut dyn FnMut(CellResult) -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    Err("the guest is x86-64 code and this machine is not".into())
}

#[cfg(test)]
mod tests {
    use kvm_integration::guestperf::{ArmResult, Cell, Figures, Migration, Phases, Round, Sample};

    use super::*;

    pub fn figures() -> Figures {
        Figures {
            quiet_ms_per_gb: 50.0,
            median_ms_per_gb: 400.0,
            worst_ms_per_gb: 900.0,
            drop_seconds: 1.5,
            longest_stall_ms: 7.0,
            full_exits: 12,
            full_exit_ms: 3.0,
            resets: 5,
            entries: 1000,
            guest_pages_per_second: 1e6,
            reaper_cpu_ms: 20.0,
            pages_sent: 30_000,
            downtime_ms: 250.0,
            total_seconds: 2.8,
            converged: true,
            missed_pages: 0,
        }
    }

    /// Arms, and the figures of each of their migrations.
    pub fn cell_result(arms: &[(&'static str, &[Figures])]) -> CellResult {
        let migration = |figures: &Figures| Migration {
            figures: *figures,
            rounds: vec![Round {
                pages: 7,
                running: true,
                begin: 1.0,
                seconds: 0.5,
            }],
            phases: Phases {
                begin: 1.0,
                stop: 2.0,
                resume: 2.5,
                end: 3.5,
            },
            samples: vec![Sample {
                at: 0.5,
                ms_per_gb: None,
                full_exits: 0,
                delay_ms: Some(2.0),
            }],
        };
        let arms = arms.iter().map(|&(arm, figures)| ArmResult {
            arm,
            migrations: figures.iter().map(migration).collect(),
        });
        CellResult {
            cell: Cell {
                vcpus: 2,
                memory_mib: 1024,
                stress_mib: 512,
                ring_entries: 4096,
            },
            others: Some(0.25),
            arms: arms.collect(),
        }
    }

    #[test]
    fn one_page_that_was_missed_is_a_failure() {
        assert_eq!([0, 1, 256, u64::MAX].map(status), [0, 1, 1, 1]);
    }
}
