//! Threads for questions to servers. Nobody waits for them at the end, since servers take their time; one that has nothing to
//! do takes the next question, since new threads cost more than most questions.

use std::io;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};

/// What a thread does.
type Job = Box<dyn FnOnce() + Send>;

/// A thread ends when it had nothing to do for so long.
const PATIENCE: Duration = Duration::from_secs(5);

/// Threads, as many as have been needed at once lately. When this is dropped, they end.
pub(crate) struct Crew {
    send: Sender<Job>,
    receive: Receiver<Job>,
}

impl Crew {
    /// Nobody yet.
    pub(crate) fn new() -> Self {
        // Without room: what is sent is taken by a thread that waits for it.
        let (send, receive) = crossbeam_channel::bounded(0);
        Self { send, receive }
    }

    /// Has it done on some thread.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let Err(refused) = self.send.try_send(Box::new(job)) else { return Ok(()) };
        let (job, receive) = (refused.into_inner(), self.receive.clone());
        let work = move || {
            job();
            while let Ok(job) = receive.recv_timeout(PATIENCE) {
                job();
            }
        };
        std::thread::Builder::new().name("lookup".to_owned()).spawn(work).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_done_and_threads_are_used_again() {
        let crew = Crew::new();
        let (tell, told) = crossbeam_channel::unbounded();
        for _ in 0..20 {
            let first = tell.clone();
            crew.run(move || first.send(std::thread::current().id()).unwrap()).unwrap();
            // Then it waits for more.
            let done = told.recv().unwrap();
            std::thread::sleep(Duration::from_millis(20));
            let tell = tell.clone();
            crew.run(move || tell.send(std::thread::current().id()).unwrap()).unwrap();
            if told.recv().unwrap() == done {
                return;
            }
        }
        panic!("no thread was used twice");
    }

    #[test]
    fn who_is_busy_is_not_waited_for() {
        let crew = Crew::new();
        let (go, wait) = crossbeam_channel::bounded::<()>(0);
        let (tell, told) = crossbeam_channel::unbounded();
        for n in 0..10 {
            let (wait, tell) = (wait.clone(), tell.clone());
            crew.run(move || {
                // Until all of them are there.
                let _ = wait.recv();
                tell.send(n).unwrap();
            })
            .unwrap();
        }
        assert!(told.is_empty());
        drop(go);
        let mut all: Vec<i32> = (0..10).map(|_| told.recv().unwrap()).collect();
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
    }
}
