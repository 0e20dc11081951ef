//! The tests that every arbiter passes.

use std::process::{Command, Stdio};
use std::sync::Barrier;

use ft::{Claim, Generation, PairId};

use super::{announced, arbiter, pair, text};

/// An arbiter of one kind, with nothing in it.
pub trait Place {
    fn url(&self) -> String;
    /// Nobody reaches it any more.
    fn take_away(&mut self);
    /// It is reached again, with what was in it.
    fn bring_back(&mut self);
}

pub fn the_first_wins_and_the_second_hears_by_whom(place: impl Place) {
    let arbiter = announced(&place.url(), 1);
    let claim = |who| arbiter.claim(&pair(), Generation(1), who).expect("reachable");
    assert_eq!(claim("a"), Claim::Won);
    assert_eq!(claim("b"), Claim::Lost { by: "a".into() });
    assert_eq!(claim("a"), Claim::Won, "asking again changes nothing");
    assert_eq!(claim("b"), Claim::Lost { by: "a".into() });
}

pub fn generations_and_pairs_are_apart(place: impl Place) {
    let arbiter = arbiter(&place.url());
    let other = PairId::new("vm-2").expect("a name");
    let claim = |pair: &PairId, generation, who| {
        arbiter.announce(pair, Generation(generation), who).expect("reachable");
        arbiter.claim(pair, Generation(generation), who).expect("reachable")
    };
    assert_eq!(claim(&pair(), 1, "a"), Claim::Won);
    assert_eq!(claim(&pair(), 2, "b"), Claim::Won);
    assert_eq!(claim(&other, 1, "b"), Claim::Won);
}

pub fn who_comes_late_has_lost_for_ever(place: impl Place) {
    // 1 ends by a claim, 2 by agreement, 3 is the present.
    let arbiter = announced(&place.url(), 1);
    assert_eq!(arbiter.claim(&pair(), Generation(1), "a").expect("reachable"), Claim::Won);
    for generation in [2, 3] {
        arbiter.announce(&pair(), Generation(generation), "a").expect("reachable");
    }
    for generation in [1, 2] {
        for _ in 0..2 {
            let late = arbiter.claim(&pair(), Generation(generation), "thawed").expect("reachable");
            assert!(matches!(late, Claim::Lost { .. }), "{generation}: {late:?}");
        }
    }
    // That anybody asked for the past has not touched the present.
    assert_eq!(arbiter.claim(&pair(), Generation(3), "b").expect("reachable"), Claim::Won);
    let error = arbiter.announce(&pair(), Generation(3), "a").expect_err("it is over");
    assert!(text(error).contains("belongs to b"));
}

pub fn what_was_not_announced_decides_nothing(place: impl Place) {
    let arbiter = arbiter(&place.url());
    for generation in [1, 2] {
        let error = arbiter.claim(&pair(), Generation(generation), "a").expect_err("nothing there");
        assert!(text(error).contains("was not announced"));
        let error = arbiter.verify(&pair(), Generation(generation), "b").expect_err("nothing");
        assert!(text(error).contains("was not announced"));
        arbiter.announce(&pair(), Generation(generation), "a").expect("reachable");
        arbiter.announce(&pair(), Generation(generation), "a").expect("again");
        arbiter.verify(&pair(), Generation(generation), "b").expect("seen");
        assert_eq!(
            arbiter.claim(&pair(), Generation(generation), "a").expect("reachable"),
            Claim::Won
        );
    }
}

pub fn names_that_cannot_be_kept_are_refused(place: impl Place) {
    let arbiter = announced(&place.url(), 1);
    for who in ["", "two\nlines", &"x".repeat(2000)] {
        let error = arbiter.claim(&pair(), Generation(1), who).expect_err("refused");
        assert!(text(error).contains("one line"));
    }
    assert_eq!(arbiter.claim(&pair(), Generation(1), "a").expect("reachable"), Claim::Won);
}

pub fn one_of_many_threads_wins(place: impl Place) {
    for round in 1..=20 {
        announced(&place.url(), round);
        let barrier = Barrier::new(8);
        let winners: usize = std::thread::scope(|scope| {
            let claims: Vec<_> = (0..8)
                .map(|n| {
                    let (barrier, arbiter) = (&barrier, arbiter(&place.url()));
                    scope.spawn(move || {
                        barrier.wait();
                        arbiter.claim(&pair(), Generation(round), &format!("thread {n}"))
                    })
                })
                .collect();
            let answers =
                claims.into_iter().map(|claim| claim.join().expect("no panic").expect("reachable"));
            answers.filter(|answer| *answer == Claim::Won).count()
        });
        assert_eq!(winners, 1, "round {round}");
    }
}

/// How many generations processes race for.
const RACES: u64 = 40;
/// Tells a process that it is one of a race, and where.
const RACE: &str = "DYAD_ARBITER_RACE_URL";

/// Not a test by itself: what [`one_of_many_processes_wins`] runs in each process. One announces; all claim
/// what was announced, as fast as they can.
#[test]
fn process_of_a_race() {
    let Ok(url) = std::env::var(RACE) else { return };
    let who = format!("process {}", std::process::id());
    let arbiter = arbiter(&url);
    let mut generation = 1;
    while generation <= RACES {
        // Whoever is first announces; who comes later is told that it is so, or over.
        let _ = arbiter.announce(&pair(), Generation(generation), &who);
        match arbiter.claim(&pair(), Generation(generation), &who).expect("reachable") {
            Claim::Won => println!("won {generation}"),
            Claim::Lost { by } => assert_ne!(by, who),
        }
        generation += 1;
    }
}

pub fn one_of_many_processes_wins(place: impl Place) {
    let program = std::env::current_exe().expect("this program");
    let children: Vec<_> = (0..4)
        .map(|_| {
            Command::new(&program)
                .args(["--exact", "suite::process_of_a_race", "--nocapture"])
                .env(RACE, place.url())
                .stdout(Stdio::piped())
                .spawn()
                .expect("a process")
        })
        .collect();
    let mut wins = vec![0; RACES as usize + 1];
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

pub fn out_of_reach_it_says_so_and_nothing_is_forgotten(mut place: impl Place) {
    let arbiter = announced(&place.url(), 1);
    arbiter.announce(&PairId::new("vm-2").expect("a name"), Generation(1), "a").expect("reachable");
    assert_eq!(arbiter.claim(&pair(), Generation(1), "a").expect("reachable"), Claim::Won);
    place.take_away();
    for who in ["a", "b"] {
        let error = arbiter.claim(&pair(), Generation(1), who).expect_err("it is away");
        assert!(error.to_string().contains(&place.url()), "{error}");
        arbiter.announce(&pair(), Generation(2), who).expect_err("it is away");
        arbiter.verify(&pair(), Generation(1), who).expect_err("it is away");
    }
    place.bring_back();
    let claim = |who| arbiter.claim(&pair(), Generation(1), who).expect("back");
    assert_eq!(claim("b"), Claim::Lost { by: "a".into() });
    assert_eq!(claim("a"), Claim::Won);
    let other = PairId::new("vm-2").expect("a name");
    assert_eq!(arbiter.claim(&other, Generation(1), "b").expect("back"), Claim::Won);
}

/// Makes a test of each, given how to make a place; `None` skips.
#[macro_export]
macro_rules! arbiter_suite {
    ($place:expr) => {
        $crate::arbiter_suite!($place;
            the_first_wins_and_the_second_hears_by_whom,
            generations_and_pairs_are_apart,
            who_comes_late_has_lost_for_ever,
            what_was_not_announced_decides_nothing,
            names_that_cannot_be_kept_are_refused,
            one_of_many_threads_wins,
            one_of_many_processes_wins,
            out_of_reach_it_says_so_and_nothing_is_forgotten
        );
    };
    ($place:expr; $($name:ident),*) => {
        $(
            #[test]
            fn $name() {
                if let Some(place) = $place(stringify!($name)) {
                    $crate::suite::$name(place);
                }
            }
        )*
    };
}
