//! The kinds of work: a fixed amount each, so that the time it takes is the measure, and the time is the host's.

use crate::clients::redis::{self, Redis};
use crate::clients::sqlite::{self, Sqlite};
use crate::clients::web::{self, Web};
use crate::clients::{at_once, streams};
use crate::pair::Pair;
use anyhow::{Result, ensure};
use std::time::Duration;

/// Longest time one command in the guest may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// Clients at the same time, where there are several.
const CLIENTS: u64 = 16;

/// What the guest starts before the work; for the kernel command line.
pub const START: &str = "dyad.run=shell dyad.start=\"redis nginx sqlite streams\"";

/// A kind of work.
pub struct Work {
    /// Short name.
    pub name: &'static str,
    /// What is done.
    pub what: &'static str,
    /// Whether it waits for disk or network rather than for the processor.
    pub io: bool,
    /// Whether each host has an image of its own when it is protected; else both share one.
    pub mirrored: bool,
    /// What the guest's network carries each way, in the words of `tc`, if that is limited.
    pub network: Option<&'static str>,
    /// What is counted.
    pub unit: &'static str,
    /// How many of `unit` one step is.
    pub step: f64,
    /// Steps in a run.
    pub steps: u64,
    /// Steps in a smoke run.
    pub quick: u64,
    /// Does so many steps.
    pub run: fn(&mut Pair, u64) -> Result<()>,
}

/// What the authors of VMware FT had between their guests and clients.
const GIGABIT: Option<&str> = Some("1gbit");

const PROCESSOR: Work = Work {
    name: "processor",
    what: "stress-ng's processor methods (integers, floating point, bits, search, primes and so on), verified",
    io: false,
    mirrored: false,
    network: None,
    unit: "operations",
    step: 1.0,
    steps: 300,
    quick: 5,
    run: |pair, steps| stress(pair, &format!("--cpu 1 --cpu-ops {steps}")),
};

const MEMORY: Work = Work {
    name: "memory",
    what: "stress-ng's memory methods over 32 MiB (patterns, flips, walks), each read back and verified",
    steps: 20_000,
    quick: 5_000,
    run: |pair, steps| stress(pair, &format!("--vm 1 --vm-bytes 32M --vm-keep --vm-ops {steps}")),
    ..PROCESSOR
};

const COMPILE: Work = Work {
    name: "compile",
    what: "gcc -O2 of a program of four files, linked and run; objects on the disk",
    unit: "builds",
    steps: 2,
    quick: 1,
    run: |pair, steps| said(pair, &format!("compile {steps} | tail -n 1"), "program: right"),
    ..PROCESSOR
};

const REDIS: Work = Work {
    name: "redis",
    what: "redis, 16 clients, INCR; the append-only file is synced before each answer",
    io: true,
    unit: "requests",
    step: CLIENTS as f64,
    steps: 600,
    quick: 30,
    run: increments,
    ..PROCESSOR
};

const REDIS_MIRRORED: Work = Work {
    name: "redis mirrored",
    what: "the same, protected with mirrored disks: each host has its own image",
    mirrored: true,
    ..REDIS
};

const SQLITE: Work = Work {
    name: "sqlite",
    what: "sqlite, one client, an INSERT committed and synced before each answer",
    unit: "transactions",
    step: 1.0,
    steps: 600,
    quick: 20,
    run: inserts,
    ..REDIS
};

const SQLITE_MIRRORED: Work = Work {
    name: "sqlite mirrored",
    what: "the same, protected with mirrored disks",
    mirrored: true,
    ..SQLITE
};

const WEB: Work = Work {
    name: "web",
    what: "nginx, 16 clients, GET of 128 bytes on kept connections",
    steps: 800,
    quick: 40,
    run: requests,
    ..REDIS
};

const KEY_VALUE: Work = Work {
    name: "key-value",
    what: "redis, 16 clients, GET of 8 bytes: nothing goes to the disk",
    steps: 1_500,
    quick: 40,
    run: reads,
    ..REDIS
};

const RECEIVE: Work = Work {
    name: "receive",
    what: "one TCP stream into the guest, as fast as this machine can",
    unit: "Mbit",
    step: 8.0,
    steps: 600,
    quick: 10,
    run: |pair, steps| streams::send(pair.lab.connect(streams::SINK)?, steps * 1_000_000),
    ..REDIS
};

const RECEIVE_GIGABIT: Work = Work {
    name: "receive 1 Gbit/s",
    what: "the same over a network of 1 Gbit/s",
    network: GIGABIT,
    ..RECEIVE
};

const TRANSMIT: Work = Work {
    name: "transmit",
    what: "one TCP stream out of the guest, as fast as this machine can",
    run: |pair, steps| streams::receive(&mut pair.lab.connect(streams::SOURCE)?, steps * 1_000_000),
    ..RECEIVE
};

const TRANSMIT_GIGABIT: Work = Work {
    name: "transmit 1 Gbit/s",
    what: "the same over a network of 1 Gbit/s",
    network: GIGABIT,
    ..TRANSMIT
};

const ECHO: Work = Work {
    name: "echo",
    what: "64 bytes sent and sent back, one at a time: nothing but latency",
    unit: "requests",
    step: 1.0,
    steps: 8_000,
    quick: 200,
    run: |pair, steps| streams::echo(&mut pair.lab.connect(streams::ECHO)?, steps),
    ..REDIS
};

/// Every kind, in the order of the document.
pub const ALL: [Work; 14] = [
    PROCESSOR,
    MEMORY,
    COMPILE,
    REDIS,
    REDIS_MIRRORED,
    SQLITE,
    SQLITE_MIRRORED,
    WEB,
    KEY_VALUE,
    RECEIVE,
    RECEIVE_GIGABIT,
    TRANSMIT,
    TRANSMIT_GIGABIT,
    ECHO,
];

/// Runs `command` in the guest, which must say `expected`.
fn said(pair: &mut Pair, command: &str, expected: &str) -> Result<()> {
    let said = pair.primary.console.run(command, PATIENCE)?;
    ensure!(said == expected, "`{command}` in the guest says: {said}");
    Ok(())
}

fn stress(pair: &mut Pair, options: &str) -> Result<()> {
    let log = "/tmp/stress.log";
    let command = format!("stress-ng --verify {options} >{log} 2>&1 && echo done || cat {log}");
    said(pair, &command, "done")
}

fn clients<C>(pair: &Pair, port: u16, client: impl Fn(std::net::TcpStream) -> C) -> Result<Vec<C>> {
    (0..CLIENTS).map(|_| Ok(client(pair.lab.connect(port)?))).collect()
}

fn increments(pair: &mut Pair, steps: u64) -> Result<()> {
    at_once(clients(pair, redis::PORT, Redis::new)?, |number, mut redis| {
        let key = format!("counter{number}");
        let before = redis.number(&["INCR", &key])?;
        for step in 1..i64::try_from(steps)? {
            ensure!(redis.number(&["INCR", &key])? == before + step, "{key} lost a step");
        }
        Ok(())
    })?;
    Ok(())
}

fn reads(pair: &mut Pair, steps: u64) -> Result<()> {
    Redis::new(pair.lab.connect(redis::PORT)?).command(&["SET", "text", "dyaddyad"])?;
    at_once(clients(pair, redis::PORT, Redis::new)?, |_, mut redis| {
        for _ in 0..steps {
            redis.command(&["GET", "text"])?;
        }
        Ok(())
    })?;
    Ok(())
}

fn inserts(pair: &mut Pair, steps: u64) -> Result<()> {
    let mut sqlite = Sqlite::new(pair.lab.connect(sqlite::PORT)?);
    sqlite.run("PRAGMA synchronous=FULL; CREATE TABLE IF NOT EXISTS bench (n INTEGER);")?;
    for step in 0..steps {
        sqlite.run(&format!("INSERT INTO bench VALUES ({step});"))?;
    }
    Ok(())
}

fn requests(pair: &mut Pair, steps: u64) -> Result<()> {
    at_once(clients(pair, web::PORT, Web::new)?, |_, mut web| {
        for _ in 0..steps {
            ensure!(web.get("/small", |_| Ok(()))? == 128, "/small has another length");
        }
        Ok(())
    })?;
    Ok(())
}
