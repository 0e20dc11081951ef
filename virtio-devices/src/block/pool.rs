//! I/O by threads that make one system call after another: what there is where the kernel has no `io_uring` for us.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::engine::{Engine, Outcome};
use super::image::Image;
use super::job::Job;
use crate::poll::Bell;

/// Requests the host works on at a time.
const THREADS: usize = 8;

pub(super) struct Pool {
    jobs: Sender<Job>,
    done: Receiver<(Job, Outcome)>,
    under_way: usize,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub fn start(image: &Arc<Image>, bell: &Arc<Bell>) -> io::Result<Self> {
        let (jobs, waiting) = unbounded();
        let (finished, done) = unbounded();
        let mut pool = Self { jobs, done, under_way: 0, threads: Vec::new() };
        for _ in 0..THREADS {
            let (image, bell) = (Arc::clone(image), Arc::clone(bell));
            let (waiting, finished) = (Receiver::clone(&waiting), Sender::clone(&finished));
            let work = move || {
                for mut job in waiting {
                    let outcome = execute(&image, &mut job);
                    if finished.send((job, outcome)).is_err() {
                        return;
                    }
                    bell.ring();
                }
            };
            let builder = std::thread::Builder::new().name("disk-io".into());
            pool.threads.push(builder.spawn(work)?);
        }
        Ok(pool)
    }
}

/// Asks for leave on the thread that makes the call: a job may have waited for this thread.
fn execute(image: &Image, job: &mut Job) -> Outcome {
    if !image.valve.enter(1) {
        return Outcome::Refused;
    }
    let result = image.perform(job.io());
    image.step_done(job);
    image.valve.leave(1);
    Outcome::Done(result)
}

impl Engine for Pool {
    fn room(&self) -> usize {
        THREADS - self.under_way
    }

    fn under_way(&self) -> usize {
        self.under_way
    }

    fn begin(&mut self, jobs: Vec<Job>) {
        for job in jobs {
            self.under_way += 1;
            // The threads hold the other end as long as this one is there.
            let _ = self.jobs.send(job);
        }
    }

    fn finished(&mut self, into: &mut Vec<(Job, Outcome)>) {
        let before = into.len();
        into.extend(self.done.try_iter());
        self.under_way -= into.len() - before;
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let (closed, _) = unbounded();
        self.jobs = closed;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of a disk's back half panicked");
            }
        }
    }
}
