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
    /// Whether another program kept one processor busy meanwhile, as a backup would.
    #[serde(default)]
    pub neighbour: bool,
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
        let wanted = |run: &&Run| run.protection.is_some() == protected && !run.neighbour;
        median(self.runs.iter().filter(wanted).map(figure))
    }

    /// Speed unprotected beside a busy processor over speed unprotected: what this machine makes of a guest when
    /// somebody else wants a processor, whatever it does there.
    #[must_use]
    pub fn beside(&self) -> Option<f64> {
        let beside = self.runs.iter().filter(|run| run.neighbour).map(|run| run.seconds);
        Some(self.median(false, |run| run.seconds)? / median(beside)?)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn results_come_back_and_a_ratio_is_that_of_the_speeds() -> Result<()> {
        let run = |seconds, protected: bool| Run {
            seconds,
            primary_cpu_seconds: seconds,
            neighbour: false,
            protection: protected.then(|| Protection {
                pause_ms: 1.0,
                log_bytes: 1_000_000,
                output_delay: Percentiles::default(),
                lag: Percentiles::default(),
                backup_cpu_seconds: 1.0,
                throttle: 0.0,
                stalls: 0,
            }),
        };
        let beside = Run { neighbour: true, ..run(1.25, false) };
        let runs = vec![run(1.0, false), run(2.0, true), beside, run(1.0, false), run(2.0, true)];
        let (name, unit) = (String::from("sort"), String::from("passes"));
        let workload = Workload { what: name.clone(), name, unit, io: false, amount: 1.0, runs };
        assert_eq!(workload.ratio(), Some(0.5));
        assert_eq!(workload.beside(), Some(0.8));
        assert_eq!(workload.log_mbit_per_second(), Some(4.0));
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("results.json");
        Results { workloads: vec![workload], ..Results::default() }.save(&path)?;
        assert_eq!(Results::load(&path)?.workloads[0].ratio(), Some(0.5));
        std::fs::write(&path, "{}")?;
        assert!(Results::load(&path).is_err());
        Ok(())
    }
}
