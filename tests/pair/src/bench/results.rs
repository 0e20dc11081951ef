//! What was measured, as it is kept on disk. Everything the document says is computed from this.

use anyhow::{Context, Result};
use ft::Percentiles;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One run of the benchmark.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Results {
    /// Where and with what.
    pub machine: Machine,
    /// The work in the guest, protected and not.
    pub workloads: Vec<Workload>,
    /// A guest that does nothing.
    pub idle: Option<Idle>,
    /// The machine without a pair.
    pub bare: Option<Bare>,
    /// Kills, by timing.
    pub failovers: Vec<Failovers>,
}

/// The machine both hosts and the client ran on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    /// Model of the processor.
    pub processor: String,
    /// How many processors.
    pub processors: usize,
    /// Memory.
    pub memory_mib: u64,
    /// The host's kernel.
    pub kernel: String,
    /// The guest's kernel.
    pub guest_kernel: String,
    /// Day of the measurement.
    pub date: String,
    /// Version of Dyad, with the commit where there is one.
    pub version: String,
    /// Whether this was a smoke run, whose figures mean little.
    pub quick: bool,
}

/// One kind of work.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Workload {
    /// Short name, for plots.
    pub name: String,
    /// What is done.
    pub what: String,
    /// Whether it waits for disk or network rather than for the processor.
    pub io: bool,
    /// What is counted.
    pub unit: String,
    /// How many in one run.
    pub amount: f64,
    /// Every run.
    pub runs: Vec<Run>,
}

/// The same work once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Host time from the request to its end.
    pub seconds: f64,
    /// Processor time of the primary's process.
    pub primary_cpu_seconds: f64,
    /// Time that the machine's processors were not idle, all together.
    pub machine_busy_seconds: f64,
    /// Processor time of the primary's thread that executes the guest.
    pub vcpu_seconds: f64,
    /// What of it was spent outside of the kernel.
    pub vcpu_user_seconds: f64,
    /// Processor time of another guest that computed meanwhile, as busy as a backup's, if there was one.
    pub neighbour_cpu_seconds: Option<f64>,
    /// What protection did meanwhile, if there was any.
    pub protection: Option<Protection>,
}

/// Protection during one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Protection {
    /// How long the guest stood still when it was protected.
    pub pause_ms: f64,
    /// Bytes of log.
    pub log_bytes: u64,
    /// How long outputs were held.
    pub output_delay: Percentiles,
    /// How far the backup was behind.
    pub lag: Percentiles,
    /// Processor time of the backup's process.
    pub backup_cpu_seconds: f64,
    /// Processor time of the backup's thread that executes the guest.
    pub backup_vcpu_seconds: f64,
    /// What of it was spent outside of the kernel.
    pub backup_vcpu_user_seconds: f64,
    /// Fraction of the time that was taken from the primary for the backup to keep up.
    pub throttle: f64,
    /// How often the primary stood still because buffers were full.
    pub stalls: u64,
}

/// A protected guest that does nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Idle {
    /// How long it was watched.
    pub seconds: f64,
    /// Bytes of log.
    pub log_bytes: u64,
    /// Processor time of the primary's process.
    pub primary_cpu_seconds: f64,
    /// Processor time of the backup's process.
    pub backup_cpu_seconds: f64,
    /// Processor time of the same guest unprotected, in the same time.
    pub unprotected_cpu_seconds: f64,
}

/// What the machine takes with no pair there, median microseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Bare {
    /// A message between the hosts and its answer.
    pub exchange_us: f64,
    /// A write of one block, made stable.
    pub sync_us: f64,
    /// The same while another file is written like that.
    pub sync_beside_us: f64,
}

/// Kills under one timing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failovers {
    /// Name of the timing.
    pub name: String,
    /// How often a side says that it is there.
    pub heartbeat_ms: u64,
    /// Silence after which it is suspected.
    pub failure_timeout_ms: u64,
    /// Kills asked for.
    pub planned: u32,
    /// Each kill.
    pub kills: Vec<Failover>,
    /// The client's requests acknowledged over all kills; none was lost, repeated or out of order.
    /// `None` while the account is not made up.
    pub acknowledged: Option<u64>,
}

/// One kill. The phases are in the order in which they end, from when the primary was heard last.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failover {
    /// From the kill to the first answer of the new primary at the client.
    pub first_answer_ms: f64,
    /// From when the primary was heard last until it was suspected.
    pub detection_ms: f64,
    /// Until every record received was executed.
    pub replay_ms: f64,
    /// Until the primary's lease was certainly over.
    pub lease_ms: f64,
    /// Until the claim was answered.
    pub claim_ms: f64,
    /// Until the guest ran on.
    pub go_live_ms: f64,
    /// How long the guest stood still when it had been protected before.
    pub pause_ms: f64,
    /// How long protecting it had taken.
    pub protect_ms: f64,
}

impl Failover {
    /// From when the primary was heard last until the guest ran on.
    #[must_use]
    pub fn live_ms(&self) -> f64 {
        self.detection_ms + self.replay_ms + self.lease_ms + self.claim_ms + self.go_live_ms
    }
}

impl Results {
    /// Reads what [`Self::save`] wrote.
    ///
    /// # Errors
    ///
    /// If there is nothing, or something else.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("there are no results in {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} does not hold results of this version", path.display()))
    }

    /// Writes everything so far; what was there before stays whole until then.
    ///
    /// # Errors
    ///
    /// If the folder cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let new = path.with_extension("new");
        std::fs::write(&new, serde_json::to_string_pretty(self)? + "\n")
            .and_then(|()| std::fs::rename(&new, path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Workload {
    /// The middle of `figure` over the runs that are protected, or those that are not and have no neighbour.
    #[must_use]
    pub fn median(&self, protected: bool, figure: impl Fn(&Run) -> f64) -> Option<f64> {
        let wanted = |run: &&Run| {
            run.protection.is_some() == protected && run.neighbour_cpu_seconds.is_none()
        };
        median(self.runs.iter().filter(wanted).map(figure))
    }

    /// The middle of `figure`, of a run and its neighbour's processor time, over the runs that have a neighbour.
    fn median_beside(&self, figure: impl Fn(&Run, f64) -> f64) -> Option<f64> {
        let figures = |run: &Run| Some(figure(run, run.neighbour_cpu_seconds?));
        median(self.runs.iter().filter_map(figures))
    }

    /// Speed unprotected beside another guest over speed unprotected: what this machine makes of a guest when
    /// somebody else wants a processor, whatever it does there.
    #[must_use]
    pub fn beside(&self) -> Option<f64> {
        let beside = self.median_beside(|run, _| run.seconds);
        Some(self.median(false, |run| run.seconds)? / beside?)
    }

    /// Processors that a pair whose lockstep costs nothing needs to be as fast as the unprotected guest.
    ///
    /// Where the runs leave a choice it is the lesser figure, so that the need is rather said too low than too high.
    #[must_use]
    pub fn need(&self) -> Option<Need> {
        let seconds = self.median(false, |run| run.seconds)?;
        // Where processors are never idle, the same work may cost less: nobody has to be woken.
        let alone = self.median(false, |run| run.machine_busy_seconds);
        let beside = self.median_beside(|run, neighbour| run.machine_busy_seconds - neighbour);
        // What the thread does in the kernel is input and output, of which the backup does none for the network. What it
        // does for a moment before it sleeps the backup does not either, so what that really took counts if it is less.
        let executed = self.median(false, |run| run.vcpu_user_seconds);
        let replayed = self.under_protection(|protection| protection.backup_vcpu_user_seconds);
        Some(Need {
            once: least([alone, beside])? / seconds,
            again: least([executed, replayed])? / seconds,
        })
    }

    /// The highest ratio that a pair in lockstep can reach on a machine of so many processors, if log, channel,
    /// acknowledgements and replay cost nothing, but what the guest executes is executed twice; 1 if that is no obstacle.
    #[must_use]
    pub fn ceiling(&self, processors: usize) -> Option<f64> {
        let need = self.need()?;
        Some((processors as f64 / (need.once + need.again)).min(1.0))
    }

    /// How much of the time `processors` processors were idle under protection.
    #[must_use]
    pub fn idle_share(&self, processors: usize) -> Option<f64> {
        let busy = |run: &Run| run.machine_busy_seconds / (run.seconds * processors as f64);
        Some((1.0 - self.median(true, busy)?).max(0.0))
    }

    /// Speed protected over speed unprotected.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        let seconds = |protected| self.median(protected, |run| run.seconds);
        Some(seconds(false)? / seconds(true)?)
    }

    /// Log written under protection.
    #[must_use]
    pub fn log_mbit_per_second(&self) -> Option<f64> {
        let rate = |run: &Run| {
            let bytes = run.protection.as_ref().map_or(0, |protection| protection.log_bytes);
            bytes as f64 * 8e-6 / run.seconds
        };
        self.median(true, rate)
    }

    /// The middle of a figure of protection.
    #[must_use]
    pub fn under_protection(&self, figure: impl Fn(&Protection) -> f64) -> Option<f64> {
        median(self.runs.iter().filter_map(|run| run.protection.as_ref()).map(figure))
    }
}

/// Processors that some work needs, in seconds of theirs per second of the unprotected run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Need {
    /// For what there is without protection too: guest, client, host network, and whatever else runs on the machine.
    pub once: f64,
    /// For executing the guest's instructions once more.
    pub again: f64,
}

impl Idle {
    /// Log written.
    #[must_use]
    pub fn log_mbit_per_second(&self) -> f64 {
        self.log_bytes as f64 * 8e-6 / self.seconds
    }
}

/// The middle value; between the two middle ones where there are two.
#[must_use]
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

fn least(values: impl IntoIterator<Item = Option<f64>>) -> Option<f64> {
    values.into_iter().flatten().min_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    fn run(seconds: f64, protected: bool) -> Run {
        Run {
            seconds,
            primary_cpu_seconds: seconds,
            machine_busy_seconds: 1.5,
            vcpu_seconds: 1.0,
            vcpu_user_seconds: 1.0,
            neighbour_cpu_seconds: None,
            protection: protected.then(|| Protection {
                pause_ms: 1.0,
                log_bytes: 1_000_000,
                output_delay: Percentiles::default(),
                lag: Percentiles::default(),
                backup_cpu_seconds: 1.0,
                backup_vcpu_seconds: 1.5,
                backup_vcpu_user_seconds: 1.25,
                throttle: 0.0,
                stalls: 0,
            }),
        }
    }

    fn beside(busy: f64) -> Run {
        let neighbour_cpu_seconds = Some(1.25);
        Run { neighbour_cpu_seconds, machine_busy_seconds: busy, ..run(1.25, false) }
    }

    fn workload(runs: Vec<Run>) -> Workload {
        let (name, unit) = (String::from("sort"), String::from("passes"));
        Workload { what: name.clone(), name, unit, io: false, amount: 1.0, runs }
    }

    #[test]
    fn results_come_back_and_a_ratio_is_that_of_the_speeds() -> Result<()> {
        let runs =
            vec![run(1.0, false), run(2.0, true), beside(3.0), run(1.0, false), run(2.0, true)];
        let workload = workload(runs);
        assert_eq!(workload.ratio(), Some(0.5));
        assert_eq!(workload.beside(), Some(0.8));
        assert_eq!(workload.log_mbit_per_second(), Some(4.0));
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("results.json");
        Results { workloads: vec![workload.clone()], ..Results::default() }.save(&path)?;
        let back = &Results::load(&path)?.workloads[0];
        assert_eq!(back.ratio(), Some(0.5));
        assert_eq!((back.need(), back.beside()), (workload.need(), Some(0.8)));
        std::fs::write(&path, "{}")?;
        assert!(Results::load(&path).is_err());
        Ok(())
    }

    #[test]
    fn results_without_the_times_of_processors_are_refused_by_name() -> Result<()> {
        let results =
            Results { workloads: vec![workload(vec![run(1.0, true)])], ..Results::default() };
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("results.json");
        for field in ["machine_busy_seconds", "vcpu_user_seconds", "backup_vcpu_user_seconds"] {
            results.save(&path)?;
            let text =
                std::fs::read_to_string(&path)?.replace(&format!("\"{field}\""), "\"older\"");
            std::fs::write(&path, text)?;
            let error = format!("{:#}", Results::load(&path).expect_err("a field is missing"));
            assert!(error.contains("does not hold results of this version"), "{error}");
            assert!(error.contains(&format!("missing field `{field}`")), "{error}");
        }
        Ok(())
    }

    #[test]
    fn a_ceiling_is_what_the_machine_leaves_to_a_lockstep_without_costs() {
        // 1.5 processors for all that there is without protection, 1 more for the backup's guest.
        let mut work = workload(vec![run(1.0, false), run(2.0, true)]);
        assert_eq!(work.need(), Some(Need { once: 1.5, again: 1.0 }));
        assert_eq!(work.ceiling(2), Some(0.8));
        assert_eq!(work.ceiling(4), Some(1.0));
        assert_eq!(work.idle_share(2), Some(0.625));

        // The backup needed less than the primary's thread did outside of the kernel.
        let protection = work.runs[1].protection.as_mut().expect("the run is protected");
        protection.backup_vcpu_user_seconds = 0.75;
        assert_eq!(work.need(), Some(Need { once: 1.5, again: 0.75 }));

        // Beside another guest the same work took less of the others.
        work.runs.push(beside(2.5));
        assert_eq!(work.need(), Some(Need { once: 1.25, again: 0.75 }));
        assert_eq!(work.ceiling(2), Some(1.0));
        assert_eq!(work.ceiling(1), Some(0.5));

        assert_eq!(workload(vec![run(1.0, true)]).ceiling(2), None);
        assert_eq!(workload(vec![run(1.0, false)]).idle_share(2), None);
    }
}
