//! The API server over a real socket, with a VM that only remembers what was asked of it.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use serde_json::{Value, json};
use support::{Fixture, State};

const HEAD_204: &str =
    "HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n";

fn request(method: &str, name: &str, body: &str) -> String {
    let length =
        if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    format!("{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}")
}

fn with_body(status: u16, body: &str) -> String {
    format!(
        "HTTP/1.1 {status} \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// All states of a VM a client can see.
const STATES: [State; 4] = [State::None, State::Created, State::Running, State::Paused];

#[test]
fn metrics_are_text_in_every_state() {
    for (state, name) in STATES.into_iter().zip(["None", "Created", "Running", "Paused"]) {
        let fixture = Fixture::in_state(state);
        let answer = fixture.exchange("GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(head.contains("Content-Type: text/plain; version=0.0.4"), "{head}");
        assert!(body.contains(&format!("dyad_vm_state{{state=\"{name}\"}} 1\n")), "{body}");
        let refused = fixture.exchange("PUT /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
    }
}

#[test]
fn every_call_in_every_state() {
    let restore = r#"{"source_url": "file:///s"}"#;
    let snapshot = r#"{"destination_url": "file:///s"}"#;
    let receive = r#"{"listen_url": "tcp:127.0.0.1:7700"}"#;
    let enable = r#"{"backup_url": "tcp:127.0.0.1:7700", "arbiter_url": "file:/a"}"#;
    // Status with no VM, created, running, paused. Cloud Hypervisor's table, and the ft. calls.
    for (method, name, body, statuses) in [
        ("GET", "vmm.ping", "", [200, 200, 200, 200]),
        ("PUT", "vmm.shutdown", "", [200, 200, 200, 200]),
        ("PUT", "vm.create", "{}", [204, 500, 500, 500]),
        ("PUT", "vm.delete", "", [204, 204, 204, 204]),
        ("PUT", "vm.boot", "", [404, 204, 500, 500]),
        ("PUT", "vm.shutdown", "", [500, 500, 204, 204]),
        ("PUT", "vm.reboot", "", [404, 404, 204, 204]),
        ("PUT", "vm.pause", "", [500, 500, 204, 500]),
        ("PUT", "vm.resume", "", [500, 500, 500, 204]),
        ("PUT", "vm.power-button", "", [500, 500, 204, 204]),
        ("GET", "vm.info", "", [404, 200, 200, 200]),
        ("GET", "vm.counters", "", [500, 500, 200, 200]),
        ("PUT", "vm.snapshot", snapshot, [500, 500, 500, 204]),
        ("PUT", "vm.restore", restore, [204, 500, 500, 500]),
        ("PUT", "ft.receive", receive, [204, 500, 500, 500]),
        ("PUT", "ft.enable", enable, [404, 500, 204, 500]),
        ("GET", "ft.status", "", [200, 200, 200, 200]),
        ("PUT", "ft.failover", "", [204, 204, 204, 204]),
        ("PUT", "ft.disable", "", [204, 204, 204, 204]),
        ("PUT", "vm.nmi", "", [500, 500, 500, 500]),
        ("PUT", "vm.resize", "{}", [404, 500, 500, 500]),
        ("PUT", "vm.add-disk", "{}", [404, 500, 500, 500]),
        ("PUT", "vm.remove-device", "{}", [404, 500, 500, 500]),
        ("PUT", "vm.send-migration", "{}", [500, 500, 500, 500]),
        ("PUT", "vm.receive-migration", "{}", [500, 500, 500, 500]),
    ] {
        for (state, status) in STATES.into_iter().zip(statuses) {
            let fixture = Fixture::in_state(state);
            let answer = fixture.exchange(&request(method, name, body));
            let what = format!("{name} in {state:?}: {answer}");
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} \r\n")), "{what}");
            let reached = fixture.calls();
            if status >= 400 {
                assert_eq!(reached, [""; 0], "{what} must not reach the VM");
                let (_, json) = answer.split_once("\r\n\r\n").unwrap();
                let chain: Vec<String> = serde_json::from_str(json).unwrap();
                assert!(!chain.is_empty(), "{what}");
            } else if name == "vmm.shutdown" {
                assert_eq!(reached, ["delete"]);
                assert_eq!(answer, with_body(200, ""));
                fixture.wait_for_exit().unwrap();
            } else if name != "vmm.ping" {
                assert_eq!(reached.len(), 1, "{what}");
            }
            if status == 204 {
                assert_eq!(answer, HEAD_204, "{what}");
            }
        }
    }
}

#[test]
fn a_refusal_of_the_vm_goes_out_as_it_is() {
    let fixture = Fixture::in_state(State::Created);
    fixture.refuse_next(409, &["Cannot boot", "the id 'ä' is used twice"]);
    assert_eq!(
        fixture.exchange(&request("PUT", "vm.boot", "")),
        with_body(409, r#"["Cannot boot","the id '\u00e4' is used twice"]"#)
    );
}

#[test]
fn methods_bodies_and_paths_that_do_not_fit() {
    let fixture = Fixture::in_state(State::Running);
    let bad = with_body(400, r#"["Bad Request"]"#);
    let empty = with_body(400, "");
    let not_found = with_body(404, r#"["Not Found"]"#);
    for (method, name, body, expected) in [
        ("GET", "vm.boot", "", &bad),
        ("PUT", "vm.info", "", &bad),
        ("DELETE", "vm.info", "", &bad),
        ("GET", "vm.create", "", &bad),
        ("PUT", "vm.create", "", &empty),
        ("PATCH", "vm.boot", "", &empty),
        ("DELETE", "vm.pause", "", &empty),
        ("PUT", "vm.pause", "{}", &bad),
        ("PUT", "ft.disable", "null", &bad),
        ("PUT", "vm.snapshot", "", &bad),
        ("PUT", "ft.enable", "", &bad),
        ("PUT", "vm.resize", "", &bad),
        ("PUT", "vm.coredump", "{}", &not_found),
        ("GET", "vm.nothing", "", &not_found),
        ("GET", "vm.info/", "", &not_found),
        ("GET", "vm.info?x=1", "", &not_found),
        ("GET", "", "", &not_found),
    ] {
        assert_eq!(&fixture.exchange(&request(method, name, body)), expected, "{method} {name}");
    }
    assert_eq!(fixture.exchange("GET /api/v2/vm.info HTTP/1.1\r\n\r\n"), not_found);
    assert_eq!(fixture.calls(), [""; 0]);
    // A body on GET and on vmm.shutdown means nothing, and a stated length of 0 is none.
    for call in [
        request("GET", "vm.counters", "{}"),
        "PUT /api/v1/vm.pause HTTP/1.1\r\nContent-Length: 0\r\n\r\n".to_owned(),
        request("PUT", "vmm.shutdown", "{}"),
    ] {
        assert!(fixture.exchange(&call).starts_with("HTTP/1.1 20"), "{call}");
    }
}

#[test]
fn bad_json_is_refused_with_the_parsers_words() {
    let fixture = Fixture::in_state(State::None);
    for (name, body, word) in [
        ("vm.create", "{", "EOF"),
        ("vm.create", "[]", "invalid"),
        ("vm.create", "{} {}", "trailing"),
        ("vm.create", r#"{"cpus": {"boot_vcpus": 1}}"#, "max_vcpus"),
        ("vm.create", r#"{"iommu": false, "iommu": false}"#, "duplicate"),
        ("vm.create", r#"{"serial": {"mode": "Loud"}}"#, "Loud"),
        ("vm.create", "\u{0}", "expected value"),
        ("vm.snapshot", "{}", "destination_url"),
        ("vm.restore", r#"{"source_url": 1}"#, "string"),
        (
            "vm.restore",
            r#"{"source_url":"file:///s","memory_restore_mode":"OnDemand","prefault":true}"#,
            "exclude",
        ),
        (
            "vm.restore",
            r#"{"source_url":"file:///s","net_fds":[{"id":"n","num_fds":1}]}"#,
            "net_fds",
        ),
        ("vm.restore", r#"{"source_url":"file:///s","iommufd_fd":3}"#, "iommufd_fd"),
        ("ft.receive", r#"{"listen_url": "7700"}"#, "tcp:HOST:PORT"),
        (
            "ft.receive",
            r#"{"listen_url": "tcp:0.0.0.0:1", "max_memory_bytes": 0}"#,
            "max_memory_bytes",
        ),
        ("ft.enable", r#"{"backup_url": "tcp:h:1"}"#, "arbiter_url"),
        ("ft.enable", r#"{"backup_url": "tcp:h:1", "arbiter_url": "etcd:x"}"#, "arbiter"),
        (
            "ft.enable",
            r#"{"backup_url":"tcp:h:1","arbiter_url":"file:/a","mode":"checkpoint"}"#,
            "checkpoint",
        ),
        ("vm.add-disk", "nonsense", "expected"),
    ] {
        let answer = fixture.exchange(&request("PUT", name, body));
        assert!(answer.starts_with("HTTP/1.1 400 \r\n"), "{name} {body}: {answer}");
        let (_, json) = answer.split_once("\r\n\r\n").unwrap();
        let chain: Vec<String> = serde_json::from_str(json).unwrap();
        assert_eq!(chain.len(), 2, "{answer}");
        assert!(chain[1].contains(word), "{name} {body}: {answer}");
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(fixture.exchange(&request("PUT", "vm.create", &deep)).starts_with("HTTP/1.1 400"));
    assert_eq!(fixture.calls(), [""; 0]);
}

#[test]
fn info_of_an_empty_configuration_has_exactly_the_documented_bytes() {
    let fixture = Fixture::in_state(State::None);
    assert_eq!(fixture.exchange(&request("PUT", "vm.create", "{}")), HEAD_204);
    let expected = concat!(
        r#"{"config":{"cpus":{"boot_vcpus":1,"max_vcpus":1,"kvm_hyperv":false,"max_phys_bits":46,"#,
        r#""features":{"amx":false},"nested":true,"core_scheduling":"Vm","profile":"Host"},"#,
        r#""memory":{"size":536870912,"mergeable":false,"hotplug_method":"Acpi","shared":false,"#,
        r#""hugepages":false,"prefault":false,"reserve":false,"thp":true},"#,
        r#""rng":{"pci_segment":0,"src":"/dev/urandom"},"serial":{"mode":"Null"},"#,
        r#""console":{"mode":"Tty","pci_segment":0},"debug_console":{"mode":"Off","iobase":233},"#,
        r#""pvpanic":false,"iommu":false,"watchdog":false,"landlock_enable":false},"#,
        r#""state":"Created","memory_actual_size":536870912}"#,
    );
    assert_eq!(fixture.exchange(&request("GET", "vm.info", "")), with_body(200, expected));
}

#[test]
fn ping_tells_version_and_pid() {
    let fixture = Fixture::in_state(State::None);
    let ping: Value = fixture.client().get("vmm.ping").unwrap();
    assert_eq!(ping["pid"], json!(std::process::id()));
    assert!(ping["version"].is_string() && ping["build_version"].is_string());
    assert!(ping["features"].is_array());
}

#[test]
fn requests_in_fragments_and_many_at_once() {
    let fixture = Fixture::in_state(State::Running);
    let mut stream = fixture.connect();
    let pause = request("PUT", "vm.pause", "");
    let snapshot = request("PUT", "vm.snapshot", r#"{"destination_url": "file:///s"}"#);
    let resume = request("PUT", "vm.resume", "");
    // Byte by byte, each in a packet of its own; the answer of one before the other is complete.
    for byte in pause.bytes() {
        stream.write_all(&[byte]).unwrap();
    }
    fixture.expect(&mut stream, HEAD_204);
    // Fragments as ch-remote sends them: head, blank line, body.
    let (head, body) = snapshot.split_once("\r\n\r\n").unwrap();
    for part in [head, "\r\n\r\n", body] {
        stream.write_all(part.as_bytes()).unwrap();
    }
    fixture.expect(&mut stream, HEAD_204);
    // Pipelined, in order.
    stream.write_all(resume.repeat(2).as_bytes()).unwrap();
    fixture.expect(&mut stream, HEAD_204);
    let refusal = with_body(500, r#"["vm.resume needs a paused VM","the VM is Running"]"#);
    fixture.expect(&mut stream, &refusal);
    assert_eq!(fixture.calls(), ["pause", "snapshot file:///s", "resume"]);
}

#[test]
fn a_client_that_closes_its_side_still_gets_its_answers() {
    let fixture = Fixture::in_state(State::Running);
    let mut stream = fixture.connect();
    stream.write_all(request("PUT", "vm.pause", "").repeat(100).as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answers = String::new();
    stream.read_to_string(&mut answers).unwrap();
    assert_eq!(answers.matches("HTTP/1.1 204 ").count(), 1);
    assert_eq!(answers.matches("HTTP/1.1 500 ").count(), 99);
}

#[test]
fn a_client_that_does_not_read_stops_being_read() {
    let fixture = Fixture::in_state(State::Running);
    let mut stream = fixture.connect();
    stream.set_nonblocking(true).unwrap();
    let info = request("GET", "vm.info", "");
    // More answers than all buffers hold: at some point the server takes no more.
    let mut taken = 0usize;
    let mut refused_before = false;
    loop {
        match stream.write(&info.as_bytes()[taken % info.len()..]) {
            Ok(length) => {
                taken += length;
                refused_before = false;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && refused_before => break,
            Err(error) if error.kind() == ErrorKind::WouldBlock => refused_before = true,
            Err(error) => panic!("{error}"),
        }
        assert!(taken < 64 << 20, "the server took {taken} bytes of requests, no answer was read");
        if refused_before {
            // Once another client is served, the server has been at this one's bytes as well.
            let _: Value = fixture.client().get("vmm.ping").unwrap();
        }
    }
    let _: Value = fixture.client().get("vm.info").unwrap();
}

#[test]
fn garbage_is_answered_and_never_taken_for_a_call() {
    let fixture = Fixture::in_state(State::Running);
    for garbage in [
        "\u{16}\u{3}\u{1} hello\r\n\r\n".to_owned(),
        "PUT\r\n\r\n".to_owned(),
        format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(2000)),
        "PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
        "PUT /api/v1/vm.delete HTTP/1.1\r\nContent-Length: nine\r\n\r\n".to_owned(),
    ] {
        let mut stream = fixture.connect();
        // What follows the garbage would be a request; where it begins cannot be known.
        let bytes = format!("{garbage}{}", request("PUT", "vm.delete", ""));
        stream.write_all(bytes.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 \r\n"), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
        let (_, json) = answer.split_once("\r\n\r\n").unwrap();
        let chain: Vec<String> = serde_json::from_str(json).unwrap();
        assert_eq!(chain[0], "Bad Request");
    }
    let post = fixture.exchange(&request("POST", "vm.pause", ""));
    assert!(post.starts_with("HTTP/1.1 400 \r\n"), "{post}");
    assert_eq!(fixture.calls(), [""; 0]);
}

#[test]
fn a_body_beyond_the_limit_is_refused_and_skipped() {
    let fixture = Fixture::in_state(State::None);
    let mut stream = fixture.connect();
    let limit = vmm::api::http::MAX_BODY;
    let head =
        |length| format!("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head(limit + 1).as_bytes()).unwrap();
    // Content that would be a call, were it read as one.
    let delete = request("PUT", "vm.delete", "");
    let mut body = delete.repeat(limit / delete.len() + 1).into_bytes();
    body.truncate(limit + 1);
    stream.write_all(&body).unwrap();
    stream.write_all(request("GET", "vm.counters", "").as_bytes()).unwrap();
    let why =
        format!(r#"["Bad Request","the body has {} bytes, the limit is {limit}"]"#, limit + 1);
    fixture.expect(&mut stream, &with_body(400, &why));
    let refusal =
        r#"["vm.counters needs a booted VM","no VM is configured: call vm.create first"]"#;
    fixture.expect(&mut stream, &with_body(500, refusal));
    // At the limit it is read.
    let padded = format!("{{{}}}", " ".repeat(limit - 2));
    assert_eq!(fixture.exchange(&(head(limit) + &padded)), HEAD_204);
    assert_eq!(fixture.calls(), ["create"]);
}

#[test]
fn an_old_client_and_one_that_waits_to_continue() {
    let fixture = Fixture::in_state(State::None);
    // Version 1.0 is answered as 1.1, and the connection stays open all the same.
    let mut stream = fixture.connect();
    stream
        .write_all(b"GET http://localhost/api/v1/vm.info HTTP/1.0\r\nConnection: close\r\n\r\n")
        .unwrap();
    let refusal =
        r#"["vm.info needs a configured VM","no VM is configured: call vm.create first"]"#;
    fixture.expect(&mut stream, &with_body(404, refusal));
    stream
        .write_all(
            b"PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n",
        )
        .unwrap();
    fixture.expect(
        &mut stream,
        "HTTP/1.1 100 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n",
    );
    stream.write_all(b"{}").unwrap();
    fixture.expect(&mut stream, HEAD_204);
}

#[test]
fn the_eleventh_connection_is_turned_away_until_one_closes() {
    let fixture = Fixture::in_state(State::None);
    let mut open = Vec::new();
    for _ in 0..10 {
        let mut stream = fixture.connect();
        stream.write_all(request("PUT", "vm.pause", "").as_bytes()).unwrap();
        let refusal =
            r#"["vm.pause needs a running VM","no VM is configured: call vm.create first"]"#;
        fixture.expect(&mut stream, &with_body(500, refusal));
        open.push(stream);
    }
    let mut answer = String::new();
    fixture.connect().read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\n[\"Too many open connections\"]"), "{answer}");
    assert!(answer.contains("Content-Length: 29\r\n"));
    drop(open.pop());
    // The server learns of the close in its own time.
    while fixture.client().put("vm.delete").is_err() {}
    assert!(!open.is_empty());
}

#[test]
fn clients_that_vanish_do_no_harm() {
    let fixture = Fixture::in_state(State::Running);
    for bytes in ["", "GET /api", &request("GET", "vm.info", ""), &request("PUT", "vm.pause", "")] {
        for _ in 0..30 {
            let mut stream = fixture.connect();
            // The server may have turned it away already.
            let _ = stream.write_all(bytes.as_bytes());
        }
    }
    while fixture.client().get::<Value>("vm.info").is_err() {}
}

#[test]
fn the_client_reports_refusals_and_missing_servers() {
    let fixture = Fixture::in_state(State::None);
    let error = fixture.client().put("vm.boot").unwrap_err();
    let api_client::Error::Refused { status: 404, chain } = error else { panic!("{error}") };
    assert_eq!(chain[0], "vm.boot needs a VM that is configured and not booted");
    let error = fixture.client().put_json("vm.create", &json!({"cpus": 1})).unwrap_err();
    assert!(matches!(error, api_client::Error::Refused { status: 400, .. }), "{error}");
    let error = api_client::Client::new("/nowhere/api.sock").put("vm.boot").unwrap_err();
    assert!(matches!(error, api_client::Error::Connect { .. }), "{error}");
    assert!(error.to_string().contains("/nowhere/api.sock"));
}

#[test]
fn a_guest_that_switches_itself_off_ends_the_vmm() {
    let fixture = Fixture::in_state(State::Running);
    // A bell without an end is no end.
    fixture.doorbell().ring();
    let _: Value = fixture.client().get("vm.info").unwrap();
    fixture.end_guest(vmm::api::VmEnd::PowerOff);
    fixture.wait_for_exit().unwrap();
    assert_eq!(fixture.calls(), ["info", "delete"]);
}

#[test]
fn a_guest_that_switches_itself_off_may_leave_the_vmm_up() {
    let fixture = Fixture::staying(State::Running);
    fixture.end_guest(vmm::api::VmEnd::PowerOff);
    let info: Value = fixture.client().get("vm.info").unwrap();
    assert_eq!(info["state"], "Created");
}

#[test]
fn a_failure_of_the_vm_ends_the_vmm_with_an_error() {
    let fixture = Fixture::staying(State::Running);
    fixture.end_guest(vmm::api::VmEnd::Failure("triple trouble".to_owned()));
    let error = fixture.wait_for_exit().unwrap_err();
    assert!(error.to_string().contains("triple trouble"));
}
