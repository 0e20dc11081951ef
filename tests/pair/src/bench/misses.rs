//! The part of the document that says why ratios were missed: what the machine forbids, and what Dyad costs.

use super::results::{Results, Workload};
use super::targets::wanted_ratio;
use anyhow::Result;
use std::fmt::Write as _;

/// How much of what is missing to a ratio of 1 the ceiling accounts for; all of it where the ratio is not below.
fn explained(ratio: f64, ceiling: f64) -> f64 {
    if ratio >= ceiling { 1.0 } else { (1.0 - ceiling) / (1.0 - ratio) }
}

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
         The ceiling is what the {processors} processors of this machine leave to any pair in lockstep whose log, channel, \
         acknowledgements and\nreplay cost nothing: it needs the processors that the work keeps busy unprotected (guest, \
         client, host network), and those\nthat execute the guest's instructions once more. If that is more than there \
         are, the work takes so much longer; two hosts\nwould have the processors. What the ceiling does not explain is \
         not the number of processors, but what lockstep costs and\nhow it shares them: more processor time of the primary's \
         process for the same work (records, the channel, digests, thread switches\nfor each piece of log and each \
         acknowledgement) and of the backup's beside its guest, waits for a turn on a processor, and, where\nprocessors \
         were idle, outputs that wait for the acknowledgement.\n\n\
         | work | ratio | of the way to 1, the ceiling explains | processors needed without costs | primary's processor time | \
         idle, protected |\n\
         | --- | --- | --- | --- | --- | --- |"
    )?;
    for row in rows {
        writeln!(text, "{row}")?;
    }
    writeln!(text)?;
    Ok(())
}

fn row(work: &Workload, processors: usize) -> Option<String> {
    let (ratio, ceiling, need) = (work.ratio()?, work.ceiling(processors)?, work.need()?);
    let possible = if ratio > ceiling {
        format!("{ratio:.2}, above the {ceiling:.2} estimated as possible here")
    } else {
        format!("{ratio:.2} of {ceiling:.2} possible here")
    };
    let cpu = |protected| work.median(protected, |run| run.primary_cpu_seconds);
    let more = (cpu(true)? / cpu(false)? - 1.0) * 100.0;
    Some(format!(
        "| {} | {possible} | {:.0} % | {:.2} + {:.2} of {processors} | {more:+.0} % | {:.0} % |",
        work.name,
        explained(ratio, ceiling) * 100.0,
        need.once,
        need.again,
        work.idle_share(processors)? * 100.0,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ceiling_explains_what_lies_above_it() {
        let percent = |ratio, ceiling| (explained(ratio, ceiling) * 100.0_f64).round();
        assert_eq!(percent(0.6, 0.8), 50.0);
        assert_eq!(percent(0.6, 1.0), 0.0);
        assert_eq!(percent(0.8, 0.8), 100.0);
        assert_eq!(percent(0.9, 0.8), 100.0);
    }
}
