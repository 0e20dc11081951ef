//! The two programs as processes: what they print, how they end, what they leave behind.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A `dyad` without a VM.
struct Dyad {
    child: Child,
    directory: TempDir,
}

impl Dyad {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_dyad"))
            .args(["-vv", "--hypervisor", "soft", "--event-monitor"])
            .arg(format!("path={}", directory.path().join("events").display()))
            .arg("--api-socket")
            .arg(directory.path().join("api.sock"))
            .stderr(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        // It says so once it listens: nothing else is to be waited for.
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("the API is served") {
            line.clear();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "dyad ended early");
        }
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self { child, directory }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("api.sock")
    }

    fn remote(&self, arguments: &[&str]) -> Output {
        remote(&self.socket(), arguments)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Exit code, once it has ended.
    fn code(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Dyad {
    fn drop(&mut self) {
        // It may have ended; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn remote(socket: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dyad-remote"))
        .arg("--api-socket")
        .arg(socket)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn dyad(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dyad")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn error(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_vm_is_configured_shown_and_deleted() {
    let dyad = Dyad::start();
    let ping = dyad.remote(&["ping"]);
    assert_eq!(ping.status.code(), Some(0));
    assert!(ping.stdout.ends_with(b"}\n") && ping.stderr.is_empty());

    let config = dyad.directory.path().join("vm.json");
    std::fs::write(&config, json!({"memory": {"size": 1 << 26}, "unknown": 1}).to_string())
        .unwrap();
    let create = dyad.remote(&["create", config.to_str().unwrap()]);
    assert_eq!((create.status.code(), create.stdout.as_slice()), (Some(0), &b""[..]));
    let info: Value = serde_json::from_slice(&dyad.remote(&["info"]).stdout).unwrap();
    assert_eq!(info["state"], "Created");
    assert_eq!(info["config"]["memory"]["size"], 1 << 26);

    let boot = dyad.remote(&["boot"]);
    assert_eq!(boot.status.code(), Some(1));
    let text = error(&boot);
    assert!(text.starts_with("Error: dyad-remote"), "{text}");
    assert!(text.contains("  1: 400 Bad Request\n") && text.contains("'kernel'"), "{text}");

    assert_eq!(dyad.remote(&["delete"]).status.code(), Some(0));
    let empty = dyad.remote(&["create"]);
    assert_eq!(empty.status.code(), Some(1));
    assert!(error(&empty).contains("'-' is empty: a VM's configuration"), "{}", error(&empty));
    let info = dyad.remote(&["info"]);
    assert!(info.stdout.is_empty());
    assert!(error(&info).contains("  1: 404 Not Found\n"));
}

#[test]
fn a_boot_that_fails_leaves_a_vm_that_can_be_changed() {
    let dyad = Dyad::start();
    let directory = dyad.directory.path();
    let no_kernel = directory.join("no-kernel");
    std::fs::write(&no_kernel, "this is no kernel").unwrap();
    let odd_disk = directory.join("odd.img");
    std::fs::write(&odd_disk, [0; 1000]).unwrap();
    let kernel = json!({"kernel": no_kernel});
    let quiet = json!({"mode": "Off"});
    for (config, word) in [
        (json!({"payload": {"kernel": "/missing/vmlinuz"}, "console": quiet}), "/missing/vmlinuz"),
        (json!({"payload": kernel, "console": quiet}), "no-kernel"),
        (json!({"payload": kernel, "console": quiet, "disks": [{"path": odd_disk}]}), "odd.img"),
        (
            json!({"payload": kernel, "console": quiet, "disks": [{"path": "/missing/d"}]}),
            "missing",
        ),
        (json!({"payload": kernel, "cpus": {"boot_vcpus": 2, "max_vcpus": 2}}), "one virtual CPU"),
        (json!({"payload": kernel, "pvpanic": true}), "pvpanic"),
    ] {
        let path = directory.join("vm.json");
        std::fs::write(&path, config.to_string()).unwrap();
        assert_eq!(dyad.remote(&["create", path.to_str().unwrap()]).status.code(), Some(0));
        let boot = dyad.remote(&["boot"]);
        assert_eq!(boot.status.code(), Some(1));
        assert!(error(&boot).contains(word), "{config}: {}", error(&boot));
        let info: Value = serde_json::from_slice(&dyad.remote(&["info"]).stdout).unwrap();
        assert_eq!(info["state"], "Created");
        assert_eq!(dyad.remote(&["delete"]).status.code(), Some(0));
    }
}

#[test]
fn shutdown_vmm_prints_an_empty_line_and_ends_the_process() {
    let mut dyad = Dyad::start();
    let output = dyad.remote(&["shutdown-vmm"]);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b"\n"[..]));
    assert_eq!(dyad.code(), Some(0));
    assert!(!dyad.socket().exists());
}

#[test]
fn the_event_monitor_tells_what_happens_in_order() {
    let mut dyad = Dyad::start();
    let config = dyad.directory.path().join("vm.json");
    std::fs::write(&config, "{}").unwrap();
    dyad.remote(&["create", config.to_str().unwrap()]);
    assert_eq!(dyad.remote(&["boot"]).status.code(), Some(1), "there is no kernel");
    dyad.remote(&["delete"]);
    dyad.signal(Signal::SIGTERM);
    assert_eq!(dyad.code(), Some(0));
    let text = std::fs::read_to_string(dyad.directory.path().join("events")).unwrap();
    let events: Vec<Value> =
        text.split_terminator("\n\n").map(|object| serde_json::from_str(object).unwrap()).collect();
    let names: Vec<String> = events
        .iter()
        .map(|event| format!("{}/{}", event["source"], event["event"]).replace('"', ""))
        .collect();
    assert_eq!(names, ["vmm/starting", "vm/booting", "vm/deleted", "vmm/shutdown"]);
    let seconds = |event: &Value| event["timestamp"]["secs"].as_f64().unwrap();
    assert!(events.is_sorted_by_key(seconds), "{text}");
    assert!(events.iter().all(|event| event["properties"].is_null()), "{text}");
}

/// Runs `dyad` in a shell, which opens descriptors for it.
fn dyad_with(descriptors: &str, arguments: &[&str]) -> Output {
    Command::new("sh")
        .arg("-c")
        .arg(format!("exec \"$@\" {descriptors}"))
        .args(["sh", env!("CARGO_BIN_EXE_dyad")])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn only_descriptors_that_were_given_are_written_to() {
    let directory = tempfile::tempdir().unwrap();
    let events = directory.path().join("events");
    let restore = ["--hypervisor", "soft", "--restore", "source_url=file:///missing"];
    let run = |descriptors: &str| {
        dyad_with(descriptors, &[&restore[..], &["--event-monitor", "fd=7"]].concat())
    };
    for (descriptors, words) in [
        ("7>&-", "no such descriptor was open when dyad started"),
        ("7</dev/null", "not open for writing"),
    ] {
        let output = run(descriptors);
        assert_eq!(output.status.code(), Some(1));
        assert!(error(&output).contains("fd=7"), "{descriptors}: {}", error(&output));
        assert!(error(&output).contains(words), "{descriptors}: {}", error(&output));
    }
    let output = run(&format!("7>{}", events.display()));
    assert!(error(&output).contains("/missing"), "{}", error(&output));
    assert!(std::fs::read_to_string(&events).unwrap().contains("\"starting\""));
}

#[test]
fn watching_into_a_pipe_writes_lines_and_tells_when_the_vmm_is_gone() {
    let mut dyad = Dyad::start();
    let two = dyad.remote(&["ft-watch", "--interval-ms", "20", "--count", "2"]);
    assert_eq!(two.status.code(), Some(0));
    let text = String::from_utf8(two.stdout).unwrap();
    assert_eq!(text.lines().count(), 2);
    assert!(text.lines().all(|line| line.starts_with("none unprotected generation=0 ")), "{text}");

    let mut watching = Command::new(env!("CARGO_BIN_EXE_dyad-remote"))
        .arg("--api-socket")
        .arg(dyad.socket())
        .args(["ft-watch", "--interval-ms", "20"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("none "));
    dyad.signal(Signal::SIGKILL);
    dyad.code();
    assert!(lines.any(|line| line.unwrap().starts_with("no answer: ")));
    watching.kill().unwrap();
    watching.wait().unwrap();

    let nobody = dyad.remote(&["ft-watch"]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(error(&nobody).contains("api.sock"), "{}", error(&nobody));
}

#[test]
fn a_vmm_that_says_nothing_is_not_waited_for_in_silence() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let _mute = UnixListener::bind(&socket).unwrap();
    let ping = remote(&socket, &["--timeout", "1", "ping"]);
    assert_eq!(ping.status.code(), Some(1));
    assert!(error(&ping).contains("has not answered for 1.0 s"), "{}", error(&ping));
    let watch = remote(&socket, &["ft-watch", "--count", "1"]);
    assert_eq!(watch.status.code(), Some(0));
    assert!(watch.stdout.starts_with(b"no answer: "), "{watch:?}");

    let mut snapshot = Command::new(env!("CARGO_BIN_EXE_dyad-remote"))
        .arg("--api-socket")
        .arg(&socket)
        .args(["snapshot", "file:///tmp"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(snapshot.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("dyad-remote: no answer to vm.snapshot yet"), "{line}");
    assert!(snapshot.try_wait().unwrap().is_none(), "what may take long is waited for");
    snapshot.kill().unwrap();
    snapshot.wait().unwrap();
}

#[test]
fn signals_end_the_process_in_order() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut dyad = Dyad::start();
        dyad.signal(signal);
        assert_eq!(dyad.code(), Some(0));
        assert!(!dyad.socket().exists());
    }
}

#[test]
fn a_live_socket_is_respected_and_a_stale_one_replaced() {
    let mut first = Dyad::start();
    let socket = first.socket();
    let second = dyad(&["--api-socket", socket.to_str().unwrap()]);
    assert_eq!(second.status.code(), Some(1));
    assert!(error(&second).contains("another process"), "{}", error(&second));
    assert_eq!(first.remote(&["ping"]).status.code(), Some(0));
    first.signal(Signal::SIGKILL);
    first.code();
    assert!(socket.exists(), "a killed process leaves its socket");
    let mut third = Command::new(env!("CARGO_BIN_EXE_dyad"))
        .args(["--hypervisor", "soft", "--api-socket"])
        .arg(&socket)
        .spawn()
        .unwrap();
    while remote(&socket, &["ping"]).status.code() != Some(0) {
        assert!(third.try_wait().unwrap().is_none(), "dyad ended early");
    }
    assert_eq!(remote(&socket, &["shutdown-vmm"]).status.code(), Some(0));
    assert!(third.wait().unwrap().success());
}

#[test]
fn garbage_on_the_socket_does_no_harm() {
    let dyad = Dyad::start();
    for garbage in [&b"\0\xff\xfe"[..], b"HELO example.org\r\n\r\n", &[b'A'; 100_000]] {
        let mut stream = UnixStream::connect(dyad.socket()).unwrap();
        // The server may have had enough before the end.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400 "));
    }
    assert_eq!(dyad.remote(&["ping"]).status.code(), Some(0));
}

#[test]
fn exit_codes_tell_usage_from_failure() {
    for (arguments, code, word) in [
        (&[][..], 2, "Usage"),
        (&["--memory", "size=1G"], 2, "--kernel"),
        (&["--nonsense"], 2, "--nonsense"),
        (&["--kernel", "/missing/vmlinuz", "--console", "off"], 1, "/missing/vmlinuz"),
        (&["--kernel", "/k", "--memory", "size=lots"], 1, "suffix"),
        (&["--kernel", "/k", "--disk", "path=/d,colour=red"], 1, "'colour'"),
        (&["--restore", "source_url=file:///missing"], 1, "/missing"),
        (&["--restore", "source_url=file:///s,memory_restore_mode=ondemand"], 1, "OnDemand"),
        (&["--api-socket", "/missing/api.sock"], 1, "/missing/api.sock"),
    ] {
        let output = dyad(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", error(&output));
        assert!(error(&output).contains(word), "{arguments:?}: {}", error(&output));
    }
    let missing = Path::new("/missing/api.sock");
    assert_eq!(remote(missing, &["ping"]).status.code(), Some(1));
    assert_eq!(remote(missing, &["no-such-call"]).status.code(), Some(2));
    let enable = remote(missing, &["ft-enable", "backup_url=tcp:h:1"]);
    assert_eq!(enable.status.code(), Some(1));
    assert!(error(&enable).contains("arbiter_url"), "{}", error(&enable));
}

fn make_test_ca(directory: &Path, hosts: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dyad-remote"))
        .arg("make-test-ca")
        .arg(directory)
        .args(hosts)
        .output()
        .unwrap()
}

#[test]
fn a_test_authority_is_made_and_extended_and_never_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let ca = directory.path().join("ca");
    let made = make_test_ca(&ca, &["a", "10.0.0.2"]);
    assert_eq!(made.status.code(), Some(0), "{}", error(&made));
    let read = |name: &str| std::fs::read(ca.join(name)).unwrap();
    let before = [read("ca.pem"), read("ca.key"), read("a/host.pem"), read("a/host.key")];
    for key in ["ca.key", "a/host.key", "10.0.0.2/host.key"] {
        let mode = std::fs::metadata(ca.join(key)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
    let extended = make_test_ca(&ca, &["c,10.0.0.3"]);
    assert_eq!(extended.status.code(), Some(0), "{}", error(&extended));
    assert_eq!(read("c/ca.pem"), before[0]);

    for (hosts, word) in [(&["d", "a"][..], "a' exists already"), (&["e", "e"], "e' exists")] {
        let again = make_test_ca(&ca, hosts);
        assert_eq!(again.status.code(), Some(1));
        assert!(error(&again).contains(word), "{}", error(&again));
        assert!(!ca.join(hosts[0]).exists(), "part of what was refused was done");
    }
    assert_eq!(before, [read("ca.pem"), read("ca.key"), read("a/host.pem"), read("a/host.key")]);
    for name in ["../x", "", "a b", ".", "ca.pem"] {
        assert_eq!(make_test_ca(&ca, &[name]).status.code(), Some(1), "{name}");
    }
    assert_eq!(make_test_ca(&ca, &[]).status.code(), Some(2));
    std::fs::remove_file(ca.join("ca.key")).unwrap();
    let orphan = make_test_ca(&ca, &["f"]);
    assert!(error(&orphan).contains("ca.key"), "{}", error(&orphan));

    // Without a socket no call can be made.
    let ping = Command::new(env!("CARGO_BIN_EXE_dyad-remote")).arg("ping").output().unwrap();
    assert_eq!(ping.status.code(), Some(2));
    assert!(error(&ping).contains("--api-socket"), "{}", error(&ping));
}

#[test]
fn waiting_for_a_primary_needs_certificates_or_the_will_to_do_without() {
    let dyad = Dyad::start();
    let ca = dyad.directory.path().join("ca");
    assert_eq!(make_test_ca(&ca, &["a"]).status.code(), Some(0));
    let receive = |more: &str| {
        let options = format!("listen_url=tcp:127.0.0.1:0{more}");
        let output = dyad.remote(&["ft-receive", &options]);
        (output.status.code() == Some(0), error(&output))
    };
    let refused = |more: &str, words: &[&str]| {
        let (done, text) = receive(more);
        assert!(!done, "{more}");
        for word in words {
            assert!(text.contains(word), "{more}: {text} does not say {word}");
        }
    };
    refused("", &["make-test-ca", "insecure=on", "tls_dir"]);
    refused(",tls_dir=/missing", &["/missing/ca.pem", "No such file"]);
    refused(",insecure=on,tls_dir=/a", &["exclude each other"]);
    refused(",insecure=on,allowed_peers=[a]", &["allowed_peers", "insecure"]);
    let here = ca.join("a");
    refused(&format!(",tls_dir={},allowed_peers=[b,a b]", here.display()), &["'a b'"]);
    refused(&format!(",tls_dir={},tls_key=/k", here.display()), &["tls_key"]);
    refused(
        &format!(
            ",tls_ca={0}/ca.pem,tls_certificate={0}/host.pem,tls_key={0}/ca.pem",
            here.display()
        ),
        &["no private key"],
    );
    let (done, text) = receive(&format!(",tls_dir={},allowed_peers=[b,10.0.0.1]", here.display()));
    assert!(done, "{text}");
    let status: Value = serde_json::from_slice(&dyad.remote(&["ft-status"]).stdout).unwrap();
    assert_eq!(status["state"], "listening");
}

#[test]
fn protection_without_a_vm_or_with_nobody_there_is_refused() {
    let dyad = Dyad::start();
    let enable = dyad.remote(&["ft-enable", "backup_url=tcp:127.0.0.1:1,arbiter_url=file:/tmp"]);
    assert_eq!(enable.status.code(), Some(1));
    assert!(error(&enable).contains("404"), "{}", error(&enable));
    assert_eq!(dyad.remote(&["ft-failover"]).status.code(), Some(1));
    assert_eq!(dyad.remote(&["ft-disable"]).status.code(), Some(1));
    let status: Value = serde_json::from_slice(&dyad.remote(&["ft-status"]).stdout).unwrap();
    assert_eq!(status["role"], "none");
}

#[test]
fn a_standby_takes_no_vm_but_a_primarys() {
    let dyad = Dyad::start();
    let receive = dyad.remote(&["ft-receive", "listen_url=tcp:127.0.0.1:0,insecure=on"]);
    assert_eq!(receive.status.code(), Some(0), "{}", error(&receive));
    let config = dyad.directory.path().join("vm.json");
    std::fs::write(&config, "{}").unwrap();
    let snapshot = format!("source_url=file://{}", dyad.directory.path().display());
    for call in [["restore", &snapshot], ["create", config.to_str().unwrap()]] {
        let refused = dyad.remote(&call);
        assert_eq!(refused.status.code(), Some(1), "{call:?}");
        assert!(error(&refused).contains("waits for a primary"), "{}", error(&refused));
        assert!(error(&dyad.remote(&["info"])).contains("404"), "{call:?} has made a VM");
        let status: Value = serde_json::from_slice(&dyad.remote(&["ft-status"]).stdout).unwrap();
        assert_eq!(status["state"], "listening", "after {call:?}");
    }
}
