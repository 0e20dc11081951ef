//! Everything a story needs around its processes: hosts, shared directory, disk, guest.

use crate::disk::Disk;
use crate::guest::{Guest, MAC, PORT, command_line, program};
use crate::interrupt::remove_on_interrupt;
use crate::network::{GUEST, Network, Side, TAP};
use crate::vmm::Vmm;
use anyhow::{Context, Result, ensure};
use ledger_client::load::{Load, Options};
use serde_json::{Value, json};
use std::cell::Cell;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Size of the guest's disk.
pub const DISK_BYTES: u64 = 256 << 20;

/// One lab at a time in a process: tests that share the processors with another guest measure nothing.
static TURN: Mutex<()> = Mutex::new(());

/// Two hosts with a network and a directory both reach.
pub struct Lab {
    /// The hosts.
    pub network: Network,
    /// The guest's disk, in the shared directory.
    pub disk: Disk,
    /// The guest.
    pub guest: Guest,
    /// The guest's memory.
    pub memory: &'static str,
    /// Who decides which side may live; the directory [`Self::claims`] if nothing else was chosen.
    pub arbiter_url: String,
    /// Raw images of more disks for the guest, after its own: `/dev/vdb` and so on.
    pub more_disks: Vec<PathBuf>,
    /// Image of the root file system with real programs, if the guest is to have it.
    programs: Option<PathBuf>,
    directory: tempfile::TempDir,
    started: Cell<u32>,
    _turn: MutexGuard<'static, ()>,
}

impl Lab {
    /// Builds the guest if needed and makes an empty disk and a fresh network.
    ///
    /// # Errors
    ///
    /// If any of it fails.
    pub fn new() -> Result<Self> {
        // A test that failed holding its turn has left nothing in it.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let guest = Guest::build()?;
        let directory = tempfile::Builder::new().prefix("dyad-").tempdir()?;
        remove_on_interrupt(directory.path())?;
        let shared = directory.path().join("shared");
        std::fs::create_dir_all(shared.join("claims"))?;
        let disk = Disk::create(shared.join("disk.raw"), DISK_BYTES)?;
        make_certificates(directory.path())?;
        let (network, started) = (Network::new()?, Cell::new(0));
        let arbiter_url = format!("file:{}", shared.join("claims").display());
        Ok(Self {
            network,
            disk,
            guest,
            memory: "256M",
            arbiter_url,
            more_disks: Vec::new(),
            programs: None,
            directory,
            started,
            _turn: turn,
        })
    }

    /// As [`Self::new`]; the guest goes on in the root file system with real programs.
    ///
    /// # Errors
    ///
    /// If any of it fails.
    pub fn with_programs() -> Result<Self> {
        let programs = Some(Guest::programs()?);
        Ok(Self { programs, ..Self::new()? })
    }

    /// Where sockets, logs and the shared directory are. It is removed with the lab.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The arbiter's directory, in the shared one.
    #[must_use]
    pub fn claims(&self) -> PathBuf {
        self.directory().join("shared/claims")
    }

    /// The certificates of one host.
    #[must_use]
    pub fn tls_dir(&self, side: Side) -> PathBuf {
        certificates(self.directory()).join(side.address())
    }

    /// Options that make `dyad` boot the guest with disk, network and console.
    #[must_use]
    pub fn boot_options(&self, mode: &str) -> Vec<String> {
        let mut options = self.options_without_network(mode, &self.disk);
        options.extend(["--net".to_owned(), format!("tap={TAP},mac={MAC}")]);
        options
    }

    /// As [`Self::boot_options`], with `disk` and no network: for a second guest beside the first, too.
    #[must_use]
    pub fn options_without_network(&self, mode: &str, disk: &Disk) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let root = if self.programs.is_some() { "dyad.root=/dev/vdb" } else { "" };
        let programs = self
            .programs
            .iter()
            .map(|image| format!("path={},image_type=raw,readonly=on", text(image)));
        let mut options: Vec<String> = [
            ("--kernel", text(&self.guest.kernel)),
            ("--initramfs", text(&self.guest.initramfs)),
            ("--cmdline", command_line(&format!("{root} {mode}"))),
            ("--cpus", "boot=1".to_owned()),
            ("--memory", format!("size={}", self.memory)),
            ("--serial", "tty".to_owned()),
            ("--console", "off".to_owned()),
            ("--hypervisor", "soft".to_owned()),
        ]
        .into_iter()
        .flat_map(|(option, value)| [option.to_owned(), value])
        .collect();
        options.push("--disk".to_owned());
        options.push(format!("path={},image_type=raw", text(disk.path())));
        options.extend(programs);
        let more = self.more_disks.iter();
        options.extend(more.map(|image| format!("path={},image_type=raw", text(image))));
        options
    }

    /// Starts a `dyad` on one host, with that host's certificates; without options it waits for a VM.
    ///
    /// # Errors
    ///
    /// As [`Vmm::start`].
    pub fn start(&self, side: Side, options: &[String]) -> Result<Vmm> {
        let number = self.started.get() + 1;
        self.started.set(number);
        let name = format!("{}{number}", side.letter());
        let certificates = ["--ft-tls-dir".into(), self.tls_dir(side).to_string_lossy().into()];
        let options = [&certificates, options].concat();
        let vmm = Vmm::start(self.network.host(side), self.directory(), &name, &options);
        vmm.with_context(|| format!("starting dyad on {side}"))
    }

    /// The body of an `ft.enable` for a backup at `backup_url`. The hosts of a lab are namespaces of one.
    #[must_use]
    pub fn enable(&self, backup_url: &str) -> Value {
        json!({ "backup_url": backup_url, "arbiter_url": self.arbiter_url, "same_host": true })
    }

    /// Where the guest's service is.
    ///
    /// # Errors
    ///
    /// None in practice: the address is a constant.
    pub fn service(&self) -> Result<SocketAddr> {
        Ok(SocketAddr::new(GUEST.parse()?, PORT))
    }

    /// Connects a load from the switch, where clients are, as soon as the service listens: the guest's shell may be there
    /// before it.
    ///
    /// # Errors
    ///
    /// If the service does not answer.
    pub fn load(&self, options: Options) -> Result<Load> {
        drop(self.connect(PORT)?);
        Ok(self.network.switch.run(move || Load::start(&options))??)
    }
}

/// Where a lab has its certificate authority.
fn certificates(lab: &Path) -> PathBuf {
    lab.join("tls")
}

/// Makes an authority, and a certificate for each host, as a user would.
fn make_certificates(lab: &Path) -> Result<()> {
    let mut command = Command::new(program("dyad-remote")?);
    command.arg("make-test-ca").arg(certificates(lab)).args([Side::A, Side::B].map(Side::address));
    let output = command.output().context("cannot run dyad-remote")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "dyad-remote make-test-ca failed: {text}");
    Ok(())
}
