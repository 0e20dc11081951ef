//! Processor time as the host's kernel counts it: of a process, of one of its threads, of the whole machine.
//!
//! Of a process and of a thread the sum is exact, and what the kernel's tick found running parts it into user and
//! system. Of the machine only the time that processors were idle is exact: the tick overlooks much of what runs for
//! shorter than its period, so that time busy is the rest. All come in hundredths of a second or so.

use anyhow::{Context, Result};
use std::time::{Duration, Instant};

/// Processor time since the start of a process or thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// Outside of the kernel.
    pub user: Duration,
    /// In the kernel, on its behalf.
    pub system: Duration,
}

impl CpuTime {
    /// Of all threads of a process.
    ///
    /// # Errors
    ///
    /// If the process is gone.
    pub fn of_process(pid: u32) -> Result<Self> {
        Self::read(&format!("/proc/{pid}/stat"))
    }

    /// Of the thread of a process that is called `name`.
    ///
    /// # Errors
    ///
    /// If the process is gone or has no such thread.
    pub fn of_thread(pid: u32, name: &str) -> Result<Self> {
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            // A thread that has ended since is not the one that is looked for.
            let called = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
            if called.trim_end() == name {
                return Self::read(&task.join("stat").to_string_lossy());
            }
        }
        anyhow::bail!("process {pid} has no thread {name}")
    }

    fn read(file: &str) -> Result<Self> {
        let text = std::fs::read_to_string(file)?;
        let [user, system] = ticks_of_task(&text).with_context(|| format!("{file}: {text:?}"))?;
        Ok(Self { user: duration(user)?, system: duration(system)? })
    }

    /// Both together.
    #[must_use]
    pub fn total(self) -> Duration {
        self.user + self.system
    }

    /// What was used after `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            user: self.user.saturating_sub(before.user),
            system: self.system.saturating_sub(before.system),
        }
    }
}

/// How long the machine's processors have been idle at some moment, all together.
#[derive(Clone, Copy, Debug)]
pub struct MachineTime {
    idle: Duration,
    processors: u32,
    at: Instant,
}

impl MachineTime {
    /// At this moment.
    ///
    /// # Errors
    ///
    /// If `/proc/stat` has another form.
    pub fn now() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/stat")?;
        let at = Instant::now();
        let (idle, processors) = idle_ticks(&text).context("/proc/stat has another form")?;
        Ok(Self { idle: duration(idle)?, processors, at })
    }

    /// How long processors were busy after `before`, all together.
    #[must_use]
    pub fn busy_since(self, before: Self) -> Duration {
        let all = self.at.saturating_duration_since(before.at) * self.processors;
        all.saturating_sub(self.idle.saturating_sub(before.idle))
    }
}

fn duration(ticks: u64) -> Result<Duration> {
    let second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_secs_f64(ticks as f64 / second as f64))
}

/// utime and stime, fields 14 and 15 of the line of a process or thread (proc(5), `/proc/pid/stat`).
fn ticks_of_task(stat: &str) -> Option<[u64; 2]> {
    // The name, in parentheses, may hold anything.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    Some([fields.next()?.parse().ok()?, fields.next()?.parse().ok()?])
}

/// idle and iowait, the fourth and fifth number of the line of all processors, and how many of these have a line
/// (proc(5), `/proc/stat`).
fn idle_ticks(stat: &str) -> Option<(u64, u32)> {
    let processors = stat.lines().skip(1).filter(|line| line.starts_with("cpu")).count();
    let mut numbers = stat.lines().next()?.strip_prefix("cpu ")?.split_ascii_whitespace().skip(3);
    let idle: u64 = numbers.next()?.parse().ok()?;
    let waiting: u64 = numbers.next()?.parse().ok()?;
    Some((idle + waiting, u32::try_from(processors).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_a_task_gives_its_times_whatever_its_name_is() {
        let line = "7 (a) b (c) R 1 1 1 0 -1 4194304 100 0 0 0 31 17 5 6 20 0 1 0 14 31 4\n";
        assert_eq!(ticks_of_task(line), Some([31, 17]));
        assert_eq!(ticks_of_task("7 (vcpu0) S 1 1 1 0 -1 4194304 100 0 0 0 31"), None);
        assert_eq!(ticks_of_task("7 (vcpu0) S 1 1 1 0 -1 4194304 100 0 0 0 31 ?"), None);
        assert_eq!(ticks_of_task(""), None);
    }

    #[test]
    fn a_machine_is_idle_when_it_waits_for_a_disk_too() {
        let lines = "cpu  1 20 300 4000 50000 6 7 8 9 10\ncpu0 1 1 1 1\ncpu1 1 1 1 1\nintr 5 6\n";
        assert_eq!(idle_ticks(lines), Some((54_000, 2)));
        assert_eq!(idle_ticks("cpu  1 2 3 4\n"), None);
        assert_eq!(idle_ticks("cpu0 1 2 3 4 5 6 7 8 9 10\n"), None);
        assert_eq!(idle_ticks("cpu  1 2 3 4 x 6 7 8\n"), None);
        assert_eq!(idle_ticks(""), None);
    }

    #[test]
    fn a_machine_was_busy_when_it_was_not_idle() {
        let at = Instant::now();
        let time = |seconds, idle_ms| MachineTime {
            idle: Duration::from_millis(idle_ms),
            processors: 2,
            at: at + Duration::from_secs(seconds),
        };
        assert_eq!(time(3, 1_500).busy_since(time(0, 1_000)), Duration::from_millis(5_500));
        // Both come in steps of their own.
        assert_eq!(time(1, 2_010).busy_since(time(0, 0)), Duration::ZERO);
    }

    #[test]
    fn a_thread_is_found_by_its_name_and_what_it_uses_is_counted() -> Result<()> {
        let pid = std::process::id();
        let work = move || -> Result<CpuTime> {
            let before = CpuTime::of_thread(pid, "counted")?;
            let machine = MachineTime::now()?;
            while CpuTime::of_thread(pid, "counted")?.since(before).total()
                < Duration::from_millis(100)
            {}
            assert!(MachineTime::now()?.busy_since(machine) > Duration::from_millis(50));
            CpuTime::of_thread(pid, "counted")
        };
        let thread = std::thread::Builder::new().name("counted".to_owned()).spawn(work)?;
        let used = thread.join().expect("the thread does not panic")?;
        assert!(CpuTime::of_process(pid)?.total() >= used.total());
        assert!(CpuTime::of_thread(pid, "nobody").is_err());
        Ok(())
    }
}
