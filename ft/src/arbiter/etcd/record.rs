//! What etcd keeps of a pair, and what follows from it.
//!
//! One record holds the newest generation announced and who has won its end. It only moves forwards:
//!
//! ```text
//!  nothing ─announce g─▶ {g, nobody} ─claim g by w─▶ {g, w} ─announce g+1─▶ {g+1, nobody} ─▶ ...
//!                             └────────── announce g+1 (g ended by consent) ──────▲
//! ```
//!
//! So one key per pair is enough for ever, and whoever asks for an old generation, however late, has lost.
//! A record of a generation is never made twice alike: `{g, nobody}` that is still there has never been
//! anything else, which is why comparing its bytes is comparing its history.

use serde::{Deserialize, Serialize};

use super::super::Claim;
use crate::Generation;

/// The value of a pair's key, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The newest generation announced.
    pub generation: Generation,
    /// Who has won its end.
    pub winner: Option<String>,
}

/// What is to be done about a wish, given the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Next<T> {
    /// This is the answer.
    Answer(T),
    /// Replace the record by this one if it is still the same; then look again.
    Replace(Record),
    /// The generation was never announced here.
    NotAnnounced,
}

/// What became of an announcement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Announced {
    Yes,
    /// The generation is over.
    Ended {
        by: String,
    },
}

impl Record {
    pub(super) fn announced(generation: Generation) -> Self {
        Self { generation, winner: None }
    }

    pub(super) fn won(generation: Generation, who: &str) -> Self {
        Self { generation, winner: Some(who.to_owned()) }
    }

    /// Who has the end of a generation that this record says is over.
    fn successor(&self) -> String {
        let begun = || format!("the side that began generation {}", self.generation);
        self.winner.clone().unwrap_or_else(begun)
    }
}

/// To announce `generation`.
pub(super) fn announce(record: Option<&Record>, generation: Generation) -> Next<Announced> {
    match record {
        Some(record) if record.generation == generation && record.winner.is_none() => {
            Next::Answer(Announced::Yes)
        }
        Some(record) if record.generation >= generation => {
            Next::Answer(Announced::Ended { by: record.successor() })
        }
        Some(_) | None => Next::Replace(Record::announced(generation)),
    }
}

/// To claim the end of `generation`.
pub(super) fn claim(record: Option<&Record>, generation: Generation, who: &str) -> Next<Claim> {
    match record {
        Some(record) if record.generation == generation => match &record.winner {
            None => Next::Replace(Record::won(generation, who)),
            Some(winner) if winner == who => Next::Answer(Claim::Won),
            Some(winner) => Next::Answer(Claim::Lost { by: winner.clone() }),
        },
        Some(record) if record.generation > generation => {
            Next::Answer(Claim::Lost { by: record.successor() })
        }
        Some(_) | None => Next::NotAnnounced,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: Generation = Generation(7);

    #[test]
    fn an_announced_generation_is_won_once() {
        let open = Record::announced(G);
        assert_eq!(claim(Some(&open), G, "a"), Next::Replace(Record::won(G, "a")));
        let won = Record::won(G, "a");
        assert_eq!(claim(Some(&won), G, "a"), Next::Answer(Claim::Won));
        let lost = Next::Answer(Claim::Lost { by: "a".into() });
        assert_eq!(claim(Some(&won), G, "b"), lost);
    }

    #[test]
    fn an_old_generation_is_lost_for_ever_even_to_its_winner() {
        for record in [Record::announced(Generation(8)), Record::won(Generation(8), "a")] {
            for who in ["a", "b"] {
                let answer = claim(Some(&record), G, who);
                assert!(matches!(answer, Next::Answer(Claim::Lost { .. })), "{answer:?}");
            }
            let answer = announce(Some(&record), G);
            assert!(matches!(answer, Next::Answer(Announced::Ended { .. })), "{answer:?}");
        }
    }

    #[test]
    fn what_was_not_announced_cannot_be_claimed() {
        assert_eq!(claim(None, G, "a"), Next::NotAnnounced);
        assert_eq!(claim(Some(&Record::won(Generation(6), "a")), G, "a"), Next::NotAnnounced);
    }

    #[test]
    fn announcing_moves_forwards_only() {
        let open = Record::announced(G);
        assert_eq!(announce(None, G), Next::Replace(open.clone()));
        assert_eq!(
            announce(Some(&Record::won(Generation(6), "a")), G),
            Next::Replace(open.clone())
        );
        assert_eq!(announce(Some(&open), G), Next::Answer(Announced::Yes));
        let ended = Next::Answer(Announced::Ended { by: "b".into() });
        assert_eq!(announce(Some(&Record::won(G, "b")), G), ended);
    }
}
