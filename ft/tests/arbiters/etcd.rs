//! `etcd:HOST:PORT,...`, on real etcd processes, and on what only pretends to be one.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use etcd_cluster::{Cluster, installed};
use ft::{Claim, Generation};

use super::suite::Place;
use super::{announced, arbiter, pair, text};

impl Place for Cluster {
    fn url(&self) -> String {
        self.url()
    }

    fn take_away(&mut self) {
        self.kill(0).expect("it ran");
    }

    fn bring_back(&mut self) {
        self.launch(0).expect("started");
        self.wait_until_healthy().expect("healthy");
    }
}

fn cluster(test: &str, members: usize) -> Option<Cluster> {
    installed(test).then(|| Cluster::start(members).expect("a cluster"))
}

crate::arbiter_suite!(|test| cluster(test, 1));

/// What takes this long has not waited for a member that is silent.
const PROMPT: Duration = Duration::from_millis(1500);

#[test]
fn with_one_member_of_three_dead_claims_are_made() {
    let Some(mut cluster) = cluster("one of three etcd dead", 3) else { return };
    let arbiter = announced(&cluster.url(), 1);
    cluster.kill(0).expect("it ran");
    // The others may have to choose a new leader.
    cluster.wait_until_healthy().expect("healthy");
    arbiter.verify(&pair(), Generation(1), "b").expect("reachable");
    assert_eq!(arbiter.claim(&pair(), Generation(1), "a").expect("reachable"), Claim::Won);
    cluster.launch(0).expect("started");
    cluster.kill(1).expect("it ran");
    cluster.wait_until_healthy().expect("healthy");
    let lost = arbiter.claim(&pair(), Generation(1), "b").expect("reachable");
    assert_eq!(lost, Claim::Lost { by: "a".into() });
}

#[test]
fn a_silent_member_delays_nothing() {
    let Some(cluster) = cluster("a silent etcd", 3) else { return };
    let arbiter = announced(&cluster.url(), 1);
    cluster.freeze(0).expect("it ran");
    // If it led, the others choose another leader; a member of the majority answers this.
    let rest = format!("etcd:{}", cluster.endpoints()[1..].join(","));
    while self::arbiter(&rest).verify(&pair(), Generation(1), "b").is_err() {}
    let asked = Instant::now();
    assert_eq!(arbiter.claim(&pair(), Generation(1), "a").expect("reachable"), Claim::Won);
    assert!(asked.elapsed() < PROMPT, "took {:?}", asked.elapsed());
    cluster.thaw(0).expect("frozen");
    let first = format!("etcd:{}", cluster.endpoints()[0]);
    // What it was asked while it was frozen has changed nothing.
    let answer = loop {
        if let Ok(answer) = self::arbiter(&first).claim(&pair(), Generation(1), "b") {
            break answer;
        }
    };
    assert_eq!(answer, Claim::Lost { by: "a".into() });
}

#[test]
fn a_member_without_a_majority_decides_nothing() {
    let Some(mut cluster) = cluster("etcd without a majority", 3) else { return };
    let arbiter = announced(&cluster.url(), 1);
    cluster.kill(0).expect("it ran");
    cluster.kill(1).expect("it ran");
    arbiter.claim(&pair(), Generation(1), "a").expect_err("one of three is no majority");
    arbiter.verify(&pair(), Generation(1), "a").expect_err("one of three is no majority");
    cluster.launch(0).expect("started");
    cluster.wait_until_healthy().expect("healthy");
    // Whether the question without an answer took effect in the end is for the record to say.
    let answers = ["b", "a"].map(|who| arbiter.claim(&pair(), Generation(1), who).expect("back"));
    let wins = answers.iter().filter(|answer| **answer == Claim::Won).count();
    assert_eq!(wins, 1, "{answers:?}");
}

#[test]
fn a_claim_survives_the_death_of_every_member() {
    let Some(mut cluster) = cluster("etcd restarted", 3) else { return };
    let arbiter = announced(&cluster.url(), 1);
    assert_eq!(arbiter.claim(&pair(), Generation(1), "a").expect("reachable"), Claim::Won);
    for member in 0..3 {
        cluster.kill(member).expect("it ran");
    }
    arbiter.claim(&pair(), Generation(1), "b").expect_err("nobody is there");
    for member in 0..3 {
        cluster.launch(member).expect("started");
    }
    cluster.wait_until_healthy().expect("healthy");
    let lost = arbiter.claim(&pair(), Generation(1), "b").expect("back");
    assert_eq!(lost, Claim::Lost { by: "a".into() });
}

#[test]
fn two_clusters_are_no_arbiter() {
    let Some(one) = cluster("two etcd", 1) else { return };
    let other = Cluster::start(1).expect("a cluster");
    let both = format!("{},{}", one.url(), other.endpoints()[0]);
    let error = arbiter(&both).announce(&pair(), Generation(1), "a").expect_err("two clusters");
    assert!(text(error).contains("different clusters"));
    // Nor is one host's etcd for the one side and the other's for the other.
    let a = announced(&one.url(), 1);
    let error = arbiter(&other.url()).verify(&pair(), Generation(1), "b").expect_err("another");
    assert!(text(error).contains("was not announced"));
    assert_eq!(a.claim(&pair(), Generation(1), "a").expect("reachable"), Claim::Won);
    arbiter(&other.url()).claim(&pair(), Generation(1), "b").expect_err("not announced there");
}

/// Accepts connections, and answers each request with `answer`, or never.
fn pretender(answer: Option<Vec<u8>>) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let url = format!("etcd:{}", listener.local_addr().expect("bound"));
    std::thread::spawn(move || {
        let mut silent = Vec::new();
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            match &answer {
                None => silent.push(stream),
                Some(answer) => {
                    let _ = stream.read(&mut [0; 4096]);
                    // The client may hang up in the middle.
                    let _ = stream.write_all(answer);
                }
            }
        }
    });
    url
}

fn http(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

#[test]
fn garbage_is_no_answer() {
    let record = |text: &str| {
        use base64::Engine;
        let value = base64::prelude::BASE64_STANDARD.encode(text);
        let range = format!(r#"{{"kvs":[{{"value":"{value}"}}]}}"#);
        http(&format!(r#"{{"responses":[{{"response_range":{range}}}]}}"#))
    };
    let endless = format!("HTTP/1.1 200 OK\r\n\r\n{}", " ".repeat(10 << 20)).into_bytes();
    for answer in [
        b"".to_vec(),
        vec![0xff; 10_000],
        b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n".to_vec(),
        b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"
            .to_vec(),
        b"HTTP/1.1 503 Busy\r\ncontent-length: 19\r\n\r\n{\"error\":\"no space\"}".to_vec(),
        http(""),
        http("null"),
        http("[]"),
        http("{}"),
        http(r#"{"succeeded":"yes"}"#),
        http(r#"{"responses":[{"response_range":{"kvs":[{"value":"%"}]}}]}"#),
        http(&"[".repeat(50_000)),
        record("nonsense"),
        record(r#"{"generation":-1,"winner":null}"#),
        record(r#"{"generation":1}x"#),
        // Always as it was, never as it should be.
        record(r#"{"generation":1,"winner":null}"#),
        endless,
    ] {
        let url = pretender(Some(answer.clone()));
        let shown = String::from_utf8_lossy(&answer[..answer.len().min(200)]).into_owned();
        let error = arbiter(&url).claim(&pair(), Generation(1), "a").expect_err(&shown);
        assert!(!text(error).is_empty());
    }
}

#[test]
fn a_server_that_never_answers_is_given_up() {
    let url = pretender(None);
    let asked = Instant::now();
    let error = arbiter(&url).claim(&pair(), Generation(1), "a").expect_err("no answer");
    assert!(text(error).contains("in time"));
    assert!(asked.elapsed() < Duration::from_secs(10), "took {:?}", asked.elapsed());
}

#[test]
fn refusals_are_told_in_the_servers_words() {
    let body = r#"{"error":"etcdserver: mvcc: database space exceeded","code":8}"#;
    let answer = format!("HTTP/1.1 429 No\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let error = arbiter(&pretender(Some(answer.into_bytes())))
        .claim(&pair(), Generation(1), "a")
        .expect_err("refused");
    assert!(text(error).contains("database space exceeded"));
}
