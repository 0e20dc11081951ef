//! A server in front of a VM that only remembers what was asked of it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use api_client::Client;
use tempfile::TempDir;
use vmm::api::types::{RestoreConfig, SnapshotConfig};
use vmm::api::{
    ApiSocket, Control, ControlError, Counters, Doorbell, EventLoop, FtEnableConfig,
    FtReceiveConfig, FtStatus, Inbox, LoopError, Server, VmEnd, VmInfo, VmState,
};
use vmm::config::VmConfig;
use vmm::event_monitor::EventMonitor;

/// States of a VM as a client sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    None,
    Created,
    Running,
    Paused,
}

/// What the tests and the VM share.
#[derive(Default)]
struct Shared {
    calls: Vec<String>,
    refusal: Option<ControlError>,
    end: Option<VmEnd>,
}

struct FakeVm {
    shared: Arc<Mutex<Shared>>,
    config: Option<VmConfig>,
    state: VmState,
}

impl FakeVm {
    fn note(&self, call: impl Into<String>) -> Result<(), ControlError> {
        let mut shared = self.shared.lock().unwrap();
        shared.calls.push(call.into());
        shared.refusal.take().map_or(Ok(()), Err)
    }

    fn go(&mut self, call: &str, state: VmState) -> Result<(), ControlError> {
        self.note(call)?;
        self.state = state;
        Ok(())
    }
}

impl Control for FakeVm {
    fn state(&self) -> Option<VmState> {
        self.config.as_ref().map(|_| self.state)
    }

    fn create(&mut self, config: VmConfig) -> Result<(), ControlError> {
        self.config = Some(config);
        self.go("create", VmState::Created)
    }

    fn boot(&mut self) -> Result<(), ControlError> {
        self.go("boot", VmState::Running)
    }

    fn delete(&mut self) -> Result<(), ControlError> {
        self.config = None;
        self.note("delete")
    }

    fn shutdown(&mut self) -> Result<(), ControlError> {
        self.go("shutdown", VmState::Created)
    }

    fn reboot(&mut self) -> Result<(), ControlError> {
        self.go("reboot", VmState::Running)
    }

    fn pause(&mut self) -> Result<(), ControlError> {
        self.go("pause", VmState::Paused)
    }

    fn resume(&mut self) -> Result<(), ControlError> {
        self.go("resume", VmState::Running)
    }

    fn power_button(&mut self) -> Result<(), ControlError> {
        self.note("power_button")
    }

    fn info(&self) -> Result<VmInfo, ControlError> {
        self.note("info")?;
        let config = self.config.clone().unwrap();
        let memory_actual_size = config.memory_size();
        Ok(VmInfo { config, state: self.state, memory_actual_size, device_tree: None })
    }

    fn counters(&self) -> Result<Counters, ControlError> {
        self.note("counters")?;
        Ok(BTreeMap::new())
    }

    fn snapshot(&mut self, config: &SnapshotConfig) -> Result<(), ControlError> {
        self.note(format!("snapshot {}", config.destination_url))
    }

    fn restore(&mut self, config: &RestoreConfig) -> Result<(), ControlError> {
        self.note(format!("restore {}", config.source_url))
    }

    fn ft_receive(&mut self, config: &FtReceiveConfig) -> Result<(), ControlError> {
        self.note(format!("ft_receive {}", config.listen_url))
    }

    fn ft_enable(&mut self, config: &FtEnableConfig) -> Result<(), ControlError> {
        let standbys: Vec<_> = config.candidates().map(ToString::to_string).collect();
        self.note(format!("ft_enable {}", standbys.join(" ")))
    }

    fn ft_status(&self) -> Result<FtStatus, ControlError> {
        self.note("ft_status")?;
        Ok(FtStatus::default())
    }

    fn ft_failover(&mut self) -> Result<(), ControlError> {
        self.note("ft_failover")
    }

    fn ft_disable(&mut self) -> Result<(), ControlError> {
        self.note("ft_disable")
    }

    fn ended(&self) -> Option<VmEnd> {
        self.shared.lock().unwrap().end.take()
    }
}

/// A server on a socket of its own.
pub struct Fixture {
    shared: Arc<Mutex<Shared>>,
    inbox: Inbox,
    directory: TempDir,
    control: RefCell<Option<JoinHandle<Result<(), LoopError>>>>,
    server: Option<Server>,
}

impl Fixture {
    /// With a VM in this state.
    pub fn in_state(state: State) -> Self {
        Self::new(state, false)
    }

    /// As with `--no-shutdown`.
    pub fn staying(state: State) -> Self {
        Self::new(state, true)
    }

    fn new(state: State, stay: bool) -> Self {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (config, state) = match state {
            State::None => (None, VmState::Created),
            State::Created => (Some(VmConfig::default()), VmState::Created),
            State::Running => (Some(VmConfig::default()), VmState::Running),
            State::Paused => (Some(VmConfig::default()), VmState::Paused),
        };
        let mut vm = FakeVm { shared: Arc::clone(&shared), config, state };
        let (event_loop, inbox) = EventLoop::new(stay);
        let control = std::thread::spawn(move || event_loop.run(&mut vm, &EventMonitor::default()));
        let directory = tempfile::tempdir().unwrap();
        let socket = ApiSocket::bind(&directory.path().join("api.sock")).unwrap();
        let server = Some(Server::start(socket, inbox.clone()).unwrap());
        Self { shared, inbox, directory, control: RefCell::new(Some(control)), server }
    }

    fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("api.sock")
    }

    pub fn client(&self) -> Client {
        Client::new(self.path())
    }

    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.path()).unwrap()
    }

    /// Sends one request on a connection of its own and returns the answer as it came.
    pub fn exchange(&self, request: &str) -> String {
        use std::io::Write;
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Reads exactly these bytes.
    pub fn expect(&self, stream: &mut UnixStream, expected: &str) {
        let mut found = vec![0; expected.len()];
        stream.read_exact(&mut found).unwrap();
        assert_eq!(String::from_utf8_lossy(&found), expected);
    }

    /// What reached the VM so far.
    pub fn calls(&self) -> Vec<String> {
        self.shared.lock().unwrap().calls.clone()
    }

    /// Makes the next call fail.
    pub fn refuse_next(&self, status: u16, chain: &[&str]) {
        let chain = chain.iter().map(|text| (*text).to_owned()).collect();
        self.shared.lock().unwrap().refusal = Some(ControlError { status, chain });
    }

    pub fn doorbell(&self) -> Doorbell {
        self.inbox.doorbell()
    }

    /// Has the guest end by itself.
    pub fn end_guest(&self, end: VmEnd) {
        self.shared.lock().unwrap().end = Some(end);
        self.doorbell().ring();
    }

    /// How the control thread ended.
    pub fn wait_for_exit(&self) -> Result<(), LoopError> {
        self.control.borrow_mut().take().unwrap().join().unwrap()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.inbox.terminate();
        drop(self.server.take());
        if let Some(control) = self.control.borrow_mut().take() {
            let ended = control.join();
            if !std::thread::panicking() {
                ended.unwrap().unwrap();
            }
        }
    }
}
