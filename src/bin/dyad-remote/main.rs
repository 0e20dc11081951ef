//! `dyad-remote`: one call to the API of a running `dyad`, in the manner of `ch-remote`.
//!
//! A success with an answer prints it, one without prints nothing; both end with 0. A refusal prints the server's
//! texts on standard error and ends with 1, wrong usage with 2. `make-test-ca` alone makes no call.

#[path = "../../report.rs"]
mod report;
mod test_ca;
mod watch;

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, bail};
use api_client::{Client, Response};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use serde::Serialize;
use vmm::api::types::{RestoreConfig, SnapshotConfig};
use vmm::api::{FtEnableConfig, FtReceiveConfig};

/// How long an answer is waited for that takes no work.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// After this long the user is told what is being waited for.
const PATIENCE: Duration = Duration::from_secs(3);

/// Control a running dyad
#[derive(Debug, Parser)]
#[command(name = "dyad-remote", version, max_term_width = 100)]
struct Options {
    /// The Unix socket dyad was started with
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,

    /// Give up when no answer has come by then [default: 60; boot, reboot, shutdown, delete, snapshot, restore,
    /// ft-enable, ft-failover, ft-disable and shutdown-vmm take their time, and are waited for]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: Option<u64>,

    #[command(subcommand)]
    command: Command,
}

impl Options {
    /// Where the calls go. Ends the program if it was not told.
    fn socket(&self) -> &Path {
        self.api_socket.as_deref().unwrap_or_else(|| {
            let text = "--api-socket PATH is needed: the socket dyad was started with";
            Self::command().error(ErrorKind::MissingRequiredArgument, text).exit()
        })
    }

    /// How long an answer to `command` is waited for.
    fn timeout(&self) -> Option<Duration> {
        self.timeout.map(Duration::from_secs).or(self.command.usual_timeout())
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Ask the VMM for its version
    Ping,
    /// End the VMM, and its VM with it
    ShutdownVmm,
    /// Configure a VM from JSON
    Create {
        /// File with the configuration; '-' is standard input
        #[arg(default_value = "-")]
        path: PathBuf,
    },
    /// Boot the configured VM
    Boot,
    /// Show configuration, state and devices
    Info,
    /// Show statistics of disks and network devices
    Counters,
    /// Stop the guest's execution
    Pause,
    /// Let the guest execute again
    Resume,
    /// Press the power button
    PowerButton,
    /// Reset the VM
    Reboot,
    /// Stop the VM and keep its configuration
    Shutdown,
    /// Stop the VM and forget it
    Delete,
    /// Write a paused VM into a directory
    Snapshot {
        /// An existing directory: file:///DIR
        url: String,
    },
    /// Make a VM from a snapshot
    Restore {
        /// source_url=file:///DIR[,resume=on]
        options: String,
    },
    /// Wait for a VM to protect
    ///
    /// tls_dir is a directory with ca.pem, host.pem and host.key; instead of it, tls_ca=FILE,
    /// tls_certificate=FILE and tls_key=FILE, or insecure=on on both sides for plain TCP. Without any of
    /// these, what dyad was started with (--ft-tls-dir). The primary is believed if its certificate is of
    /// the CA and, with allowed_peers=[NAME,...], names one of these. A VM with more than
    /// max_memory_bytes=SIZE is refused. Disks have their images here where the primary has its own, unless
    /// disks=[ID=PATH,...] says otherwise.
    ///
    /// A dyad that waits makes no VM of its own: create and restore are refused, until delete ends the waiting.
    FtReceive {
        /// listen_url=tcp:HOST:PORT[,tls_dir=DIR][,...]
        options: String,
    },
    /// Protect the running VM, and make its next backup whenever one is lost
    ///
    /// standbys=[tcp:HOST:PORT,...] names more hosts where dyad waits for it: whichever side goes on alone
    /// makes the next backup on one of them by itself, so name both sides' hosts.
    ///
    /// The backup's certificate must name HOST; for tls_dir and its like see ft-receive. The other keys,
    /// with their defaults: mode=lockstep, disk_mode=shared, disk_reads=log, heartbeat_ms=20,
    /// failure_timeout_ms=300, max_lag_ms=100, log_buffer_bytes=16M, disk_timeout_ms=10000. With
    /// disk_mode=mirrored each host has images of its own; with disk_reads=backup the backup reads shared
    /// ones by itself. Either way a backup that waits for a disk of its own for longer than disk_timeout_ms,
    /// while the VM stands still, gives itself up, and the VM goes on without it. With same_host=on a standby
    /// may be on the VM's own host, which is refused else: to try protection out.
    FtEnable {
        /// backup_url=tcp:HOST:PORT,arbiter_url=URL[,tls_dir=DIR][,...]; URL is what both hosts must reach:
        /// file:/DIR, a shared directory, or etcd:[HOST:PORT,HOST:PORT,...]
        options: String,
    },
    /// Show how the VM is protected
    FtStatus,
    /// Watch how the VM is protected: state, lag, log, outputs, throttle, digests, last failover
    FtWatch(watch::Options),
    /// Hand the VM over to the backup, or, asked of the backup, take it over
    FtFailover,
    /// Go on unprotected, and look for no backup
    FtDisable,
    /// Make certificates for the hosts of a pair, to try protection out
    ///
    /// Needs no dyad. DIR gets a certificate authority, ca.pem and ca.key, and a directory for each HOST with
    /// what that host needs: ca.pem, host.pem and host.key. Copy DIR/HOST to the host and name it as tls_dir;
    /// keep ca.key to yourself, since with it anybody can be a host of yours. Called again with other hosts,
    /// it adds them to the same authority. Nothing is overwritten. The certificates are good for a year.
    #[command(verbatim_doc_comment)]
    MakeTestCa {
        /// Where to
        directory: PathBuf,
        /// Names or IP addresses by which others connect; several of one host with commas: b,10.0.0.2
        #[arg(required = true, value_name = "HOST")]
        hosts: Vec<String>,
    },
}

impl Command {
    /// `None` if it may take any time: memory is copied, disks finish what they have, hosts talk to each other.
    fn usual_timeout(&self) -> Option<Duration> {
        match self {
            Self::Ping
            | Self::Create { .. }
            | Self::Info
            | Self::Counters
            | Self::Pause
            | Self::Resume
            | Self::PowerButton
            | Self::FtReceive { .. }
            | Self::FtStatus
            | Self::FtWatch(_)
            | Self::MakeTestCa { .. } => Some(ANSWER_TIMEOUT),
            Self::ShutdownVmm
            | Self::Boot
            | Self::Reboot
            | Self::Shutdown
            | Self::Delete
            | Self::Snapshot { .. }
            | Self::Restore { .. }
            | Self::FtEnable { .. }
            | Self::FtFailover
            | Self::FtDisable => None,
        }
    }
}

/// A request, ready to be sent.
struct Call {
    method: &'static str,
    endpoint: &'static str,
    body: Option<Vec<u8>>,
}

impl Call {
    fn get(endpoint: &'static str) -> Self {
        Self { method: "GET", endpoint, body: None }
    }

    fn put(endpoint: &'static str) -> Self {
        Self { method: "PUT", endpoint, body: None }
    }

    fn put_json(endpoint: &'static str, body: &impl Serialize) -> anyhow::Result<Self> {
        let body = serde_json::to_vec(body).context("cannot write the request as JSON")?;
        Ok(Self { body: Some(body), ..Self::put(endpoint) })
    }

    /// `None` for what is done here.
    fn new(command: &Command) -> anyhow::Result<Option<Self>> {
        let unusable = |options: &str| format!("'{options}' cannot be used");
        let call = match command {
            Command::MakeTestCa { .. } => return Ok(None),
            Command::Ping => Ok(Self::get("vmm.ping")),
            Command::ShutdownVmm => Ok(Self::put("vmm.shutdown")),
            Command::Create { path } => {
                // Sent unchanged: the server judges it.
                let body = read(path)?;
                if body.is_empty() {
                    bail!(
                        "'{}' is empty: a VM's configuration in JSON is wanted, as in \
                         {{\"payload\": {{\"kernel\": \"/PATH\", \"cmdline\": \"console=ttyS0\"}}, \
                         \"disks\": [{{\"path\": \"/PATH\"}}]}}",
                        path.display()
                    );
                }
                Ok(Self { body: Some(body), ..Self::put("vm.create") })
            }
            Command::Boot => Ok(Self::put("vm.boot")),
            Command::Info => Ok(Self::get("vm.info")),
            Command::Counters => Ok(Self::get("vm.counters")),
            Command::Pause => Ok(Self::put("vm.pause")),
            Command::Resume => Ok(Self::put("vm.resume")),
            Command::PowerButton => Ok(Self::put("vm.power-button")),
            Command::Reboot => Ok(Self::put("vm.reboot")),
            Command::Shutdown => Ok(Self::put("vm.shutdown")),
            Command::Delete => Ok(Self::put("vm.delete")),
            Command::Snapshot { url } => {
                Self::put_json("vm.snapshot", &SnapshotConfig { destination_url: url.clone() })
            }
            Command::Restore { options } => {
                let config = RestoreConfig::from_option(options);
                Self::put_json("vm.restore", &config.with_context(|| unusable(options))?)
            }
            Command::FtReceive { options } => {
                let config = FtReceiveConfig::from_option(options);
                Self::put_json("ft.receive", &config.with_context(|| unusable(options))?)
            }
            Command::FtEnable { options } => {
                let config = FtEnableConfig::from_option(options);
                Self::put_json("ft.enable", &config.with_context(|| unusable(options))?)
            }
            // Watching is many calls; see `main`.
            Command::FtStatus | Command::FtWatch(_) => Ok(Self::get("ft.status")),
            Command::FtFailover => Ok(Self::put("ft.failover")),
            Command::FtDisable => Ok(Self::put("ft.disable")),
        };
        call.map(Some)
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let result = if path == Path::new("-") {
        io::stdin().lock().read_to_end(&mut bytes)
    } else {
        File::open(path).and_then(|mut file| file.read_to_end(&mut bytes))
    };
    result.with_context(|| format!("cannot read '{}'", path.display()))?;
    Ok(bytes)
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Command::FtWatch(how) = &options.command {
        return match watch::watch(options.socket(), how) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                report::failure("dyad-remote cannot watch", error.chain().map(ToString::to_string))
            }
        };
    }
    match run(&options) {
        Ok(Some(response)) => print(response),
        Ok(None) => ExitCode::SUCCESS,
        Err(error) => report::failure(
            "dyad-remote could not make the call",
            error.chain().map(ToString::to_string),
        ),
    }
}

/// The server's answer, if there was one to ask.
fn run(options: &Options) -> anyhow::Result<Option<Response>> {
    if let Command::MakeTestCa { directory, hosts } = &options.command {
        for line in test_ca::make(directory, hosts)? {
            println!("{line}");
        }
        return Ok(None);
    }
    let Some(call) = Call::new(&options.command)? else {
        return Ok(None);
    };
    let client = Client::new(options.socket());
    let client = match options.timeout() {
        Some(timeout) => client.with_timeout(timeout),
        None => client,
    };
    Ok(Some(ask(&client, &call)?))
}

/// Makes the call, and says after a while what it waits for.
fn ask(client: &Client, call: &Call) -> Result<Response, api_client::Error> {
    let Call { method, endpoint, body } = call;
    let (answered, waiting) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if waiting.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                eprintln!(
                    "dyad-remote: no answer to {endpoint} yet; Ctrl-C ends the waiting, not the call"
                );
            }
        });
        let answer = client.request(method, endpoint, body.as_deref());
        drop(answered);
        answer
    })
}

fn print(response: Response) -> ExitCode {
    let status = response.status;
    let body = response.body.clone();
    let texts = match response.success() {
        Ok(_) => {
            let Some(mut body) = body else { return ExitCode::SUCCESS };
            body.push(b'\n');
            return match io::stdout().lock().write_all(&body) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    report::failure("dyad-remote could not print the answer", [error.to_string()])
                }
            };
        }
        Err(api_client::Error::Refused { chain, .. }) => chain,
        Err(_) => vec!["the server's explanation cannot be read".to_owned()],
    };
    let head = ["The server refused the call".to_owned(), status_name(status)];
    report::failure("dyad-remote got an error response", head.into_iter().chain(texts))
}

fn status_name(status: u16) -> String {
    let name = match status {
        400 => "Bad Request",
        404 => "Not Found",
        409 => "Conflict",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "unknown status",
    };
    format!("{status} {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn calls_have_the_bodies_the_api_expects() {
        let call = |arguments: &[&str]| {
            let all = ["dyad-remote", "--api-socket", "/s"].iter().chain(arguments);
            let call = Call::new(&Options::try_parse_from(all).unwrap().command).unwrap().unwrap();
            let body = call.body.map(|body| String::from_utf8(body).unwrap());
            (call.method, call.endpoint, body.unwrap_or_default())
        };
        assert_eq!(call(&["info"]), ("GET", "vm.info", String::new()));
        assert_eq!(call(&["shutdown-vmm"]), ("PUT", "vmm.shutdown", String::new()));
        assert_eq!(call(&["power-button"]), ("PUT", "vm.power-button", String::new()));
        let url = r#"{"destination_url":"file:///s"}"#.to_owned();
        assert_eq!(call(&["snapshot", "file:///s"]), ("PUT", "vm.snapshot", url));
        let receive = r#"{"listen_url":"tcp:0.0.0.0:7700"}"#.to_owned();
        assert_eq!(
            call(&["ft-receive", "listen_url=tcp:0.0.0.0:7700"]),
            ("PUT", "ft.receive", receive)
        );
        let (_, endpoint, body) =
            call(&["ft-enable", "backup_url=tcp:b:7700,arbiter_url=file:/a,heartbeat_ms=10"]);
        assert_eq!(endpoint, "ft.enable");
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["heartbeat_ms"], 10);
        assert_eq!(body["disk_mode"], "shared");
    }
}
