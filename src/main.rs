//! `dyad`: one process, one virtual machine.
//!
//! Options follow Cloud Hypervisor. With a kernel, the VM boots at once; without one, the process waits for its
//! API. It ends with 0 when the guest switches itself off, on `vmm.shutdown`, SIGTERM and SIGINT, with 1
//! when something failed, with 2 when it was called wrongly.

mod inherited;
mod logging;
mod options;
mod report;

use std::fs::File;
use std::io;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmm::api::dispatch::dispatch;
use vmm::api::route::Call;
use vmm::api::types::RestoreConfig;
use vmm::api::{ApiSocket, EventLoop, Inbox, Server};
use vmm::event_monitor::EventWriter;
use vmm::non_blocking::NonBlocking;
use vmm::vmm::Vmm;

use inherited::Inherited;
use logging::Logging;
use options::{ApiSocketOption, EventMonitorOption, Options};

fn main() -> ExitCode {
    let options = Options::parse();
    if let Err(error) = options.check() {
        error.exit();
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report::failure(
            &format!("dyad: {error}"),
            error.chain().skip(1).map(ToString::to_string),
        ),
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    let inherited = Inherited::take(options)?;
    // Socket, logs and snapshots hold what the guest knows: they are for the owner only.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    // Outlives all that logs.
    let logging = Logging::start(options.verbose, options.log_file.as_deref())?;
    let first_call = first_call(options)?;
    stay_in_memory();
    let (event_loop, inbox) = EventLoop::new(options.no_shutdown);
    let (hypervisor, reason) = hypervisor::choose(options.hypervisor)?;
    log::info!("{reason}");
    // Dropped after the VMM, whose last events it is to write.
    let writer = start_event_monitor(options.event_monitor.as_ref(), inherited.event_monitor)?;
    let events = writer.as_ref().map(EventWriter::monitor).unwrap_or_default();
    events.event("vmm", "starting");
    let mut vmm = Vmm::new(hypervisor, inbox.doorbell(), events.clone())
        .with_tls_dir(options.ft_tls_dir.clone());
    let socket = match &options.api_socket {
        Some(ApiSocketOption::Path(path)) => Some(ApiSocket::bind(path)?),
        Some(ApiSocketOption::Descriptor(_)) | None => inherited.api_socket,
    };
    // Dropped last, so that the answer to vmm.shutdown still goes out.
    let _server = socket.map(|socket| Server::start(socket, inbox.clone())).transpose()?;
    end_on_signals(inbox, logging.sender())?;
    if let Some(path) = options.api_socket.as_ref() {
        log::info!("the API is served on {path}");
    }
    for call in first_call {
        let (response, _) = dispatch(call, &mut vmm, &events);
        if response.status >= 300 {
            // A client may be waiting for its answer, and the API thread with it.
            drop(event_loop);
            return Err(refusal(response.body.as_deref().unwrap_or_default()));
        }
    }
    event_loop.run(&mut vmm, &events)?;
    events.event("vmm", "shutdown");
    Ok(())
}

/// What the options ask for beyond waiting for the API.
fn first_call(options: &Options) -> anyhow::Result<Vec<Call>> {
    if let Some(text) = &options.restore {
        let unusable = || format!("--restore '{text}' cannot be used");
        let config = RestoreConfig::from_option(text).with_context(unusable)?;
        config.validate().with_context(unusable)?;
        return Ok(vec![Call::Restore(Box::new(config))]);
    }
    let vm = options.vm.options();
    if vm.is_empty() {
        return Ok(Vec::new());
    }
    Ok(vec![Call::Create(Box::new(vm.config()?)), Call::Boot])
}

/// An error body of the API as an error of this program.
fn refusal(body: &str) -> anyhow::Error {
    let chain: Vec<String> = serde_json::from_str(body).unwrap_or_default();
    let mut causes = chain.into_iter().rev();
    let root = anyhow!(causes.next().unwrap_or_else(|| "the VM could not be started".to_owned()));
    causes.fold(root, |error, outer| error.context(outer))
}

/// Keeps what this process has touched in memory: a page of code fetched back from a busy disk can take
/// longer than a failure timeout.
fn stay_in_memory() {
    use nix::sys::mman::{MlockAllFlags, mlockall};
    let flags = MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE;
    // Pages are locked as they are touched, not fetched for it: guest memory stays unallocated until used.
    let on_fault = MlockAllFlags::from_bits_retain(nix::libc::MCL_ONFAULT);
    if let Err(error) = mlockall(flags | on_fault) {
        log::info!("memory is not locked: {error}");
    }
}

/// Writes events to `inherited`, else to the path that `option` names.
fn start_event_monitor(
    option: Option<&EventMonitorOption>,
    inherited: Option<File>,
) -> anyhow::Result<Option<EventWriter>> {
    let started = match (option, inherited) {
        (_, Some(file)) => EventWriter::start(file).context("cannot write events"),
        (Some(EventMonitorOption::Path(path)), None) => EventWriter::create(path)
            .with_context(|| format!("cannot write events to '{}'", path.display())),
        (Some(EventMonitorOption::Descriptor(_)) | None, None) => return Ok(None),
    };
    started.map(Some)
}

/// Ends the process in order on the first signal and at once on the second.
fn end_on_signals(inbox: Inbox, log: NonBlocking<Vec<u8>>) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot handle signals")?;
    let wait = move || {
        for (count, signal) in signals.forever().enumerate() {
            if count > 0 {
                log::error!("signal {signal} again: ending without stopping the VM in order");
                log.flush();
                signal_hook::low_level::exit(1);
            }
            log::info!("signal {signal}");
            inbox.terminate();
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)
        .map(drop)
        .map_err(|error: io::Error| anyhow!(error).context("cannot start the signal thread"))
}
