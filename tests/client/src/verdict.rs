//! The client's memory held against the disk.

use crate::load::Acknowledged;
use ledger_service::ledger::Contents;
use serde::Serialize;
use std::collections::HashMap;

/// What the ledger on the disk makes of the answers a client got.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Requests the client got an answer to.
    pub acknowledged: usize,
    /// Acknowledged requests whose text is not in the ledger under the number the answer gave.
    pub lost: usize,
    /// Requests in the ledger more than once.
    pub repeated: usize,
    /// Neighbouring acknowledged requests of one connection in the wrong order in the ledger.
    pub out_of_order: usize,
    /// Lines in the ledger that no answer was seen for: a request under way when its load ended.
    pub unanswered: usize,
}

impl Verdict {
    /// Compares everything a client was told with everything the disk holds.
    #[must_use]
    pub fn of(answers: &[Acknowledged], contents: &Contents) -> Self {
        let mut lines: HashMap<&str, usize> = HashMap::new();
        for text in &contents.texts {
            *lines.entry(text).or_default() += 1;
        }
        let mut last: HashMap<&str, u64> = HashMap::new();
        let mut verdict = Self { acknowledged: answers.len(), ..Self::default() };
        for answer in answers {
            let at = usize::try_from(answer.number - 1).ok();
            if at.and_then(|at| contents.texts.get(at)) != Some(&answer.text) {
                verdict.lost += 1;
            }
            let connection = answer.text.split(' ').next().unwrap_or_default();
            if last.insert(connection, answer.number).is_some_and(|before| before >= answer.number)
            {
                verdict.out_of_order += 1;
            }
        }
        verdict.repeated = lines.values().filter(|&&count| count > 1).count();
        for answer in answers {
            lines.remove(answer.text.as_str());
        }
        verdict.unanswered = lines.len();
        verdict
    }

    /// Whether nothing was lost, repeated or put out of order.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.lost == 0 && self.repeated == 0 && self.out_of_order == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn answers(numbered: &[(&str, u64)]) -> Vec<Acknowledged> {
        let now = Instant::now();
        let one = |&(text, number): &(&str, u64)| Acknowledged {
            text: text.to_owned(),
            number,
            sent: now,
            answered: now,
        };
        numbered.iter().map(one).collect()
    }

    fn verdict(numbered: &[(&str, u64)], ledger: &str) -> Verdict {
        Verdict::of(&answers(numbered), &ledger_service::ledger::scan(ledger.as_bytes()).unwrap())
    }

    #[test]
    fn what_was_acknowledged_must_be_there() {
        let good = verdict(&[("c-0 1", 1), ("c-0 2", 2)], "1 c-0 1\n2 c-0 2\n3 c-0 3\n");
        assert!(good.is_clean());
        assert_eq!((good.acknowledged, good.unanswered), (2, 1));
    }

    #[test]
    fn loss_repetition_and_order_are_told_apart() {
        let lost = verdict(&[("c-0 1", 1), ("c-0 2", 2)], "1 c-0 1\n");
        assert_eq!((lost.lost, lost.repeated, lost.out_of_order), (1, 0, 0));
        let moved = verdict(&[("c-0 1", 1)], "1 other\n2 c-0 1\n");
        assert_eq!(moved.lost, 1);
        let repeated = verdict(&[("c-0 1", 1)], "1 c-0 1\n2 c-0 1\n");
        assert_eq!((repeated.lost, repeated.repeated), (0, 1));
        let swapped = verdict(&[("c-0 1", 2), ("c-0 2", 1)], "1 c-0 2\n2 c-0 1\n");
        assert_eq!((swapped.lost, swapped.out_of_order), (0, 1));
        assert!(![lost, moved, repeated, swapped].iter().any(Verdict::is_clean));
    }
}
