//! One `dyad` process in the namespace of one host.

use crate::console::Console;
use crate::cpu_time::CpuTime;
use crate::guest::program;
use crate::namespace::Namespace;
use crate::patience::eventually;
use anyhow::{Context, Result, bail};
use api_client::Client;
use ft::FtStatus;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a process may take to answer its first request.
const START: Duration = Duration::from_secs(10);

/// How long any call may take.
const ANSWER: Duration = Duration::from_secs(60);

/// A running `dyad`. Dropping it kills it.
pub struct Vmm {
    child: Child,
    client: Client,
    log: PathBuf,
    /// The guest's serial console, if the VM has it on the terminal.
    pub console: Console,
}

impl Vmm {
    /// Starts `dyad` with `arguments` inside `namespace` and waits until its API answers.
    ///
    /// Socket and log are put into `directory` under `name`, which must be used once only.
    ///
    /// # Errors
    ///
    /// With what it printed, if it ends or stays silent.
    pub fn start(
        namespace: &Namespace,
        directory: &Path,
        name: &str,
        arguments: &[String],
    ) -> Result<Self> {
        let socket = directory.join(format!("{name}.sock"));
        let log = directory.join(format!("{name}.log"));
        let mut command = Command::new(program("dyad")?);
        command.arg("-v").arg("--api-socket").arg(&socket).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&log)?);
        let mut child = namespace.spawn(command)?;
        let output = child.stdout.take().context("dyad has no standard output")?;
        let input = child.stdin.take().context("dyad has no standard input")?;
        let console = Console::new(output, input);
        let mut vmm =
            Self { child, client: Client::new(&socket).with_timeout(ANSWER), log, console };
        eventually(START, "dyad answers vmm.ping", || {
            if let Some(status) = vmm.child.try_wait()? {
                bail!("dyad ended with {status}: {}", vmm.log());
            }
            Ok(vmm.client.get::<Value>("vmm.ping").ok())
        })?;
        Ok(vmm)
    }

    /// The API.
    #[must_use]
    pub fn api(&self) -> &Client {
        &self.client
    }

    /// `ft.status`.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer.
    pub fn ft_status(&self) -> Result<FtStatus> {
        Ok(self.client.get("ft.status")?)
    }

    /// `state` of `vm.info`.
    ///
    /// # Errors
    ///
    /// As [`Self::call`].
    pub fn state(&self) -> Result<String> {
        let info: Value = self.client.get("vm.info")?;
        Ok(info["state"].as_str().context("vm.info has no state")?.to_owned())
    }

    /// What the process wrote to standard error.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_else(|error| format!("no log: {error}"))
    }

    /// Waits until the log, which is written behind what happens, says `what`.
    ///
    /// # Errors
    ///
    /// If it does not in good time, with what it says.
    pub fn wait_for_log(&self, what: &str) -> Result<()> {
        let said = || Ok(self.log().contains(what).then_some(()));
        eventually(START, "the log says it", said)
            .with_context(|| format!("the log does not say {what:?}:\n{}", self.log()))
    }

    /// The last lines of [`Self::log`].
    #[must_use]
    pub fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Host CPU time the process has used, all threads together.
    ///
    /// # Errors
    ///
    /// If the process is gone.
    pub fn cpu_time(&self) -> Result<Duration> {
        Ok(CpuTime::of_process(self.pid())?.total())
    }

    /// Host CPU time of the thread that executes the guest.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn vcpu_time(&self) -> Result<CpuTime> {
        CpuTime::of_thread(self.pid(), "vcpu0")
    }

    /// Sends a signal.
    ///
    /// # Errors
    ///
    /// If the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// Kills the process as a power failure would and returns the moment it was certainly dead.
    ///
    /// # Errors
    ///
    /// If it had already ended by itself.
    pub fn kill(&mut self) -> Result<Instant> {
        if let Some(status) = self.child.try_wait()? {
            bail!("dyad had already ended with {status}: {}", self.log());
        }
        self.child.kill()?;
        self.child.wait()?;
        Ok(Instant::now())
    }

    /// Waits until the process ends by itself.
    ///
    /// # Errors
    ///
    /// If it does not within `patience`.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        eventually(patience, "dyad ends", || Ok(self.child.try_wait()?))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Both fail only if it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
