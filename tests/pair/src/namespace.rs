//! Network namespaces without names: nothing to collide with, nothing to clean up.
//!
//! A namespace lives as long as a thread, a process or a descriptor refers to it. [`Namespace`] keeps a
//! thread inside it; what must happen in the namespace (spawning a process, opening a socket) is run by
//! that thread. When the test ends, however it ends, the kernel removes the namespace with all its
//! interfaces, and a process spawned by it is killed.

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CloneFlags, unshare};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace of its own, with loopback up.
pub struct Namespace {
    name: String,
    /// `/proc/PID/task/TID/ns/net` of the thread inside.
    path: PathBuf,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Namespace {
    /// Makes a namespace; `name` is only for messages.
    ///
    /// # Errors
    ///
    /// If the kernel refuses, as it does to users other than root.
    pub fn new(name: &str) -> Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let (entered, result) = channel();
        let thread =
            std::thread::Builder::new().name(format!("netns-{name}")).spawn(move || {
                let path = unshare(CloneFlags::CLONE_NEWNET).map(|()| {
                    let (pid, tid) = (std::process::id(), nix::unistd::gettid());
                    PathBuf::from(format!("/proc/{pid}/task/{tid}/ns/net"))
                });
                let inside = path.is_ok();
                if entered.send(path).is_ok() && inside {
                    for job in queue {
                        job();
                    }
                }
            })?;
        let path = result
            .recv()
            .context("the namespace's thread ended")?
            .context("the kernel refuses a network namespace (this needs root)")?;
        let namespace =
            Self { name: name.to_owned(), path, jobs: Some(jobs), thread: Some(thread) };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The name given to [`Self::new`].
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What `nsenter --net=PATH` takes to look inside while the test runs.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Runs `work` on the thread inside the namespace and waits for its result.
    ///
    /// # Errors
    ///
    /// If `work` panicked.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (sender, result) = channel();
        let job: Job = Box::new(move || {
            let work = std::panic::AssertUnwindSafe(work);
            // The receiver waits for exactly this message; it is gone only if its thread is.
            let _ = sender.send(std::panic::catch_unwind(work));
        });
        let jobs = self.jobs.as_ref().ok_or_else(|| anyhow!("namespace {} is gone", self.name))?;
        jobs.send(job).map_err(|_| anyhow!("the thread of namespace {} ended", self.name))?;
        match result.recv().with_context(|| format!("namespace {} lost a job", self.name))? {
            Ok(value) => Ok(value),
            Err(_) => Err(anyhow!("a job in namespace {} panicked", self.name)),
        }
    }

    /// Starts a process inside. It is killed when the namespace is dropped and when this process dies.
    ///
    /// # Errors
    ///
    /// If the program cannot be started.
    pub fn spawn(&self, mut command: Command) -> Result<Child> {
        let program = command.get_program().to_string_lossy().into_owned();
        // SAFETY: the closure makes one system call and touches no memory but its own stack, which is
        // all that is allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
                Ok(())
            });
        }
        self.run(move || command.spawn())?.with_context(|| format!("cannot start {program}"))
    }

    /// Runs `ip ARGUMENTS` inside and waits for it.
    ///
    /// # Errors
    ///
    /// What `ip` said, if it failed.
    pub fn ip(&self, arguments: &str) -> Result<()> {
        self.iproute2("ip", arguments)
    }

    /// Runs `tc ARGUMENTS` inside and waits for it.
    ///
    /// # Errors
    ///
    /// What `tc` said, if it failed.
    pub fn tc(&self, arguments: &str) -> Result<()> {
        self.iproute2("tc", arguments)
    }

    fn iproute2(&self, program: &str, arguments: &str) -> Result<()> {
        let mut command = Command::new(program);
        command.args(arguments.split_whitespace());
        let output = self.run(move || command.output())?;
        let output = output.with_context(|| format!("cannot run {program} (iproute2)"))?;
        ensure!(
            output.status.success(),
            "`{program} {arguments}` in namespace {}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panicking job was caught, so the thread has nothing to report.
            let _ = thread.join();
        }
    }
}
