//! The story `scripts/quickstart` tells: boot, protect, kill, and what the client and the disk say.

use anyhow::{Context, Result, bail, ensure};
use ledger_client::load::{Load, Options};
use ledger_client::stats::Distribution;
use ledger_client::verdict::Verdict;
use pair_tests::lab::Lab;
use pair_tests::network::{CLIENT, Side};
use pair_tests::pair::{BOOT, Death, Pair, listen_url};
use pair_tests::requirements::{Need, met};
use pair_tests::soak::watch;
use std::time::{Duration, Instant};

/// How long the pair is watched before the kill, and the survivor after it.
const WATCH: Duration = Duration::from_secs(5);

/// Prints with the time since the start.
struct Story(Instant);

impl Story {
    fn tell(&self, text: &str) {
        println!("[{:6.1} s] {text}", self.0.elapsed().as_secs_f64());
    }

    /// A command as one would type it.
    fn command(&self, side: Side, text: &str) {
        println!("           {side}$ {text}");
    }
}

fn main() -> Result<()> {
    if !met("quickstart", &[Need::Root, Need::Tap]) {
        bail!("the quick start needs what is named above");
    }
    let story = Story(Instant::now());
    println!("A Linux guest survives the death of its host.\n");
    let lab = Lab::new()?;
    story.tell(
        "two hosts and a client, each in a network namespace of its own; a bridge between them",
    );
    for (name, namespace) in [
        ("host a", lab.network.host(Side::A)),
        ("host b", lab.network.host(Side::B)),
        ("client", &lab.network.switch),
    ] {
        println!(
            "           look into {name}: nsenter --net={} ip addr",
            namespace.path().display()
        );
    }
    println!(
        "           both hosts reach {} (disk and claims)",
        lab.directory().join("shared").display()
    );

    certificates(&story, &lab);
    let pair = boot(&story, lab)?;
    let (pair, load) = protect(&story, pair)?;
    let (pair, load) = kill(&story, pair, load)?;
    finish(&story, pair, load)
}

fn certificates(story: &Story, lab: &Lab) {
    story.tell("a certificate for each host, of an authority made for this pair:");
    let directories = [Side::A, Side::B].map(|side| lab.tls_dir(side));
    let authority = directories[0].parent().unwrap_or(lab.directory());
    let hosts = [Side::A, Side::B].map(Side::address).join(" ");
    println!("           $ dyad-remote make-test-ca {} {hosts}", authority.display());
}

/// How a host's `dyad` is started, up to what it boots.
fn dyad(lab: &Lab, side: Side, socket: &str) -> String {
    format!("dyad --api-socket {socket} --ft-tls-dir {}", lab.tls_dir(side).display())
}

fn boot(story: &Story, lab: Lab) -> Result<Pair> {
    let options: Vec<String> = lab.boot_options("");
    let line: Vec<String> = options.iter().map(|word| quoted(word)).collect();
    story.tell("host a boots a stock Debian kernel:");
    story.command(Side::A, &format!("{} {}", dyad(&lab, Side::A, "a1.sock"), line.join(" ")));
    let start = Instant::now();
    let pair = Pair::boot(lab)?;
    let took = start.elapsed();
    story.tell(&format!("shell prompt {:.1} s after the start", took.as_secs_f64()));
    ensure!(took < BOOT, "the guest took longer than {BOOT:?} to its shell");
    Ok(pair)
}

fn protect(story: &Story, mut pair: Pair) -> Result<(Pair, Load)> {
    let address = pair.lab.service()?;
    let load = pair.lab.load(Options::new(address, "quickstart"))?;
    story.tell(&format!(
        "the client at {CLIENT} opens one TCP connection to {address} and keeps it"
    ));
    story.tell("host b waits for a VM, host a is told to protect its own:");
    let url = listen_url(Side::B);
    let claims = pair.lab.claims();
    story.command(Side::B, &dyad(&pair.lab, Side::B, "b2.sock"));
    story
        .command(Side::B, &format!("dyad-remote --api-socket b2.sock ft-receive listen_url={url}"));
    story.command(
        Side::A,
        &format!(
            "dyad-remote --api-socket a1.sock ft-enable backup_url={url},arbiter_url=file:{},same_host=on",
            claims.display()
        ),
    );
    let protected = pair.protect()?;
    story.tell(&format!(
        "protected, over TLS: {:.2} s to copy the running guest, which stood still for {:.1} ms of it",
        protected.took.as_secs_f64(),
        protected.pause.as_secs_f64() * 1e3
    ));
    let stretch = watch(
        &pair,
        WATCH,
        || load.answered(),
        |_, status, answered| {
            story.tell(&format!(
            "{answered} requests served; lag {:.1} ms, outputs held {:.1} ms (median), {} digests equal",
            milliseconds(status.lag_us),
            milliseconds(status.output_delay.p50_us),
            status.digests_compared,
        ));
        },
    )?;
    story.tell(&format!(
        "log rate {:.2} Mbit/s at {:.0} requests/s",
        stretch.log_mbit_per_second, stretch.answers_per_second
    ));
    Ok((pair, load))
}

fn kill(story: &Story, mut pair: Pair, load: Load) -> Result<(Pair, Load)> {
    story.tell("host a dies:");
    story.command(Side::A, &format!("kill -9 {}", pair.primary.pid()));
    let dead = pair.kill_primary(Death::Process)?;
    let first = load.first_answer_after(dead)?;
    story.tell(&format!(
        "host b answers on the same TCP connection, {:.0} ms after the kill",
        first.duration_since(dead).as_secs_f64() * 1e3
    ));
    let status = pair.wait_until_alone()?;
    ensure!(status.digests_unequal == 0, "the digests of the two sides differed: {status:?}");
    let report = status.last_failover.context("host b tells nothing of a failover")?;
    story.tell(&format!("after the last word from host a ({}):", report.cause));
    for (what, at) in [
        ("suspected", Some(report.suspected_us)),
        ("every record executed", report.drained_us),
        ("lease over", report.lease_over_us),
        ("claim asked for", report.asked_us),
        ("claim won", report.claimed_us),
        ("live", report.live_us),
    ] {
        if let Some(at) = at {
            println!("           {:8.1} ms  {what}", milliseconds(at));
        }
    }
    let served = load.answered();
    let end = Instant::now() + WATCH;
    while Instant::now() < end {
        load.wait_for_answers(load.answered() + 1)?;
    }
    story.tell(&format!("host b served {} more requests", load.answered() - served));
    Ok((pair, load))
}

fn finish(story: &Story, pair: Pair, load: Load) -> Result<()> {
    let answers = load.stop()?;
    story.tell(&format!("the client closes its connection: {} requests answered", answers.len()));
    let times = answers.iter().map(|answer| answer.answered.duration_since(answer.sent));
    if let Some(times) = Distribution::of(times) {
        story.tell(&format!("answer times: {times}"));
    }
    story.tell("the guest is shut down by its power button:");
    story.command(pair.side, "dyad-remote --api-socket b2.sock power-button");
    let lab = pair.power_off()?;
    let contents = lab.disk.ledger().context("reading the ledger off the disk")?;
    let verdict = Verdict::of(&answers, &contents);
    story.tell(&format!("e2fsck -f: clean; the disk's ledger has {} lines", contents.texts.len()));
    println!("\nrequests acknowledged {:8}", verdict.acknowledged);
    println!("requests lost         {:8}", verdict.lost);
    println!("answered twice        {:8}", verdict.repeated);
    println!("out of order          {:8}", verdict.out_of_order);
    ensure!(verdict.is_clean(), "the disk does not hold what was acknowledged");
    println!("\nVerified: every acknowledged request is on the disk, once and in order.");
    Ok(())
}

fn milliseconds(microseconds: u64) -> f64 {
    microseconds as f64 / 1e3
}

/// `word` as a shell needs it.
fn quoted(word: &str) -> String {
    if word.contains(' ') { format!("'{word}'") } else { word.to_owned() }
}
