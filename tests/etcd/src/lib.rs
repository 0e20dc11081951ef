//! A real etcd cluster for tests: processes of the host's `etcd`, with their data in a temporary directory.
//!
//! Members can be killed, started again with their data, frozen and thawed. Dropping the cluster ends
//! them, and so does the death of the thread that started them.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The program, of the Debian package `etcd-server`.
const PROGRAM: &str = "etcd";
/// How long a member may take to answer.
const START: Duration = Duration::from_secs(30);
/// Ports that were free may be taken when etcd asks for them: so often others are tried.
const TRIES: u32 = 3;

/// Members on one address.
pub struct Cluster {
    members: Vec<Member>,
    /// The network namespace that the members live in, if it is not that of the test.
    namespace: Option<File>,
    directory: tempfile::TempDir,
}

struct Member {
    name: String,
    client: SocketAddr,
    peer: SocketAddr,
    child: Option<Child>,
}

/// Whether this machine has etcd. If not, says on standard error that `test` skips, past the test
/// runner's capture: a skipped test must not look like a passed one.
#[must_use]
pub fn installed(test: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(PROGRAM).is_file()));
    if !found {
        let text = format!("\nSKIPPED {test}: this machine has no {PROGRAM} (scripts/setup)\n");
        // Without standard error there is nobody to tell.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
    found
}

impl Cluster {
    /// `count` members on the loopback interface, all healthy.
    ///
    /// # Errors
    ///
    /// With what the members said, if they do not get there.
    pub fn start(count: usize) -> Result<Self> {
        let mut last = None;
        for _ in 0..TRIES {
            let ports = free_ports(2 * count)?;
            let address = Ipv4Addr::LOCALHOST.into();
            match Self::start_at(address, &ports, None) {
                Ok(cluster) => return Ok(cluster),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("no try was made")?)
    }

    /// Members on `address`, two `ports` for each, all healthy. They live in `namespace`, a file such as
    /// `/proc/PID/ns/net`.
    ///
    /// # Errors
    ///
    /// As [`Cluster::start`].
    pub fn start_at(address: IpAddr, ports: &[u16], namespace: Option<&Path>) -> Result<Self> {
        let members = ports.chunks_exact(2).enumerate().map(|(index, ports)| Member {
            name: format!("m{index}"),
            client: SocketAddr::new(address, ports[0]),
            peer: SocketAddr::new(address, ports[1]),
            child: None,
        });
        let directory = tempfile::Builder::new().prefix("etcd-").tempdir()?;
        let namespace = namespace.map(File::open).transpose()?;
        let mut cluster = Self { members: members.collect(), namespace, directory };
        for index in 0..cluster.members.len() {
            cluster.launch(index)?;
        }
        cluster.wait_until_healthy()?;
        Ok(cluster)
    }

    /// `HOST:PORT` of each member.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.client.to_string()).collect()
    }

    /// What Dyad calls this arbiter.
    #[must_use]
    pub fn url(&self) -> String {
        format!("etcd:{}", self.endpoints().join(","))
    }

    /// Kills a member as a power failure would.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn kill(&mut self, index: usize) -> Result<()> {
        let mut child = self.members[index].child.take().context("the member does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Starts a killed member again, with its data.
    ///
    /// # Errors
    ///
    /// If it runs, or cannot be started.
    pub fn launch(&mut self, index: usize) -> Result<()> {
        let all: Vec<_> = self
            .members
            .iter()
            .map(|member| format!("{}=http://{}", member.name, member.peer))
            .collect();
        let member = &self.members[index];
        ensure!(member.child.is_none(), "the member runs");
        let log = File::options().create(true).append(true).open(self.log(index))?;
        let (client, peer) =
            (format!("http://{}", member.client), format!("http://{}", member.peer));
        let mut command = Command::new(PROGRAM);
        command
            .args(["--name", &member.name])
            .arg("--data-dir")
            .arg(self.directory.path().join(&member.name))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &all.join(",")])
            // Else two clusters of the same shape would take each other's members for their own.
            .args(["--initial-cluster-token", &self.members[0].client.to_string()])
            .args(["--logger", "zap", "--log-level", "warn"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child = self.spawn(command)?;
        self.members[index].child = Some(child);
        Ok(())
    }

    /// Waits until every member that runs takes part in a majority.
    ///
    /// # Errors
    ///
    /// With the end of a member's log, if it ends or does not get there.
    pub fn wait_until_healthy(&mut self) -> Result<()> {
        let deadline = Instant::now() + START;
        for index in 0..self.members.len() {
            while self.members[index].child.is_some() {
                let client = self.members[index].client;
                if self.is_healthy(client) {
                    break;
                }
                let ended = match &mut self.members[index].child {
                    Some(child) => child.try_wait()?,
                    None => None,
                };
                if ended.is_some() || Instant::now() >= deadline {
                    let log = std::fs::read_to_string(self.log(index)).unwrap_or_default();
                    let lines: Vec<_> = log.lines().collect();
                    let end = lines[lines.len().saturating_sub(10)..].join("\n");
                    bail!("etcd at {client} is not healthy ({ended:?}):\n{end}");
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// Stops a member without ending it: its connections stand, nothing is answered.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn freeze(&self, index: usize) -> Result<()> {
        self.signal(index, Signal::SIGSTOP)
    }

    /// Lets a frozen member go on.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn thaw(&self, index: usize) -> Result<()> {
        self.signal(index, Signal::SIGCONT)
    }

    fn signal(&self, index: usize, signal: Signal) -> Result<()> {
        let child = self.members[index].child.as_ref().context("the member does not run")?;
        Ok(kill(Pid::from_raw(child.id().cast_signed()), signal)?)
    }

    /// Starts a process that dies with the calling thread.
    fn spawn(&self, mut command: Command) -> Result<Child> {
        let namespace = self.namespace.as_ref().map(File::try_clone).transpose()?;
        // SAFETY: the closure makes two system calls and touches no memory but its own stack and a number,
        // which is all that is allowed between fork and exec.
        unsafe {
            command.pre_exec(move || {
                if let Some(namespace) = &namespace {
                    setns(namespace, CloneFlags::CLONE_NEWNET)?;
                }
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                Ok(())
            });
        }
        command.spawn().with_context(|| format!("cannot start {PROGRAM}"))
    }

    fn is_healthy(&self, client: SocketAddr) -> bool {
        let Some(namespace) = &self.namespace else { return is_healthy(client) };
        // A thread that has entered a namespace stays in it.
        std::thread::scope(|scope| {
            let inside =
                || setns(namespace, CloneFlags::CLONE_NEWNET).is_ok() && is_healthy(client);
            scope.spawn(inside).join().unwrap_or(false)
        })
    }

    fn log(&self, index: usize) -> std::path::PathBuf {
        self.directory.path().join(format!("{}.log", self.members[index].name))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.members.iter_mut().filter_map(|member| member.child.as_mut()) {
            // Both fail only if it has ended, which is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Ports that nobody listens on just now.
fn free_ports(count: usize) -> Result<Vec<u16>> {
    let listeners: std::io::Result<Vec<_>> =
        (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect();
    listeners?.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

/// Whether the member at `client` says that it can do its work, which takes a majority.
fn is_healthy(client: SocketAddr) -> bool {
    let patience = Duration::from_secs(1);
    let ask = || -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect_timeout(&client, patience)?;
        stream.set_read_timeout(Some(patience))?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            // What came before the end is good.
            Err(error) if error.kind() != ErrorKind::ConnectionReset => Err(error),
            _ => Ok(answer),
        }
    };
    ask().is_ok_and(|answer| String::from_utf8_lossy(&answer).contains(r#""health":"true""#))
}
