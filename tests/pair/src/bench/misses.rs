//! The part of the document that says why ratios were missed: what another guest costs, and what lockstep does.

use super::results::{Results, Workload};
use super::targets::wanted_ratio;
use anyhow::Result;
use std::fmt::Write as _;

/// Writes the section; nothing if every ratio is as wanted.
pub(super) fn write(text: &mut String, results: &Results) -> Result<()> {
    let processors = results.machine.processors;
    let missed = |work: &&Workload| work.ratio().is_some_and(|ratio| ratio < wanted_ratio(work));
    let rows: Vec<String> =
        results.workloads.iter().filter(missed).filter_map(|work| row(work, processors)).collect();
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(
        text,
        "### Why ratios were missed\n\n\
         Primary, backup, client and host network share the {processors} processors of this machine, and their caches. Two \
         figures tell what that alone costs.\n\
         *Beside another guest*: the same work, unprotected, while a second guest that has nothing to do with it computes. \
         Client and host\nnetwork then run where guests do, and what they leave in the caches a guest must fetch again. \
         No backup on the same machine costs less than\nsuch a neighbour, so the ratio is to be compared with it: *of \
         that* is what remains for the lockstep itself. *Ceiling*: what the\nprocessors leave to any pair in lockstep \
         whose log, channel, acknowledgements and replay cost nothing.\n\n\
         What the lockstep itself costs is processor time (records, the channel, digests, and above all the thread \
         switches that each\npiece of log and each acknowledgement take on both sides; to wake a thread on another processor is dear \
         where processors are virtual, as here)\nand, where processors are idle, outputs that wait for the acknowledgement.\n\n\
         | work | ratio | beside another guest | of that | ceiling | primary's processor time | idle, protected |\n\
         | --- | --- | --- | --- | --- | --- | --- |"
    )?;
    for row in rows {
        writeln!(text, "{row}")?;
    }
    writeln!(text)?;
    Ok(())
}

fn row(work: &Workload, processors: usize) -> Option<String> {
    let (ratio, beside, ceiling) = (work.ratio()?, work.beside()?, work.ceiling(processors)?);
    let cpu = |protected| work.median(protected, |run| run.primary_cpu_seconds);
    let more = (cpu(true)? / cpu(false)? - 1.0) * 100.0;
    Some(format!(
        "| {} | {ratio:.2} | {beside:.2} | {:.2} | {ceiling:.2} | {more:+.0} % | {:.0} % |",
        work.name,
        ratio / beside,
        work.idle_share(processors)? * 100.0,
    ))
}
