//! What every arbiter must do, tried on `file:DIR` and on etcd: by threads, and by processes that know
//! nothing of each other.

mod etcd;
mod file;
mod suite;
mod urls;

use ft::arbiter::{Arbiter, ArbiterUrl, open};
use ft::{Generation, PairId};

/// The pair most tests are about.
fn pair() -> PairId {
    PairId::new("vm-1").expect("a name")
}

fn arbiter(url: &str) -> Box<dyn Arbiter> {
    open(&url.parse::<ArbiterUrl>().expect("a URL"))
}

/// A fresh handle on the arbiter, with `generation` announced.
fn announced(url: &str, generation: u64) -> Box<dyn Arbiter> {
    let arbiter = arbiter(url);
    arbiter.announce(&pair(), Generation(generation), "announcer").expect("reachable");
    arbiter
}

/// Everything an operator would read.
fn text(error: ft::Unreachable) -> String {
    format!("{error}: {}", error.source)
}

#[test]
fn names_of_pairs_are_checked() {
    for bad in ["", "../up", "a b", "a/b", &"x".repeat(65)] {
        assert!(PairId::new(bad).is_err(), "{bad:?}");
    }
    assert!(PairId::new("VM_1-a").is_ok());
}
