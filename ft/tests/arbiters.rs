//! What every arbiter must do, tried on `file:DIR`: by threads, and by processes that know nothing of
//! each other.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Barrier;

use ft::arbiter::{Arbiter, BadArbiter, open};
use ft::{Claim, Generation, PairId};

fn pair() -> PairId {
    PairId::new("vm-1").expect("a name")
}

fn file(dir: &Path) -> Box<dyn Arbiter> {
    open(&format!("file:{}", dir.display())).expect("a directory")
}

#[test]
fn the_first_wins_and_the_second_hears_by_whom() {
    let dir = tempfile::tempdir().expect("a directory");
    let arbiter = file(dir.path());
    let claim = |who| arbiter.claim(&pair(), Generation(1), who).expect("reachable");
    assert_eq!(claim("a"), Claim::Won);
    assert_eq!(claim("b"), Claim::Lost { by: "a".into() });
    assert_eq!(claim("a"), Claim::Won, "asking again changes nothing");
    assert_eq!(claim("b"), Claim::Lost { by: "a".into() });
}

#[test]
fn generations_and_pairs_are_apart() {
    let dir = tempfile::tempdir().expect("a directory");
    let arbiter = file(dir.path());
    let other = PairId::new("vm-2").expect("a name");
    let claim = |pair: &PairId, generation, who| {
        arbiter.claim(pair, Generation(generation), who).expect("reachable")
    };
    assert_eq!(claim(&pair(), 1, "a"), Claim::Won);
    assert_eq!(claim(&pair(), 2, "b"), Claim::Won);
    assert_eq!(claim(&other, 1, "b"), Claim::Won);
}

#[test]
fn one_of_many_threads_wins() {
    for round in 0..20 {
        let dir = tempfile::tempdir().expect("a directory");
        let barrier = Barrier::new(8);
        let winners: usize = std::thread::scope(|scope| {
            let claims: Vec<_> = (0..8)
                .map(|n| {
                    let (barrier, dir) = (&barrier, dir.path());
                    scope.spawn(move || {
                        let arbiter = file(dir);
                        barrier.wait();
                        arbiter.claim(&pair(), Generation(1), &format!("thread {n}"))
                    })
                })
                .collect();
            let answers = claims.into_iter().map(|claim| claim.join().expect("no panic"));
            answers.filter(|answer| matches!(answer, Ok(Claim::Won))).count()
        });
        assert_eq!(winners, 1, "round {round}");
        let files = std::fs::read_dir(dir.path()).expect("readable").count();
        assert_eq!(files, 1, "nothing but the claim is left");
    }
}

/// Not a test by itself: what [`one_of_many_processes_wins`] runs in each process.
#[test]
fn process_of_a_race() {
    let Ok(dir) = std::env::var("DYAD_ARBITER_RACE_DIR") else { return };
    let who = format!("process {}", std::process::id());
    let arbiter = file(Path::new(&dir));
    // The others are started by now, or soon will be: race for many generations.
    for generation in 1..=50 {
        match arbiter.claim(&pair(), Generation(generation), &who).expect("reachable") {
            Claim::Won => println!("won {generation}"),
            Claim::Lost { by } => assert_ne!(by, who),
        }
    }
}

#[test]
fn one_of_many_processes_wins() {
    let dir = tempfile::tempdir().expect("a directory");
    let program = std::env::current_exe().expect("this program");
    let children: Vec<_> = (0..4)
        .map(|_| {
            Command::new(&program)
                .args(["--exact", "process_of_a_race", "--nocapture"])
                .env("DYAD_ARBITER_RACE_DIR", dir.path())
                .stdout(Stdio::piped())
                .spawn()
                .expect("a process")
        })
        .collect();
    let mut wins = vec![0; 51];
    for child in children {
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success());
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            if let Some((_, generation)) = line.split_once("won ") {
                wins[generation.parse::<usize>().expect("a number")] += 1;
            }
        }
    }
    assert!(wins[1..].iter().all(|wins| *wins == 1), "{wins:?}");
}

#[test]
fn a_claimant_that_died_before_the_answer_has_won() {
    let dir = tempfile::tempdir().expect("a directory");
    // What a crash between the two leaves behind: the claim, and the file it was linked from.
    std::fs::write(dir.path().join("vm-1.1.claim"), "dead").expect("written");
    std::fs::write(dir.path().join(".vm-1.1.claim.123.0"), "dead").expect("written");
    let arbiter = file(dir.path());
    let claim = |who| arbiter.claim(&pair(), Generation(1), who).expect("reachable");
    assert_eq!(claim("other"), Claim::Lost { by: "dead".into() });
    assert_eq!(claim("dead"), Claim::Won);
}

#[test]
fn an_arbiter_out_of_reach_says_so_and_recovers() {
    let dir = tempfile::tempdir().expect("a directory");
    let shared = dir.path().join("shared");
    std::fs::create_dir(&shared).expect("made");
    let arbiter = file(&shared);
    let away = dir.path().join("away");
    std::fs::rename(&shared, &away).expect("moved");
    let error = arbiter.claim(&pair(), Generation(1), "a").expect_err("it is away");
    assert!(error.to_string().contains(&shared.display().to_string()), "{error}");
    std::fs::rename(&away, &shared).expect("moved");
    assert_eq!(arbiter.claim(&pair(), Generation(1), "a").expect("back"), Claim::Won);
}

#[test]
fn bad_urls_are_refused() {
    let refused = |url| open(url).err().expect("refused");
    assert!(matches!(refused("dir:/tmp"), BadArbiter::Unknown { .. }));
    assert!(matches!(refused(""), BadArbiter::Unknown { .. }));
    assert!(matches!(refused("file:relative"), BadArbiter::NotAbsolute { .. }));
    assert!(matches!(refused("file:/no/such/dir"), BadArbiter::NoDirectory { .. }));
    let here = std::env::current_exe().expect("this program");
    let url = format!("file:{}", here.display());
    assert!(matches!(refused(&url), BadArbiter::NoDirectory { .. }));
}

#[test]
fn names_of_pairs_are_checked() {
    for bad in ["", "../up", "a b", "a/b", &"x".repeat(65)] {
        assert!(PairId::new(bad).is_err(), "{bad:?}");
    }
    assert!(PairId::new("VM_1-a").is_ok());
}
