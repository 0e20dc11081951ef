//! Debian's own programs in the guest: they run, and a failover is nothing to them.

use anyhow::{Context, Result, bail, ensure};
use pair_tests::clients::redis::{self, Redis, Reply};
use pair_tests::clients::sqlite::{self, Sqlite};
use pair_tests::clients::web::{self, Numbers, Web};
use pair_tests::lab::Lab;
use pair_tests::pair::{CHANGE, Death, Pair};
use pair_tests::patience::eventually;
use pair_tests::requirements::{Need, met};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];
/// What one command in the guest may take.
const PATIENCE: Duration = Duration::from_secs(90);

#[test]
fn programs_start_from_the_root_file_system_and_go_down_with_the_guest() -> Result<()> {
    if !met("root file system with programs", &NEEDS) {
        return Ok(());
    }
    let start = "dyad.start=\"redis nginx sqlite streams\"";
    let mut pair = Pair::boot_with(Lab::with_programs()?, start)?;
    let mut said = |command: &str| pair.primary.console.run(command, PATIENCE);
    let redis = said("redis-cli incr counter")?;
    ensure!(redis == "(integer) 1", "{redis}");
    let nginx = said("wget -qO- http://127.0.0.1/small | head -n 2")?;
    ensure!(nginx == "1\n2", "{nginx}");
    let sqlite = "echo 'create table t(n); insert into t values(42); select n from t;' | \
                  socat -t 10 - TCP:127.0.0.1:7100";
    let sqlite = said(sqlite)?;
    ensure!(sqlite == "42", "{sqlite}");
    let compiled = said("compile")?;
    ensure!(compiled == "program: right", "{compiled}");
    let stress = said("stress-ng --cpu 1 --cpu-ops 5 --verify 2>&1 | tail -n 1")?;
    ensure!(stress.contains("successful run completed"), "{stress}");
    // Every service holds files on /data; it is unmounted all the same.
    pair.power_off()?;
    Ok(())
}

/// A client at work on one connection until it is told to stop.
struct Client {
    name: &'static str,
    /// Steps done: acknowledged writes, or pieces received.
    done: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Client {
    /// Does `work` again and again, which counts its own steps.
    fn start(
        name: &'static str,
        stop: &Arc<AtomicBool>,
        mut work: impl FnMut(&AtomicU64) -> Result<()> + Send + 'static,
    ) -> Self {
        let (done, stop) = (Arc::new(AtomicU64::new(0)), Arc::clone(stop));
        let count = Arc::clone(&done);
        let thread = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                work(&count)?;
            }
            Ok(())
        });
        Self { name, done, thread }
    }

    /// How far it comes; an error as soon as it has failed.
    fn reach(&self, steps: u64) -> Result<()> {
        eventually(CHANGE, self.name, || {
            let done = self.done.load(Ordering::Relaxed);
            if self.thread.is_finished() {
                bail!("{} failed after {done} steps", self.name);
            }
            Ok((done >= steps).then_some(()))
        })
    }

    /// Waits for its end; the steps it did.
    fn finish(self) -> Result<u64> {
        let end = self.thread.join();
        let end = end.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        end.with_context(|| self.name)?;
        Ok(self.done.load(Ordering::Relaxed))
    }
}

/// Writes numbers in sequence; every answer must be the next.
fn redis_client(pair: &Pair, stop: &Arc<AtomicBool>) -> Result<Client> {
    let mut redis = Redis::new(pair.lab.connect(redis::PORT)?);
    Ok(Client::start("redis", stop, move |done| {
        let next = i64::try_from(done.load(Ordering::Relaxed))? + 1;
        let counted = redis.number(&["INCR", "counter"])?;
        ensure!(counted == next, "INCR gives {counted}, not {next}");
        let length = redis.number(&["RPUSH", "list", &next.to_string()])?;
        ensure!(length == next, "RPUSH gives {length}, not {next}");
        done.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }))
}

/// Commits rows in sequence.
fn sqlite_client(pair: &Pair, stop: &Arc<AtomicBool>) -> Result<Client> {
    let mut sqlite = Sqlite::new(pair.lab.connect(sqlite::PORT)?);
    sqlite.run("PRAGMA synchronous=FULL; CREATE TABLE rows (n INTEGER);")?;
    Ok(Client::start("sqlite", stop, move |done| {
        let next = done.load(Ordering::Relaxed) + 1;
        sqlite.run(&format!("INSERT INTO rows VALUES ({next});"))?;
        done.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }))
}

/// Downloads one large file after the other and compares each byte.
fn web_client(pair: &Pair, stop: &Arc<AtomicBool>) -> Result<Client> {
    let mut web = Web::new(pair.lab.connect(web::PORT)?);
    Ok(Client::start("nginx", stop, move |done| {
        let mut numbers = Numbers::default();
        web.get("/large", |piece| {
            done.fetch_add(1, Ordering::Relaxed);
            numbers.take(piece)
        })?;
        Ok(())
    }))
}

/// Everything redis acknowledged is in its file, once and in order. The file may end with one write more, whose answer
/// nobody waited for.
fn check_append_only_file(lab: &Lab, acknowledged: u64) -> Result<()> {
    let commands = redis::commands(&lab.disk.file(redis::APPEND_ONLY_FILE)?)?;
    let pushed: Vec<u64> = commands
        .iter()
        .filter(|words| words[0].eq_ignore_ascii_case("RPUSH"))
        .map(|words| Ok(words[2].parse()?))
        .collect::<Result<_>>()?;
    let expected: Vec<u64> = (1..=acknowledged).collect();
    ensure!(pushed == expected, "the file has {} of {acknowledged} writes", pushed.len());
    let increments = commands.iter().filter(|words| words[0].eq_ignore_ascii_case("INCR")).count();
    ensure!(increments as u64 == acknowledged, "{increments} increments of {acknowledged}");
    Ok(())
}

#[test]
fn redis_sqlite_nginx_and_stress_ng_do_not_notice_that_hosts_die() -> Result<()> {
    if !met("real programs under kills", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot_with(Lab::with_programs()?, "dyad.start=\"redis nginx sqlite\"")?;
    // Verifies its own results, and tells redis how it ended.
    let stress = "stress-ng --verify --timeout 20 --cpu 1 --vm 1 --vm-bytes 16M --memcpy 1 --qsort 1 --qsort-size 4096";
    let stress =
        format!("({stress} >/data/stress.log 2>&1; redis-cli set stress $?) >/dev/null & true");
    pair.primary.console.run(&stress, PATIENCE)?;
    let stop = Arc::default();
    let clients =
        [redis_client(&pair, &stop)?, sqlite_client(&pair, &stop)?, web_client(&pair, &stop)?];
    let progress = || -> Result<()> {
        for client in &clients {
            client.reach(client.done.load(Ordering::Relaxed) + 5)?;
        }
        Ok(())
    };
    for death in [Death::Process, Death::Host, Death::Process] {
        progress()?;
        pair.protect().with_context(|| pair.describe())?;
        progress().with_context(|| pair.describe())?;
        pair.digests_are_equal()?;
        pair.kill_primary(death)?;
        progress().with_context(|| pair.describe())?;
        pair.wait_until_alone()?;
    }
    stop.store(true, Ordering::Relaxed);
    let [redis, sqlite, web] = clients;
    let (written, inserted) = (redis.finish()?, sqlite.finish()?);
    println!("{written} writes, {inserted} rows, {} pieces of downloads", web.finish()?);

    let mut redis = Redis::new(pair.lab.connect(redis::PORT)?);
    let expected: Vec<String> = (1..=written).map(|number| number.to_string()).collect();
    ensure!(redis.list("list")? == expected, "redis has lost or misplaced writes");
    let mut sqlite = Sqlite::new(pair.lab.connect(sqlite::PORT)?);
    let check = sqlite.run("PRAGMA integrity_check;")?;
    ensure!(check == ["ok"], "{check:?}");
    let rows = sqlite.run("SELECT n FROM rows ORDER BY rowid;")?;
    let expected: Vec<String> = (1..=inserted).map(|number| number.to_string()).collect();
    ensure!(rows == expected, "{} rows of {inserted}, or in another order", rows.len());
    let ended =
        eventually(CHANGE, "stress-ng ends", || match redis.command(&["GET", "stress"])? {
            Reply::Bulk(status) => Ok(status),
            other => bail!("{other:?}"),
        })?;
    let lab = pair.power_off()?;
    let stress = String::from_utf8(lab.disk.file("/stress.log")?)?;
    ensure!(ended == "0" && stress.contains("successful run completed"), "{ended}: {stress}");
    check_append_only_file(&lab, written)
}
