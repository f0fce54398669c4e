// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest feels of its migration, and for how long: `cargo run --release --bin guestperf -- --help`.
//!
//! Exit status: 0 if no page was missed, 1 if any was, 2 for a usage error or where something that
//! is needed is missing, 130 if interrupted.

mod column;
mod html;
#[cfg(tiny_guest)]
mod measure;
mod options;
#[cfg_attr(
    not(tiny_guest),
    allow(dead_code, reason = "what is planned needs a guest")
)]
mod plan;
mod report;
mod table;
#[cfg(test)]
mod tests;
mod verdict;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use clap::Parser;
use kvm_integration::Host;
use kvm_integration::cli::output::{self, Output, say};
use kvm_integration::guestperf::CellResult;

#[cfg(tiny_guest)]
use measure::measure;
use options::Options;
use plan::Plan;

fn main() -> ExitCode {
    let options = Options::parse();
    output::run(|interrupted| run(&options, interrupted))
}

fn run(options: &Options, interrupted: &AtomicBool) -> Result<ExitCode> {
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
    Ok(output::status(report::missed_pages(&results)))
}

#[cfg(not(tiny_guest))]
fn measure(_: &Plan, _: &AtomicBool, _: &mut dyn FnMut(CellResult) -> Result<()>) -> Result<()> {
    anyhow::bail!(kvm_integration::host::NO_GUEST)
}
