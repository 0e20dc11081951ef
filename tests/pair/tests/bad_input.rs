//! Wrong calls, wrong files, wrong peers: a clear error each, and nothing that runs is harmed.

use anyhow::{Context, Result, bail, ensure};
use ledger_client::load::Options;
use pair_tests::kills::progress;
use pair_tests::lab::Lab;
use pair_tests::network::Side;
use pair_tests::pair::{LOGGING_PORT, Pair, listen_url};
use pair_tests::requirements::{Need, met};
use pair_tests::vmm::Vmm;
use serde_json::{Value, json};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];

/// Sends bytes as they are; gives status code and body.
fn raw(vmm: &Vmm, method: &str, call: &str, body: &str) -> Result<(u16, String)> {
    let body = (!body.is_empty()).then_some(body.as_bytes());
    let answer = vmm.api().request(method, call, body)?;
    Ok((answer.status, String::from_utf8(answer.body.unwrap_or_default())?))
}

/// The call must be refused with `status` and an answer that mentions each of `words`.
fn refused(
    vmm: &Vmm,
    call: &str,
    body: &Value,
    status: std::ops::RangeInclusive<u16>,
    words: &[&str],
) -> Result<()> {
    let (code, answer) =
        raw(vmm, "PUT", call, &if body.is_null() { String::new() } else { body.to_string() })?;
    ensure!(status.contains(&code), "{call} {body}: {code} {answer}");
    let reasons: Vec<String> = serde_json::from_str(&answer)
        .with_context(|| format!("{call} {body}: the answer is no list of reasons: {answer}"))?;
    let said = reasons.join(" ").to_lowercase();
    for word in words {
        ensure!(said.contains(&word.to_lowercase()), "{call} {body}: {answer} does not say {word}");
    }
    Ok(())
}

#[test]
fn wrong_calls_are_refused_with_a_reason() -> Result<()> {
    if !met("wrong calls", &NEEDS) {
        return Ok(());
    }
    let lab = Lab::new()?;
    let vmm = lab.start(Side::A, &[])?;
    for (method, call, body, expected) in [
        ("PUT", "vm.create", "{\"cpus\": ", 400),
        ("PUT", "vm.create", "[]", 400),
        ("PUT", "vm.create", "{\"memory\": {\"size\": -1}}", 400),
        ("PUT", "vm.create", "{\"payload\": {}, \"payload\": {}}", 400),
        ("PUT", "vm.boot", "", 404),
        ("PUT", "vm.pause", "", 500),
        ("PUT", "vm.resume", "", 500),
        ("PUT", "vm.power-button", "", 500),
        ("GET", "vm.info", "", 404),
        ("GET", "vm.nothing", "", 404),
        ("PUT", "ft.enable", "{\"backup_url\": 1}", 400),
        ("PUT", "ft.receive", "{}", 400),
    ] {
        let (status, answer) = raw(&vmm, method, call, body)?;
        ensure!(status == expected, "{method} {call} {body}: {status} {answer}");
    }
    refused(&vmm, "ft.receive", &json!({ "listen_url": "udp:1.2.3.4:5" }), 400..=500, &["tcp"])?;
    refused(&vmm, "ft.failover", &Value::Null, 400..=500, &[])?;
    refused(&vmm, "ft.disable", &Value::Null, 400..=500, &[])?;
    let enable = json!({ "backup_url": "tcp:127.0.0.1:1", "arbiter_url": "file:/nowhere" });
    refused(&vmm, "ft.enable", &enable, 400..=500, &[])?;
    vmm.api().get::<Value>("vmm.ping")?;
    Ok(())
}

#[test]
fn wrong_files_are_refused_with_their_names() -> Result<()> {
    if !met("wrong files", &NEEDS) {
        return Ok(());
    }
    let lab = Lab::new()?;
    let vmm = lab.start(Side::A, &[])?;
    let directory = lab.directory();
    let no_kernel = directory.join("no-kernel");
    std::fs::write(&no_kernel, vec![0x55; 1 << 20])?;
    let tiny = directory.join("tiny");
    std::fs::write(&tiny, "x")?;
    let truncated = directory.join("truncated");
    let kernel = std::fs::read(&lab.guest.kernel)?;
    std::fs::write(&truncated, &kernel[..kernel.len() / 2])?;
    let odd = directory.join("odd-size");
    std::fs::write(&odd, vec![0; 1000])?;
    let missing = directory.join("missing");
    let good = &lab.guest.kernel;

    let cases = [
        ("kernel", json!({ "payload": { "kernel": missing } }), "missing"),
        ("kernel", json!({ "payload": { "kernel": no_kernel } }), "no-kernel"),
        ("kernel", json!({ "payload": { "kernel": tiny } }), "tiny"),
        ("kernel", json!({ "payload": { "kernel": truncated } }), "truncated"),
        ("initramfs", json!({ "payload": { "kernel": good, "initramfs": missing } }), "missing"),
        ("disk", json!({ "payload": { "kernel": good }, "disks": [{ "path": odd }] }), "odd-size"),
        (
            "disk",
            json!({ "payload": { "kernel": good }, "disks": [{ "path": missing }] }),
            "missing",
        ),
    ];
    for (what, mut config, named) in cases {
        config["console"] = json!({ "mode": "Null" });
        vmm.api().put_json("vm.create", &config).with_context(|| what.to_owned())?;
        refused(&vmm, "vm.boot", &Value::Null, 400..=500, &[named])?;
        vmm.api().put("vm.delete")?;
    }
    vmm.api().get::<Value>("vmm.ping")?;
    Ok(())
}

#[test]
fn a_running_guest_is_unharmed_by_wrong_calls_and_wrong_peers() -> Result<()> {
    if !met("wrong calls and peers while a guest runs", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "bad-input"))?;
    let claims = format!("file:{}", pair.lab.claims().display());
    let other = pair.side.other();
    let nobody = listen_url(other);

    // A backup that is not there, then one that is something else.
    let enable = json!({ "backup_url": nobody, "arbiter_url": claims });
    expect_no_protection(&pair, &enable)?;
    progress(&load, 20)?;
    let address = SocketAddr::new(other.address().parse()?, LOGGING_PORT);
    let stranger =
        pair.lab.network.host(other).run(move || std::net::TcpListener::bind(address))??;
    let garbage = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = stranger.accept()?;
        stream.write_all(&[0xa5; 100_000])
    });
    expect_no_protection(&pair, &enable)?;
    let _ = garbage.join();
    progress(&load, 20)?;

    // Calls that do not fit a running VM.
    refused(&pair.primary, "vm.create", &json!({}), 500..=500, &[])?;
    refused(&pair.primary, "vm.boot", &Value::Null, 500..=500, &[])?;
    refused(&pair.primary, "ft.receive", &json!({ "listen_url": nobody }), 400..=500, &[])?;
    let nowhere = json!({ "backup_url": nobody, "arbiter_url": "file:/does/not/exist" });
    refused(&pair.primary, "ft.enable", &nowhere, 400..=500, &["/does/not/exist"])?;
    progress(&load, 20)?;

    // Garbage on the logging port of a waiting backup: it goes on waiting.
    let backup = pair.lab.start(other, &[])?;
    backup.api().put_json("ft.receive", &json!({ "listen_url": nobody }))?;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 70_000], &[0; 70_000], b""] {
        let bytes = bytes.to_vec();
        pair.lab.network.host(pair.side).run(move || -> Result<()> {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
            // The backup may well close the connection in the middle.
            let _ = stream.write_all(&bytes);
            Ok(())
        })??;
    }
    backup.ft_status().context("the backup after garbage")?;
    drop(backup);

    // Garbage on the logging port while protected.
    pair.protect()?;
    pair.lab.network.host(pair.side).run(move || -> Result<()> {
        if let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            let _ = stream.write_all(&[0xff; 70_000]);
        }
        Ok(())
    })??;
    refused(&pair.primary, "ft.enable", &enable, 400..=500, &[])?;
    progress(&load, 50)?;
    ensure!(pair.status()?.state == "protected", "{:?}", pair.status()?);

    load.stop()?;
    pair.power_off()?;
    Ok(())
}

/// Protecting must fail with a reason, at once or in the status, and leave the VM unprotected.
fn expect_no_protection(pair: &Pair, enable: &Value) -> Result<()> {
    let (code, answer) = raw(&pair.primary, "PUT", "ft.enable", &enable.to_string())?;
    if (200..300).contains(&code) {
        let status = pair.wait_until_alone()?;
        ensure!(status.reason.is_some(), "no reason in {status:?}");
    } else if code < 400 || serde_json::from_str::<Vec<String>>(&answer).is_err() {
        bail!("ft.enable: {code} {answer}");
    }
    ensure!(pair.primary.state()? == "Running", "the VM is {}", pair.primary.state()?);
    Ok(())
}
