//! Who may be the other side of the logging channel, and which pairs do not fit: each is refused by name,
//! before the guest stands still, and the guest runs on.

use anyhow::{Context, Result, ensure};
use ft::message::{Hello, Message};
use ft::{Capabilities, FrameReader, PROTOCOL_VERSION};
use ledger_client::load::{Load, Options};
use pair_tests::disk::Disk;
use pair_tests::guest::program;
use pair_tests::kills::progress;
use pair_tests::lab::Lab;
use pair_tests::network::Side;
use pair_tests::pair::{Death, LOGGING_PORT, Pair, listen_url, merge, wait_for_status};
use pair_tests::requirements::{Need, met};
use pair_tests::vmm::Vmm;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];

/// A refusal that took longer than this was a timeout.
const PROMPT: Duration = Duration::from_secs(5);

/// A running guest on host a, and what is tried on host b.
struct Story {
    pair: Pair,
    load: Load,
}

impl Story {
    fn new(name: &str) -> Result<Self> {
        let pair = Pair::boot(Lab::new()?)?;
        let load = pair.lab.load(Options::new(pair.lab.service()?, name))?;
        Ok(Self { pair, load })
    }

    fn other(&self) -> Side {
        self.pair.side.other()
    }

    fn url(&self) -> String {
        listen_url(self.other())
    }

    fn address(&self) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.other().address().parse()?, LOGGING_PORT))
    }

    /// A `dyad` on host b that waits for the guest.
    fn waiting(&self, receive: &Value) -> Result<Vmm> {
        let backup = self.pair.lab.start(self.other(), &[])?;
        let mut body = json!({ "listen_url": self.url() });
        merge(&mut body, receive);
        backup.api().put_json("ft.receive", &body)?;
        Ok(backup)
    }

    /// `ft.enable` must be refused at once for a reason with all of `words`; the guest must not notice.
    fn refused(&self, enable: &Value, words: &[&str]) -> Result<()> {
        let mut body = self.pair.lab.enable(&self.url());
        merge(&mut body, enable);
        let asked = Instant::now();
        let text = body.to_string();
        let answer = self.pair.primary.api().request("PUT", "ft.enable", Some(text.as_bytes()))?;
        let took = asked.elapsed();
        let said = String::from_utf8(answer.body.unwrap_or_default())?;
        ensure!((400..600).contains(&answer.status), "{body}: {} {said}", answer.status);
        for word in words {
            ensure!(said.contains(word), "{body}: {said} does not say {word:?}");
        }
        ensure!(took < PROMPT, "{body}: refused after {took:?}: {said}");
        let pause = self.pair.status()?.clone.and_then(|clone| clone.pause_us);
        ensure!(pause.is_none(), "the guest stood still for {pause:?} us for a refusal: {said}");
        ensure!(self.pair.primary.state()? == "Running", "the guest does not run");
        progress(&self.load, 5)?;
        Ok(())
    }

    /// The waiting side must have logged each of `words`, and wait again.
    fn told(backup: &Vmm, words: &[&str]) -> Result<()> {
        wait_for_status(backup, "listening again", |status| status.state == "listening")?;
        words.iter().try_for_each(|word| backup.wait_for_log(word))
    }

    fn end(self) -> Result<()> {
        self.load.stop()?;
        self.pair.power_off()?;
        Ok(())
    }
}

#[test]
fn strangers_are_refused_and_plain_tcp_works_where_both_want_it() -> Result<()> {
    if !met("certificates of the logging channel", &NEEDS) {
        return Ok(());
    }
    let mut story = Story::new("certificates")?;
    let foreign = story.pair.lab.directory().join("foreign");
    let address = story.other().address();
    let made = Command::new(program("dyad-remote")?)
        .arg("make-test-ca")
        .arg(&foreign)
        .args([address, "elsewhere"])
        .output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));

    let stranger = story.waiting(&json!({ "tls_dir": foreign.join(address) }))?;
    story.refused(&json!({}), &["certificate", "not signed by the CA"])?;
    Story::told(&stranger, &["refuses this host's certificate"])?;
    drop(stranger);

    // The right authority, but not the host asked for.
    let elsewhere = story.waiting(&json!({ "tls_dir": foreign.join("elsewhere") }))?;
    let here = json!({ "tls_dir": foreign.join(address) });
    story.refused(&here, &["elsewhere", address])?;
    drop(elsewhere);

    let picky = story.waiting(&json!({ "allowed_peers": ["c.example"] }))?;
    story.refused(&json!({}), &["allowed_peers"])?;
    Story::told(&picky, &["none of the names in 'allowed_peers'"])?;
    story.refused(&json!({ "insecure": true }), &["it wants TLS", "insecure=on"])?;
    Story::told(&picky, &["speaks without TLS"])?;
    drop(picky);

    let plain = story.waiting(&json!({ "insecure": true }))?;
    story.refused(&json!({}), &["the peer speaks without TLS", "tls_dir=DIR"])?;
    Story::told(&plain, &["the peer wants TLS"])?;
    drop(plain);

    let insecure = json!({ "insecure": true });
    story.pair.protect_with(&insecure, &insecure)?;
    progress(&story.load, 20)?;
    story.end()
}

/// A side that speaks the first words of the protocol, over plain TCP.
struct Fake {
    stream: TcpStream,
    reader: FrameReader,
}

impl Fake {
    fn new(stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(PROMPT))?;
        Ok(Self { stream, reader: FrameReader::new() })
    }

    fn say(&mut self, message: &Message) -> Result<()> {
        let mut frame = Vec::new();
        message.append_frame(&mut frame)?;
        Ok(self.stream.write_all(&frame)?)
    }

    fn hear(&mut self) -> Result<Message> {
        let mut bytes = [0; 4096];
        loop {
            if let Some(message) = self.reader.next_message()? {
                return Ok(message);
            }
            let count = self.stream.read(&mut bytes)?;
            ensure!(count > 0, "the connection ended");
            self.reader.push(&bytes[..count]);
        }
    }
}

/// Waits on host b for one primary and answers its greeting with `ours`.
fn fake_backup(story: &Story, ours: Hello) -> Result<std::thread::JoinHandle<Result<Message>>> {
    let address = story.address()?;
    let host = story.pair.lab.network.host(story.other());
    let listener = host.run(move || TcpListener::bind(address))??;
    Ok(std::thread::spawn(move || {
        let mut fake = Fake::new(listener.accept()?.0)?;
        let theirs = fake.hear()?;
        fake.say(&Message::Hello(ours))?;
        // Its end of the connection closes when it has read the answer.
        let _ = fake.hear();
        Ok(theirs)
    }))
}

#[test]
fn a_pair_that_does_not_fit_is_refused_by_name_before_the_guest_is_paused() -> Result<()> {
    if !met("pairs that do not fit", &NEEDS) {
        return Ok(());
    }
    let story = Story::new("misfits")?;
    let insecure = json!({ "insecure": true });

    // A backup of another version, of another machine, with too little memory, without a device.
    let good = Capabilities { memory_bytes: u64::MAX, ..Capabilities::default() };
    let version = Hello { version: PROTOCOL_VERSION + 1, ..Hello::new("fake", good.clone()) };
    let backup = fake_backup(&story, version)?;
    story.refused(&insecure, &["protocol version", &(PROTOCOL_VERSION + 1).to_string()])?;
    let Message::Hello(theirs) = backup.join().ok().context("the fake backup panicked")?? else {
        anyhow::bail!("the primary did not greet");
    };
    let needs = theirs.capabilities.clone();
    for (offer, word) in [
        (Capabilities { cpu_model: "other-cpu-9".into(), ..needs.clone() }, "other-cpu-9"),
        (Capabilities { memory_bytes: 1 << 20, ..needs.clone() }, "1048576"),
        (Capabilities { devices: vec!["serial".into()], ..needs.clone() }, "virtio-blk"),
        (Capabilities { disk_modes: Vec::new(), ..needs.clone() }, "Shared"),
    ] {
        let backup = fake_backup(&story, Hello::new("fake", offer))?;
        story.refused(&insecure, &[word])?;
        backup.join().ok().context("the fake backup panicked")??;
    }

    // A primary of another version: the backup says so to it, and waits again.
    let backup = story.waiting(&insecure)?;
    let address = story.address()?;
    let host = story.pair.lab.network.host(story.pair.side);
    let stream = host.run(move || TcpStream::connect_timeout(&address, PROMPT))??;
    let mut fake = Fake::new(stream)?;
    let hello = Hello { version: PROTOCOL_VERSION + 1, ..Hello::new("fake", needs) };
    fake.say(&Message::Hello(hello))?;
    ensure!(matches!(fake.hear()?, Message::Hello(_)));
    let refusal = fake.hear()?;
    ensure!(
        matches!(&refusal, Message::Refused { reason } if reason.contains("protocol version")),
        "{refusal:?}"
    );
    Story::told(&backup, &["protocol version"])?;
    drop(backup);

    // An operator who gives a standby less than the guest has.
    let small = story.waiting(&json!({ "max_memory_bytes": 128 << 20 }))?;
    story.refused(&json!({}), &["268435456", "134217728"])?;
    Story::told(&small, &["134217728"])?;
    drop(small);

    // The image as host b sees it: not there, and of another size. Host a has it open.
    let backup = story.waiting(&json!({}))?;
    let image = story.pair.lab.disk.path().to_owned();
    let aside = image.with_extension("aside");
    std::fs::rename(&image, &aside)?;
    story.refused(&json!({}), &["disk.raw"])?;
    Disk::create(image.clone(), 128 << 20)?;
    story.refused(&json!({}), &["the disk '_", "524288", "262144"])?;
    Story::told(&backup, &["262144"])?;
    std::fs::rename(&aside, &image)?;
    drop(backup);
    story.end()
}

#[test]
fn two_sides_on_one_host_are_refused_unless_they_are_wanted_there() -> Result<()> {
    if !met("both sides on one host", &NEEDS) {
        return Ok(());
    }
    let mut story = Story::new("one-host")?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let words = ["on one host", boot.trim(), "same_host=on", "\\\"same_host\\\": true"];
    let backup = story.waiting(&json!({}))?;
    story.refused(&json!({ "same_host": false }), &words)?;
    Story::told(&backup, &["on one host"])?;
    drop(backup);
    story.pair.protect_for_good()?;
    progress(&story.load, 20)?;
    // The survivor goes by the terms of its own copy, and refuses no more than its predecessor.
    story.pair.kill_primary(Death::Process)?;
    story.pair.reprotect()?;
    progress(&story.load, 20)?;
    story.end()
}
