//! The part of the document that says why ratios were missed: what another guest costs, and what lockstep does.

use super::results::{Bare, Results, Workload};
use super::targets::wanted_ratio;
use anyhow::Result;
use std::fmt::Write as _;

/// Writes the section; nothing if every ratio is as wanted.
pub(super) fn write(text: &mut String, results: &Results) -> Result<()> {
    let processors = results.machine.processors;
    let missed = |work: &&Workload| work.ratio().is_some_and(|ratio| ratio < wanted_ratio(work));
    let missed: Vec<&Workload> = results.workloads.iter().filter(missed).collect();
    let rows: Vec<String> = missed.iter().filter_map(|work| row(work, processors)).collect();
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(
        text,
        "### Why ratios were missed\n\n\
         Primary, backup, client and host network share the {processors} processors of this machine. Two figures tell \
         what that alone costs.\n\
         *Beside another guest*: the same work, unprotected, while a second guest that has nothing to do with it computes; \
         *of that* is the ratio\nover it, what remains for the lockstep itself. *Ceiling*: what the processors leave to \
         any pair in lockstep whose log, channel,\nacknowledgements and replay cost nothing.\n\n\
         The lockstep itself costs processor time on both sides (records, the channel, digests, a thread switch or more for \
         each piece\nof log and each acknowledgement) and, where processors are idle, outputs that wait for the \
         acknowledgement. Work that waits\nfor a shared disk waits longer: each write waits for an acknowledgement too, and \
         completes only when it is stable, for a dead host's cache is lost;\nunprotected, only what the guest flushes is \
         made stable. Mirrored disks need neither, but here both are on one disk, which two real hosts would not share.\n\n\
         | work | ratio | beside another guest | of that | ceiling | primary's processor time | idle, protected |\n\
         | --- | --- | --- | --- | --- | --- | --- |"
    )?;
    for row in rows {
        writeln!(text, "{row}")?;
    }
    writeln!(text)?;
    if let Some(bare) = &results.bare {
        machine(text, bare, missed.iter().find(|work| work.name == "echo"))?;
    }
    Ok(())
}

/// What comes from the machine alone.
fn machine(text: &mut String, bare: &Bare, echo: Option<&&Workload>) -> Result<()> {
    let Bare { exchange_us: exchange, sync_us, sync_beside_us } = bare;
    writeln!(
        text,
        "An acknowledgement is a message between the hosts and its answer. Between two idle threads that alone takes \
         {exchange:.0} µs on this machine.\nA synced write takes {sync_us:.0} µs, and {sync_beside_us:.0} µs while another file \
         on the same disk is written like that."
    )?;
    if let Some(echo) = echo
        && let Some(seconds) = echo.median(false, |run| run.seconds)
    {
        let request = seconds * 1e6 / echo.amount;
        writeln!(
            text,
            "A request of `echo` takes {request:.0} µs unprotected; one such exchange added to it, and nothing else, is a ratio \
             of {:.2}.",
            request / (request + exchange)
        )?;
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
