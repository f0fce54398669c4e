// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares pacing policies side by side, and migrations with and without a working set:
//! `cargo run --release --bin pacing-lab -- --help`.
//!
//! Exit status: 0 if it ran, 1 if a migration has missed a page, 2 for a usage error or where something that is needed is missing, 130
//! if interrupted.

mod html;
mod migrations;
mod options;
#[cfg_attr(
    not(tiny_guest),
    allow(dead_code, reason = "what is planned needs a guest")
)]
mod plan;
#[cfg(tiny_guest)]
mod real;
mod report;
mod run;
mod simulated;
mod table;
mod targets;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use clap::Parser;
use kvm_integration::Host;
use kvm_integration::cli::output::{self, Output, say};
use kvm_integration::lab::CellResult;

use options::Options;
use plan::Plan;
#[cfg(tiny_guest)]
use real::measure;
use simulated::{SimPlan, simulate};

fn main() -> ExitCode {
    let options = Options::parse();
    output::run(|interrupted| {
        if options.migrations {
            return migrations::run(&options, interrupted);
        }
        run(&options, interrupted)?;
        Ok(ExitCode::SUCCESS)
    })
}

fn run(options: &Options, interrupted: &AtomicBool) -> Result<()> {
    if options.constants {
        return say(&table::constants(simulated::constants(options)));
    }
    // Now, not after minutes of work, is the time to find out that there is no such place.
    let output = |path: &Option<PathBuf>| path.as_deref().map(Output::to).transpose();
    let (json, html) = (output(&options.json)?, output(&options.html)?);
    let host = Host::detect();
    let mut results = Vec::new();
    let mut report = |result: CellResult| {
        say(&table::text(&result))?;
        results.push(result);
        Ok(())
    };
    let (mut skipped, mut slice_ms) = (Vec::new(), 0);
    if options.sim {
        let plan = SimPlan::new(options)?;
        say(&format!("simulated, seed {}\n", options.seed))?;
        simulate(&plan, interrupted, &mut report)?;
    } else {
        let plan = Plan::new(options)?;
        say(&format!("{host}\n"))?;
        slice_ms = plan.slice.as_millis() as u64;
        skipped = measure(&plan, interrupted, &mut report)?;
    }
    let verdicts = targets::verdicts(&results, options.sim);
    let summary = table::summary(&verdicts, &results);
    say(&format!("### {summary}\n"))?;
    if !verdicts.is_empty() {
        say(&table::verdicts(&verdicts).to_string())?;
    }
    if let Some(json) = json {
        let report = report::json(options, slice_ms, &results, &skipped, &verdicts);
        json.write(&format!("{report:#}\n"))?;
    }
    if let Some(html) = html {
        let guests = if options.sim { "simulated" } else { "real" };
        html.write(&html::page(&host, guests, &summary, &results, &verdicts)?)?;
    }
    Ok(())
}

#[cfg(not(tiny_guest))]
fn measure(_: &Plan, _: &AtomicBool, _: &mut run::Report<'_>) -> Result<Vec<run::Skipped>> {
    anyhow::bail!("{}: choose --sim", kvm_integration::host::NO_GUEST)
}
