//! What Prometheus collects from `GET /metrics`: the numbers of `ft.status` and `vm.counters`, in base units
//! (seconds, bytes, ratios), as its naming rules want them.
//!
//! Built afresh from one status at each call, so that nothing has to be kept in step with it.

use ft::{FtStatus, Percentiles};
use prometheus::core::Collector;
use prometheus::{
    Counter, Gauge, GaugeVec, IntCounter, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use super::control::{Counters, VmState};

/// Of the text that [`text`] makes.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// All metrics, in the text format of Prometheus.
pub fn text(state: Option<VmState>, status: &FtStatus, counters: &Counters) -> String {
    let page = Page(Registry::new());
    match page.fill(state, status, counters) {
        Ok(()) => {}
        // Two metrics of one name: the test below would have found them.
        Err(error) => log::error!("metrics are missing: {error}"),
    }
    TextEncoder::new().encode_to_string(&page.0.gather()).unwrap_or_else(|error| {
        log::error!("metrics cannot be written: {error}");
        String::new()
    })
}

struct Page(Registry);

impl Page {
    fn fill(
        &self,
        state: Option<VmState>,
        status: &FtStatus,
        counters: &Counters,
    ) -> prometheus::Result<()> {
        let vm_state = state.map_or_else(|| "None".to_owned(), |state| format!("{state:?}"));
        self.label("dyad_vm_state", "State of the VM, as in vm.info", "state", &vm_state)?;
        self.label("dyad_ft_role", "This side's part in the pair", "role", &status.role)?;
        self.label("dyad_ft_state", "State of protection", "state", &status.state)?;
        let protected = matches!(status.state.as_str(), "protected" | "replaying");
        let protected_help = "1 if the VM survives the death of one of its two hosts";
        self.flag("dyad_ft_protected", protected_help, protected)?;
        self.gauge("dyad_ft_generation", "Period of protection", status.generation)?;

        let log = &status.log;
        for (step, bytes, point) in [
            ("recorded", log.recorded_bytes, log.recorded_point),
            ("acknowledged", log.acknowledged_bytes, log.acknowledged_point),
            ("executed", log.executed_bytes, log.executed_point),
        ] {
            self.counter(
                &format!("dyad_ft_log_{step}_bytes_total"),
                &format!("Bytes of log {step} in this generation"),
                bytes,
            )?;
            self.counter(
                &format!("dyad_ft_{step}_instructions_total"),
                &format!("Execution point {step}"),
                point,
            )?;
        }
        let rate = log.mbit_per_s * 1e6 / 8.0;
        self.float("dyad_ft_log_bytes_per_second", "Log rate of the last second", rate)?;
        self.float("dyad_ft_lag_seconds", "Lag of the backup now", seconds(status.lag_us))?;
        let lag_help = "Lag of the backup in this generation";
        self.percentiles("dyad_ft_lag_quantile_seconds", lag_help, &status.lag)?;
        let delay_help = "Time that outputs waited for their acknowledgement";
        self.percentiles(
            "dyad_ft_output_delay_quantile_seconds",
            delay_help,
            &status.output_delay,
        )?;
        self.gauge("dyad_ft_held_outputs", "Outputs waiting now", status.held_outputs)?;
        self.gauge("dyad_ft_held_output_bytes", "Bytes of them", status.held_output_bytes)?;
        let throttle_help =
            "Part of its time that the guest gives away so that the backup keeps up";
        self.float("dyad_ft_throttle_ratio", throttle_help, status.throttle)?;
        let throttled_help = "Time that the guest gave away";
        self.seconds_counter(
            "dyad_ft_throttled_seconds_total",
            throttled_help,
            status.throttled_us,
        )?;
        self.flag("dyad_ft_stalled", "1 while the guest waits for full buffers", status.stalled)?;
        self.counter("dyad_ft_stalls_total", "Times that it had to", status.stalls)?;
        let compared_help = "Digests of both sides compared";
        self.counter("dyad_ft_digests_compared_total", compared_help, status.digests_compared)?;
        let unequal_help = "Digests that differed";
        self.counter("dyad_ft_digests_unequal_total", unequal_help, status.digests_unequal)?;
        if let Some(clone) = &status.clone {
            let total_help = "Memory to copy to the backup";
            self.gauge("dyad_ft_clone_memory_bytes", total_help, clone.total_bytes)?;
            let sent_help = "Memory copied to the backup, repeats included";
            self.gauge("dyad_ft_clone_sent_bytes", sent_help, clone.sent_bytes)?;
            let total_help = "Bytes of mirrored disks";
            self.gauge("dyad_ft_clone_disk_bytes", total_help, clone.disk_total_bytes)?;
            let compared_help = "Bytes of mirrored disks compared with the backup's";
            self.gauge(
                "dyad_ft_clone_disk_compared_bytes",
                compared_help,
                clone.disk_compared_bytes,
            )?;
            let copied_help =
                "Bytes of mirrored disks that differed, or were written meanwhile, and were copied";
            self.gauge("dyad_ft_clone_disk_copied_bytes", copied_help, clone.disk_copied_bytes)?;
            if let Some(pause_us) = clone.pause_us {
                let pause_help = "Time that the guest stood still for the copy";
                self.float("dyad_ft_clone_pause_seconds", pause_help, seconds(pause_us))?;
            }
        }
        self.failover(status)?;
        self.devices(counters)
    }

    fn failover(&self, status: &FtStatus) -> prometheus::Result<()> {
        let Some(failover) = &status.last_failover else { return Ok(()) };
        let help = "Last failover: from the peer's last word to the end of each step";
        let steps = GaugeVec::new(Opts::new("dyad_ft_last_failover_seconds", help), &["step"])?;
        for (step, us) in [
            ("suspected", Some(failover.suspected_us)),
            ("drained", failover.drained_us),
            ("lease_over", failover.lease_over_us),
            ("claimed", failover.claimed_us),
            ("live", failover.live_us),
        ] {
            if let Some(us) = us {
                steps.with_label_values(&[step]).set(seconds(us));
            }
        }
        self.add(steps)
    }

    fn devices(&self, counters: &Counters) -> prometheus::Result<()> {
        let options = Opts::new("dyad_device", "Statistics of devices, as in vm.counters");
        let values = IntGaugeVec::new(options, &["device", "counter"])?;
        for (device, named) in counters {
            for (name, value) in named {
                values.with_label_values(&[device, name]).set(whole(*value));
            }
        }
        self.add(values)
    }

    fn label(&self, name: &str, help: &str, label: &str, value: &str) -> prometheus::Result<()> {
        let gauge = IntGaugeVec::new(Opts::new(name, help), &[label])?;
        gauge.with_label_values(&[value]).set(1);
        self.add(gauge)
    }

    fn flag(&self, name: &str, help: &str, value: bool) -> prometheus::Result<()> {
        self.gauge(name, help, u64::from(value))
    }

    fn gauge(&self, name: &str, help: &str, value: u64) -> prometheus::Result<()> {
        let gauge = IntGauge::new(name, help)?;
        gauge.set(whole(value));
        self.add(gauge)
    }

    fn float(&self, name: &str, help: &str, value: f64) -> prometheus::Result<()> {
        let gauge = Gauge::new(name, help)?;
        gauge.set(value);
        self.add(gauge)
    }

    fn counter(&self, name: &str, help: &str, value: u64) -> prometheus::Result<()> {
        let counter = IntCounter::new(name, help)?;
        counter.inc_by(value);
        self.add(counter)
    }

    fn seconds_counter(&self, name: &str, help: &str, us: u64) -> prometheus::Result<()> {
        let counter = Counter::new(name, help)?;
        counter.inc_by(seconds(us));
        self.add(counter)
    }

    fn percentiles(&self, name: &str, help: &str, values: &Percentiles) -> prometheus::Result<()> {
        let gauge = GaugeVec::new(Opts::new(name, help), &["quantile"])?;
        for (quantile, us) in
            [("0.5", values.p50_us), ("0.99", values.p99_us), ("1", values.max_us)]
        {
            gauge.with_label_values(&[quantile]).set(seconds(us));
        }
        self.add(gauge)
    }

    fn add(&self, collector: impl Collector + 'static) -> prometheus::Result<()> {
        self.0.register(Box::new(collector))
    }
}

fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

fn whole(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ft::Failover;
    use std::collections::BTreeMap;

    #[test]
    fn every_number_is_told_once_in_base_units() {
        let mut status = FtStatus {
            role: "primary".into(),
            state: "protected".into(),
            generation: 3,
            lag_us: 1_500,
            stalls: 2,
            clone: Some(ft::status::CloneStatus { pause_us: Some(2_000), ..Default::default() }),
            last_failover: Some(Failover { live_us: Some(320_000), ..Failover::default() }),
            ..FtStatus::default()
        };
        status.log.recorded_bytes = 77;
        status.output_delay.p99_us = 250;
        let disk = BTreeMap::from([("read_ops".to_owned(), 5)]);
        let counters = Counters::from([("_disk0".to_owned(), disk)]);
        let text = text(Some(VmState::Running), &status, &counters);
        for line in [
            r#"dyad_vm_state{state="Running"} 1"#,
            r#"dyad_ft_role{role="primary"} 1"#,
            "dyad_ft_protected 1",
            "dyad_ft_generation 3",
            "dyad_ft_log_recorded_bytes_total 77",
            "dyad_ft_lag_seconds 0.0015",
            r#"dyad_ft_output_delay_quantile_seconds{quantile="0.99"} 0.00025"#,
            "dyad_ft_stalls_total 2",
            "dyad_ft_clone_pause_seconds 0.002",
            r#"dyad_ft_last_failover_seconds{step="live"} 0.32"#,
            r#"dyad_device{counter="read_ops",device="_disk0"} 5"#,
            "# TYPE dyad_ft_stalls_total counter",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\nis not in\n{text}");
        }
        let mut types: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let all = types.len();
        types.dedup();
        assert_eq!(types.len(), all);
    }
}
