//! Keeps a VM protected for as long as somebody wants it to be: has its first backup made, and the next one
//! whenever that is lost.
//!
//! [`ft::Search`] decides which standby is asked next and when. Here is the thread that sleeps until one is
//! due and connects to it; from then on the ft thread of that attempt tells through [`Observer`] what became
//! of it.
//!
//! What must hold: whatever belongs to an earlier wish than the present one changes nothing; so a wish that
//! is withdrawn is over at once, whatever is under way. The lock of [`Plan`] is taken before that of the
//! VMM's state, and neither is held while waiting for another thread.

use std::net::{TcpStream, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ft::primary::Input;
use ft::status::Failover;
use ft::{
    Capabilities, DiskMode, DiskReads, ExecutionPoint, FtStatus, Generation, PairId, PrimaryConfig,
    Search, Terms, Timing, Unequal,
};
use rt_channel::Sender;

use crate::api::{ChosenSecurity, ControlError, FtEnableConfig, TcpUrl};
use crate::config::VmConfig;
use crate::machine::facts;
use crate::pair::clone::CloneHeader;
use crate::pair::marker;
use crate::pair::primary::{PrimaryObserver, PrimaryParts, PrimaryThread};
use crate::pair::wire::Wire;
use crate::pair::{MACHINE_MODEL, arbiter, boot_time, host_identity};
use crate::run_loop::outgoing::Outlet;
use crate::shared::{Shared, chain};
use crate::vmm::random_hex;

/// How long a standby may take to accept a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the end of protection is waited for before the VM is taken down.
const DISABLE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the ft thread of a lost backup may take to end.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(10);

/// How somebody wants a VM protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Who may be asked, first choice first; as both hosts reach them.
    standbys: Vec<String>,
    /// Which of them is this side itself, if it was reached as one.
    own: Option<String>,
    arbiter_url: String,
    timing: Timing,
    log_buffer_bytes: u64,
    disk_mode: DiskMode,
    /// A standby may be on the host that has the VM.
    same_host: bool,
    disk_reads: DiskReads,
    /// How a standby is known. Files are read again for each, since this may last for years.
    security: ChosenSecurity,
}

impl Request {
    /// What an operator asks for.
    #[must_use]
    pub fn of(config: &FtEnableConfig, security: ChosenSecurity) -> Self {
        let mut standbys = Vec::new();
        for url in config.candidates().map(TcpUrl::to_string) {
            if !standbys.contains(&url) {
                standbys.push(url);
            }
        }
        Self {
            standbys,
            own: None,
            arbiter_url: config.arbiter_url.to_string(),
            timing: config.timing(),
            log_buffer_bytes: config.log_buffer_bytes,
            disk_mode: config.disk_mode,
            same_host: config.same_host,
            disk_reads: config.disk_reads,
            security,
        }
    }

    /// What the side that held the backup of `terms` takes over from its primary, and of its own `security`.
    #[must_use]
    pub fn inherited(terms: &Terms, security: ChosenSecurity) -> Self {
        Self {
            standbys: terms.standbys.clone(),
            own: Some(terms.standby.clone()),
            arbiter_url: terms.arbiter_url.clone(),
            timing: terms.timing,
            log_buffer_bytes: terms.log_buffer_bytes,
            disk_mode: terms.disk_mode,
            same_host: terms.same_host,
            disk_reads: terms.disk_reads,
            security,
        }
    }

    fn search(&self) -> Search {
        let standbys = self.standbys.iter().map(String::as_str);
        let patience = self.timing.disk_patience(self.disk_mode, self.disk_reads);
        Search::new(boot_time(), standbys, self.own.as_deref()).with_patience(patience)
    }

    fn terms(&self, pair: PairId, generation: Generation, standby: &str) -> Terms {
        Terms {
            pair,
            generation,
            timing: self.timing,
            log_buffer_bytes: self.log_buffer_bytes,
            arbiter_url: self.arbiter_url.clone(),
            disk_mode: self.disk_mode,
            same_host: self.same_host,
            disk_reads: self.disk_reads,
            standbys: self.standbys.clone(),
            standby: standby.to_owned(),
        }
    }
}

/// The protection of a process's VM. Clones are of the same.
#[derive(Clone)]
pub struct Protection(Arc<Inner>);

struct Inner {
    /// Names this process among all that ever claim.
    who: String,
    shared: Shared,
    plan: Mutex<Plan>,
    /// There may be something to do for the thread.
    changed: Condvar,
}

#[derive(Default)]
struct Plan {
    wish: Option<Wish>,
    /// Of the present wish, or of the last one withdrawn.
    number: u64,
    /// The latest attempt that got as far as a connection.
    primary: Option<Arc<PrimaryThread>>,
    /// So many want the wish withdrawn, and it is not decided yet whether that can be: nobody is asked meanwhile.
    ending: usize,
    /// The thread runs.
    running: bool,
    closed: bool,
}

/// That the VM be protected.
struct Wish {
    request: Request,
    search: Search,
    first: Option<FirstRound>,
}

/// Whoever asked for protection waits until a standby takes the VM, or all have refused.
struct FirstRound {
    answer: Sender<Result<(), ControlError>>,
    refusals: Vec<String>,
}

impl FirstRound {
    fn refused(mut self) {
        let mut chain = vec!["The VM is not protected: no standby took it".to_owned()];
        chain.append(&mut self.refusals);
        let _ = self.answer.send(Err(ControlError { status: 500, chain }));
    }
}

/// One attempt, as the thread takes it up.
struct Attempt {
    number: u64,
    standby: String,
    request: Request,
    /// Of the attempt before.
    old: Option<Arc<PrimaryThread>>,
}

impl Plan {
    /// Begins a wish; what belongs to others changes nothing any more.
    fn begin(&mut self, request: Request, first: Option<FirstRound>) {
        self.withdraw();
        let search = request.search();
        self.wish = Some(Wish { request, search, first });
    }

    /// True if there was a wish.
    fn withdraw(&mut self) -> bool {
        self.number += 1;
        self.wish.take().is_some()
    }

    /// When a standby is to be asked.
    fn due(&self) -> Option<Duration> {
        self.wish.as_ref().filter(|_| self.ending == 0)?.search.due()
    }

    fn attempt(&mut self, now: Duration) -> Option<Attempt> {
        if self.ending > 0 {
            return None;
        }
        let wish = self.wish.as_mut()?;
        let standby = wish.search.next(now)?;
        let (request, old) = (wish.request.clone(), self.primary.clone());
        Some(Attempt { number: self.number, standby, request, old })
    }

    fn wish(&mut self, number: u64) -> Option<&mut Wish> {
        self.wish.as_mut().filter(|_| self.number == number)
    }

    fn accepted(&mut self, number: u64) {
        let Some(wish) = self.wish(number) else { return };
        wish.search.accepted();
        if let Some(first) = wish.first.take() {
            let _ = first.answer.send(Ok(()));
        }
    }

    fn lost(&mut self, number: u64, reason: &str) {
        let Some(wish) = self.wish(number) else { return };
        let standby = wish.search.standby().unwrap_or_default().to_owned();
        wish.search.lost(boot_time(), reason);
        let over = wish.search.rounds() > 0;
        if let Some(first) = &mut wish.first {
            first.refusals.push(format!("{standby}: {reason}"));
        }
        if over && let Some(first) = wish.first.take() {
            self.withdraw();
            first.refused();
        }
    }
}

impl Protection {
    /// Of nothing yet. `who` names this process among all that ever claim.
    #[must_use]
    pub fn new(who: String, shared: Shared) -> Self {
        let (plan, changed) = (Mutex::default(), Condvar::new());
        Self(Arc::new(Inner { who, shared, plan, changed }))
    }

    /// Has the VM protected. Returns when a standby takes it, and its copy is being made; an error if all
    /// have refused. A search under way is replaced.
    pub fn enable(&self, request: Request) -> Result<(), ControlError> {
        if request.disk_mode == DiskMode::Mirrored {
            self.0.check_images().map_err(|reason| ControlError::new(500, reason))?;
        }
        self.0.announce(&request).map_err(|reason| {
            let what = "The arbiter cannot be used; both hosts must reach it".to_owned();
            ControlError { status: 500, chain: vec![what, reason] }
        })?;
        let (answer, answered) = rt_channel::bounded(1);
        let mut plan = self.0.lock();
        if plan.primary.as_ref().is_some_and(|primary| !primary.ended()) {
            let text = "the VM is protected already, or about to be";
            return Err(ControlError::new(500, text));
        }
        plan.begin(request, Some(FirstRound { answer, refusals: Vec::new() }));
        self.start(plan)
            .map_err(|error| ControlError::from_error(500, "The VM cannot be protected", &error))?;
        let gone = || ControlError::new(500, "protection was given up before it began");
        answered.recv().unwrap_or_else(|_| Err(gone()))
    }

    /// The VM has gone live here, where it had its backup under `terms`: looks for the next one.
    pub fn inherit(&self, terms: &Terms, security: ChosenSecurity) {
        let request = Request::inherited(terms, security);
        let mut plan = self.0.lock();
        plan.begin(request, None);
        if plan.wish.as_ref().is_some_and(|wish| wish.search.is_hopeless()) {
            log::warn!(
                "the VM stays unprotected: ft.enable named no standby but this one; name others"
            );
        }
        if let Err(error) = self.start(plan) {
            log::error!("no backup can be looked for: {error}");
        }
    }

    /// Wakes the thread, which is there from the first wish on.
    fn start(&self, mut plan: MutexGuard<'_, Plan>) -> std::io::Result<()> {
        if !plan.running {
            let inner = Arc::clone(&self.0);
            let thread = std::thread::Builder::new().name("ft-search".into());
            if let Err(error) = thread.spawn(move || inner.run()) {
                plan.withdraw();
                return Err(error);
            }
            plan.running = true;
        }
        drop(plan);
        self.0.changed.notify_all();
        Ok(())
    }

    /// Nobody wants the VM protected any more, or it is at its end. An error if it is not, or if protection
    /// cannot be ended now: then the wish stands.
    pub fn end(&self, reason: &str) -> Result<(), String> {
        let mut plan = self.0.lock();
        let primary = plan.primary.clone().filter(|primary| !primary.ended());
        let Some(primary) = primary else {
            return plan.withdraw().then_some(()).ok_or("the VM is not protected".into());
        };
        plan.ending += 1;
        drop(plan);
        let disabling = primary.command(Input::Disable { reason: reason.to_owned() });
        let mut plan = self.0.lock();
        plan.ending -= 1;
        match disabling {
            // What it ended by itself in just this moment is ended, too.
            Err(_) if primary.ended() && plan.withdraw() => return Ok(()),
            Err(refusal) => {
                self.0.changed.notify_all();
                return Err(refusal);
            }
            Ok(()) => plan.withdraw(),
        };
        drop(plan);
        if !primary.wait(DISABLE_TIMEOUT) {
            let state = primary.status().state;
            log::warn!("the end of protection is not confirmed: {state}");
        }
        Ok(())
    }

    /// There is no VM any more.
    pub fn forget(&self) {
        let mut plan = self.0.lock();
        plan.withdraw();
        if let Some(primary) = plan.primary.take() {
            self.0.keep(&primary);
        }
    }

    /// Ends the thread, when it wakes.
    pub fn close(&self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
    }

    /// Gives the VM to its backup.
    pub fn hand_over(&self) -> Result<(), String> {
        let primary = self.0.lock().primary.clone();
        primary.ok_or("this VM is not protected")?.command(Input::HandOver)
    }

    /// What the operator is shown; `None` if this side was never a primary and looks for no backup.
    #[must_use]
    pub fn status(&self) -> Option<FtStatus> {
        let plan = self.0.lock();
        let reprotection = plan.wish.as_ref().map(|wish| wish.search.status(boot_time()));
        let primary = plan.primary.clone();
        drop(plan);
        let mut status = match primary {
            Some(primary) => self.0.account(&primary),
            None if reprotection.is_some() => self.0.shared.lock().last.clone(),
            None => return None,
        };
        status.reprotection = reprotection;
        Some(status)
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The status of `primary`, with what remains to be told of the protection before it.
    fn account(&self, primary: &PrimaryThread) -> FtStatus {
        let last = self.shared.lock().last.clone();
        let mut status = primary.status();
        if status.state == "abandoned" && last.role == "alone" {
            // The VM runs on as it did before.
            return last;
        }
        status.digests_unequal += last.digests_unequal;
        status.last_unequal = status.last_unequal.or(last.last_unequal);
        status.last_failover = status.last_failover.or(last.last_failover);
        status
    }

    /// Remembers what is to be told of an attempt that is over.
    fn keep(&self, primary: &PrimaryThread) {
        let status = self.account(primary);
        self.shared.lock().last = status;
    }

    /// The thread: sleeps until a standby is due, and connects to it.
    fn run(self: Arc<Self>) {
        let mut plan = self.lock();
        while !plan.closed {
            let now = boot_time();
            if let Some(attempt) = plan.attempt(now) {
                drop(plan);
                if let Err(reason) = self.try_standby(&attempt) {
                    log::info!("no backup at {}: {reason}", attempt.standby);
                    self.lock().lost(attempt.number, &reason);
                }
                plan = self.lock();
                continue;
            }
            plan = match plan.due() {
                Some(due) => {
                    let waited = self.changed.wait_timeout(plan, due.saturating_sub(now));
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(plan).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Connects to a standby and starts the ft thread.
    fn try_standby(self: &Arc<Self>, attempt: &Attempt) -> Result<(), String> {
        if let Some(old) = &attempt.old
            && !old.wait(LAST_WORDS_TIMEOUT)
        {
            return Err("the connection to the backup before is still open".into());
        }
        let request = &attempt.request;
        let arbiter = self
            .announce(request)
            .map_err(|reason| format!("the arbiter cannot be used: {reason}"))?;
        let wire = connect(&attempt.standby, &request.security)?;
        let mut plan = self.lock();
        if plan.number != attempt.number {
            return Ok(());
        }
        if plan.ending > 0 {
            return Err("protection is about to be ended".into());
        }
        let (pair, generation) = self.membership()?;
        let terms = request.terms(pair, generation, &attempt.standby);
        let parts = self.parts(terms, wire, arbiter, attempt)?;
        if let Some(old) = plan.primary.take() {
            self.keep(&old);
        }
        plan.primary = Some(Arc::new(PrimaryThread::start(parts)?));
        Ok(())
    }

    /// Whether the VM's images can be a mirrored pair's. Those of a side that was a backup were looked at there.
    fn check_images(&self) -> Result<(), String> {
        let state = self.shared.lock();
        state.vm.as_ref().map_or(Ok(()), |vm| marker::check_kinds(vm.config()))
    }

    /// Tells the arbiter that this side looks for a backup.
    fn announce(&self, request: &Request) -> Result<Arc<dyn ft::Arbiter>, String> {
        let url = request.arbiter_url.parse().map_err(|error| chain(&error))?;
        let (pair, generation) = self.membership()?;
        arbiter::announce(&url, &pair, generation, &self.who)
    }

    /// The pair's identity, made when a VM is first protected.
    fn membership(&self) -> Result<(PairId, Generation), String> {
        let mut state = self.shared.lock();
        if let Some(membership) = &state.membership {
            return Ok(membership.clone());
        }
        let pair = PairId::new(format!("vm-{}", random_hex())).map_err(|error| chain(&error))?;
        let membership = (pair, Generation(1));
        state.membership = Some(membership.clone());
        Ok(membership)
    }

    fn parts(
        self: &Arc<Self>,
        terms: Terms,
        wire: Wire,
        arbiter: Arc<dyn ft::Arbiter>,
        attempt: &Attempt,
    ) -> Result<PrimaryParts, String> {
        let state = self.shared.lock();
        if state.halted {
            return Err("the VM has been halted here".into());
        }
        let vm = state.vm.as_ref().ok_or("the VM is not running")?;
        let config = serde_json::to_string(vm.travelling()).map_err(|error| chain(&error))?;
        let devices = facts::facts(vm.config(), vm.host()).map_err(|error| chain(&error))?;
        let header = CloneHeader { config, host: vm.host().clone(), devices };
        let capabilities = Capabilities {
            host: host_identity(),
            cpu_model: MACHINE_MODEL.into(),
            memory_bytes: vm.config().memory.size,
            devices: device_kinds(vm.config()),
            disk_modes: vec![terms.disk_mode],
        };
        let disks = match terms.disk_mode {
            DiskMode::Mirrored => vm.back_halves().images(vm.config()),
            DiskMode::Shared => Vec::new(),
        };
        let observer = Observer {
            inner: Arc::clone(self),
            number: attempt.number,
            standby: attempt.standby.clone(),
            pair: terms.pair.clone(),
        };
        Ok(PrimaryParts {
            config: PrimaryConfig {
                terms,
                who: self.who.clone(),
                capabilities,
                vm_config: crate::guest::encode(&header),
            },
            wire,
            arbiter,
            inbox: vm.inbox().clone(),
            memory: vm.memory().clone(),
            payload: Arc::clone(vm.payload()),
            outlet: Arc::clone(vm.back_halves()) as Arc<dyn Outlet>,
            disks,
            local: vm.config().clone(),
            observer: Box::new(observer),
        })
    }
}

/// Hears from the ft thread of one attempt.
struct Observer {
    inner: Arc<Inner>,
    /// Of the wish.
    number: u64,
    standby: String,
    pair: PairId,
}

impl Observer {
    fn lost(&self, reason: &str) {
        self.inner.lock().lost(self.number, reason);
        self.inner.changed.notify_all();
    }
}

impl PrimaryObserver for Observer {
    fn changed(&self, state: &'static str, reason: Option<&str>) {
        self.inner.shared.protection_changed("primary", state, reason);
    }

    fn accepted(&self) {
        self.inner.lock().accepted(self.number);
    }

    fn protected(&self) {
        log::info!("the VM is protected by {}", self.standby);
        if let Some(wish) = self.inner.lock().wish(self.number) {
            wish.search.protected(boot_time());
        }
    }

    fn abandoned(&self, reason: &str) {
        log::warn!("the VM is not protected by {}: {reason}", self.standby);
        self.lost(reason);
    }

    fn alone(&self, generation: Generation, failover: &Failover) {
        log::warn!("the VM runs on without a backup: {}", failover.cause);
        self.inner.shared.lock().membership = Some((self.pair.clone(), generation));
        self.lost(&failover.cause);
    }

    fn halted(&self, reason: &str) {
        log::warn!("the VM has been halted here: {reason}");
        self.inner.lock().withdraw();
        let mut state = self.inner.shared.lock();
        state.halted = true;
        if let Some(vm) = &state.vm {
            vm.back_halves().halt_disks();
        }
        drop(state);
        self.inner.shared.ring();
    }

    fn diverged(&self, point: ExecutionPoint, unequal: &Unequal) {
        log::error!("the backup's {unequal} differs at point {}", point.0);
        if let Some(wish) = self.inner.lock().wish(self.number) {
            wish.search.differed();
        }
    }
}

fn connect(standby: &str, security: &ChosenSecurity) -> Result<Wire, String> {
    let security = security
        .load(&[])
        .map_err(|error| format!("the certificates cannot be used: {}", chain(&error)))?;
    let url: TcpUrl = standby.parse().map_err(|error| chain(&error))?;
    let fail = |error: std::io::Error| {
        format!("no backup answers there: is dyad running, and did it get ft.receive? ({error})")
    };
    let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
    for address in (url.host.as_str(), url.port).to_socket_addrs().map_err(fail)? {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(stream) => return Wire::connecting(stream, &security, &url.host).map_err(fail),
            Err(error) => last = error,
        }
    }
    Err(fail(last))
}

/// The kinds of device that a configuration uses, as [`pair::capabilities`] names them.
fn device_kinds(config: &VmConfig) -> Vec<String> {
    let mut devices = vec!["virtio-rng"];
    if !config.disks().is_empty() {
        devices.push("virtio-blk");
    }
    if !config.net().is_empty() {
        devices.push("virtio-net");
    }
    if config.console.mode != crate::config::ConsoleMode::Off {
        devices.push("virtio-console");
    }
    if config.serial.mode != crate::config::ConsoleMode::Off {
        devices.push("serial");
    }
    devices.into_iter().map(String::from).collect()
}
