// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table, and the same for programs.

use std::fs;
use std::io;

/// One comparison.
struct Row {
    case: String,
    ours_ns: f64,
    peer: &'static str,
    peer_ns: f64,
}

/// All comparisons of a run.
#[derive(Default)]
pub struct Report {
    rows: Vec<Row>,
}

impl Report {
    /// Adds a comparison: times in nanoseconds, for an entry or for a drain.
    pub fn add(&mut self, case: String, ours_ns: f64, peer: &'static str, peer_ns: f64) {
        self.rows.push(Row {
            case,
            ours_ns,
            peer,
            peer_ns,
        });
    }

    /// Prints the table, in Markdown.
    pub fn print(&self) {
        println!("| case | ours, ns | beside | its ns | times ours |");
        println!("|---|---:|---|---:|---:|");
        for row in &self.rows {
            println!(
                "| {} | {:.2} | {} | {:.2} | {:.2} |",
                row.case,
                row.ours_ns,
                row.peer,
                row.peer_ns,
                row.peer_ns / row.ours_ns
            );
        }
    }

    /// Writes the rows to `file` as JSON.
    pub fn write(&self, file: &str) -> io::Result<()> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let of_cpu = |key: &str| {
            let lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
            let mut found = lines.filter(|(name, _)| name.trim() == key);
            found.next().map(|(_, value)| value.trim().to_owned())
        };
        let processor = ["model name", "cpu family", "model"].map(of_cpu);
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| {
                serde_json::json!({
                    "case": row.case,
                    "ours_ns": row.ours_ns,
                    "peer": row.peer,
                    "peer_ns": row.peer_ns,
                    "ratio": row.peer_ns / row.ours_ns,
                })
            })
            .collect();
        let report = serde_json::json!({ "processor": processor, "rows": rows });
        fs::write(file, serde_json::to_string_pretty(&report)?)
    }
}
