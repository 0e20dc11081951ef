//! Asking the arbiter before anything depends on its answer: when protection is asked for.
//!
//! An arbiter hangs as long as its storage does. Here somebody waits for the answer, so it is asked on a
//! thread of its own and given up after [`PATIENCE`].

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use ft::{Arbiter, ArbiterUrl, Generation, PairId, Unreachable};

/// How long an operator, or a primary that waits for its backup to accept, is kept waiting.
const PATIENCE: Duration = Duration::from_secs(5);

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
    let arbiter: Arc<dyn Arbiter> = Arc::from(ft::arbiter::open(url));
    let (sender, answer) = channel();
    let asked = Arc::clone(&arbiter);
    std::thread::Builder::new()
        .name("arbiter".into())
        .spawn(move || {
            // Nobody listens any more if it took too long.
            let _ = sender.send(question(&*asked));
        })
        .map_err(|error| format!("cannot start a thread: {error}"))?;
    match answer.recv_timeout(PATIENCE) {
        Ok(Ok(())) => Ok(arbiter),
        Ok(Err(error)) => Err(describe(&error)),
        Err(_) => Err(format!("arbiter {url} has given no answer within {} s", PATIENCE.as_secs())),
    }
}

/// What failed, and why.
pub(super) fn describe(error: &Unreachable) -> String {
    format!("{error}: {}", error.source)
}

#[cfg(test)]
mod tests {
    use super::*;

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
