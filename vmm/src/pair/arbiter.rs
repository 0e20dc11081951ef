//! Asking the arbiter, which hangs as long as its storage does.
//!
//! Every question is asked on a thread of its own. Somebody who waits for the answer gives up after [`PATIENCE`];
//! the thread stays until the storage lets it go. What must hold: however often it is asked, an arbiter that
//! never answers holds one such thread, see [`OneQuestion`].

use std::collections::BTreeSet;
use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ft::{Arbiter, ArbiterUrl, Claim, Generation, PairId, Unreachable};

/// How long an operator, or a primary that waits for its backup to accept, is kept waiting.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a question waits for the answer to the one before; well within [`PATIENCE`].
const TURN: Duration = Duration::from_secs(1);
/// While so many arbiters owe an answer, others are asked for claims only: a peer names arbiters too.
const MAX_UNANSWERED: usize = 16;

/// Announces that this process lives in `generation` and looks for a backup; see
/// [`Arbiter::announce`].
pub fn announce(
    url: &ArbiterUrl,
    pair: &PairId,
    generation: Generation,
    who: &str,
) -> Result<Arc<dyn Arbiter>, String> {
    let (pair, who) = (pair.clone(), who.to_owned());
    ask(url, move |arbiter| arbiter.announce(&pair, generation, &who))
}

/// Makes sure that this process could claim the end of `generation`; see [`Arbiter::verify`].
pub fn verify(
    url: &str,
    pair: &PairId,
    generation: Generation,
    who: &str,
) -> Result<Arc<dyn Arbiter>, String> {
    let url = url.parse().map_err(|error: ft::BadArbiter| error.to_string())?;
    let (pair, who) = (pair.clone(), who.to_owned());
    ask(&url, move |arbiter| arbiter.verify(&pair, generation, &who))
}

fn ask(
    url: &ArbiterUrl,
    question: impl FnOnce(&dyn Arbiter) -> Result<(), Unreachable> + Send + 'static,
) -> Result<Arc<dyn Arbiter>, String> {
    let arbiter = Arc::new(OneQuestion::of(url.to_string(), ft::arbiter::open(url)));
    ask_patiently(arbiter, PATIENCE, question)
}

fn ask_patiently(
    arbiter: Arc<OneQuestion>,
    patience: Duration,
    question: impl FnOnce(&dyn Arbiter) -> Result<(), Unreachable> + Send + 'static,
) -> Result<Arc<dyn Arbiter>, String> {
    let (sender, answer) = channel();
    let asked = Arc::clone(&arbiter);
    std::thread::Builder::new()
        .name("arbiter".into())
        .spawn(move || {
            // Nobody listens any more if it took too long.
            let _ = sender.send(question(&*asked));
        })
        .map_err(|error| format!("cannot start a thread: {error}"))?;
    match answer.recv_timeout(patience) {
        Ok(Ok(())) => Ok(arbiter),
        Ok(Err(error)) => Err(describe(&error)),
        Err(_) => {
            let (url, seconds) = (&arbiter.url, patience.as_secs_f32());
            Err(format!("arbiter {url} has given no answer within {seconds} s"))
        }
    }
}

/// An arbiter of which this process asks one thing at a time. Who asks while it owes an answer is told so after
/// [`TURN`], and asks again later as with any arbiter out of reach.
struct OneQuestion {
    url: String,
    turn: Duration,
    inner: Box<dyn Arbiter>,
}

/// By URL: each question comes with an [`OneQuestion`] of its own.
struct Unanswered {
    urls: Mutex<BTreeSet<String>>,
    answered: Condvar,
}

static UNANSWERED: Unanswered =
    Unanswered { urls: Mutex::new(BTreeSet::new()), answered: Condvar::new() };

impl Unanswered {
    fn urls(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.urls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// While it exists, nobody else asks the arbiter.
struct Turn<'a>(&'a str);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        UNANSWERED.urls().remove(self.0);
        UNANSWERED.answered.notify_all();
    }
}

impl OneQuestion {
    fn of(url: String, inner: Box<dyn Arbiter>) -> Self {
        Self { url, turn: TURN, inner }
    }

    fn turn(&self, most: usize) -> Result<Turn<'_>, Unreachable> {
        let busy = |urls: &mut BTreeSet<String>| urls.contains(&self.url);
        let (urls, answered) = (UNANSWERED.urls(), &UNANSWERED.answered);
        let waited = answered.wait_timeout_while(urls, self.turn, busy);
        let (mut urls, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let refused = |why: String| Unreachable {
            arbiter: self.url.clone(),
            step: "ask it".into(),
            source: io::Error::new(io::ErrorKind::WouldBlock, why),
        };
        if busy(&mut urls) {
            return Err(refused("still waiting for the last answer".into()));
        }
        if urls.len() >= most {
            return Err(refused(format!("{most} others have not answered")));
        }
        urls.insert(self.url.clone());
        Ok(Turn(&self.url))
    }
}

impl Arbiter for OneQuestion {
    fn announce(&self, pair: &PairId, at: Generation, who: &str) -> Result<(), Unreachable> {
        let _turn = self.turn(MAX_UNANSWERED)?;
        self.inner.announce(pair, at, who)
    }

    fn verify(&self, pair: &PairId, at: Generation, who: &str) -> Result<(), Unreachable> {
        let _turn = self.turn(MAX_UNANSWERED)?;
        self.inner.verify(pair, at, who)
    }

    fn claim(&self, pair: &PairId, at: Generation, who: &str) -> Result<Claim, Unreachable> {
        let _turn = self.turn(usize::MAX)?;
        self.inner.claim(pair, at, who)
    }
}

/// What failed, and why.
pub(super) fn describe(error: &Unreachable) -> String {
    format!("{error}: {}", error.source)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Answers when it is told to, and counts who waits for that.
    #[derive(Default)]
    struct Hung {
        waiting: AtomicUsize,
        most: AtomicUsize,
        released: Mutex<bool>,
        release: Condvar,
    }

    impl Hung {
        fn hang(&self) {
            let waiting = self.waiting.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(waiting, Ordering::SeqCst);
            let released = self.released.lock().unwrap();
            drop(self.release.wait_while(released, |released| !*released).unwrap());
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }

    struct Handle(Arc<Hung>);

    impl Arbiter for Handle {
        fn announce(&self, _: &PairId, _: Generation, _: &str) -> Result<(), Unreachable> {
            self.0.hang();
            Ok(())
        }

        fn verify(&self, _: &PairId, _: Generation, _: &str) -> Result<(), Unreachable> {
            self.0.hang();
            Ok(())
        }

        fn claim(&self, _: &PairId, _: Generation, _: &str) -> Result<Claim, Unreachable> {
            self.0.hang();
            Ok(Claim::Won)
        }
    }

    #[test]
    fn an_arbiter_that_never_answers_holds_one_thread_however_often_it_is_asked() {
        let hung = Arc::new(Hung::default());
        let pair = PairId::new("vm-1").unwrap();
        let arbiter = || {
            let inner = Box::new(Handle(Arc::clone(&hung)));
            let arbiter = OneQuestion::of("file:/hung".into(), inner);
            Arc::new(OneQuestion { turn: Duration::from_millis(1), ..arbiter })
        };
        let verify = |patience| {
            let pair = pair.clone();
            let question = move |arbiter: &dyn Arbiter| arbiter.verify(&pair, Generation(1), "b");
            ask_patiently(arbiter(), patience, question).err()
        };
        let refused = verify(Duration::from_millis(1)).unwrap();
        assert!(refused.contains("no answer within"), "{refused}");
        while hung.waiting.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        for _ in 0..20 {
            let refused = verify(PATIENCE).unwrap();
            assert!(refused.contains("still waiting for the last answer"), "{refused}");
            // A claim, which is never given up, is answered too, and so asked again.
            let (answer, answered) = channel();
            let claimed = move |result| {
                let _ = answer.send(result);
            };
            super::super::claim(arbiter(), pair.clone(), Generation(1), "b".into(), claimed);
            let refused = answered.recv().unwrap().unwrap_err();
            assert!(refused.contains("still waiting for the last answer"), "{refused}");
        }
        // Another arbiter is no worse for it.
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file:{}", dir.path().display()).parse().unwrap();
        announce(&url, &pair, Generation(1), "a").unwrap();
        *hung.released.lock().unwrap() = true;
        hung.release.notify_all();
        while UNANSWERED.urls().contains("file:/hung") {
            std::thread::yield_now();
        }
        assert_eq!(verify(PATIENCE), None, "it is asked again once it answers");
        assert_eq!(hung.most.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn what_was_announced_is_verified_and_what_was_not_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!("file:{}", dir.path().display());
        let url: ArbiterUrl = text.parse().unwrap();
        let pair = PairId::new("vm-1").unwrap();
        let refused = verify(&text, &pair, Generation(1), "b").err().unwrap();
        assert!(refused.contains("was not announced"), "{refused}");
        announce(&url, &pair, Generation(1), "a").unwrap();
        verify(&text, &pair, Generation(1), "b").unwrap();
        let refused = announce(&"file:/no/such".parse().unwrap(), &pair, Generation(1), "a");
        assert!(refused.err().unwrap().contains("/no/such"));
        let refused = verify("carrier-pigeon:", &pair, Generation(1), "b").err().unwrap();
        assert!(refused.contains("no known kind"), "{refused}");
    }
}
