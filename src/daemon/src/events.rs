//! What a connection has to tell its client while a request is being worked on.
//!
//! Messages come from everywhere (builds shared with other clients, imports on worker threads) and must never
//! make their senders wait for a client that does not read. The queue is bounded: when it is full, lines of
//! log are dropped and counted; what clients need to stay in step (starts and stops of activities) is not.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use nix_compat::worker::stderr::{ActivityKind, Message, ResultKind, Verbosity};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

/// Bytes of log lines that may wait for a client.
const MAX_WAITING: usize = 4 << 20;
/// What a message costs beside its text.
const OVERHEAD: usize = 64;

/// The queue between those who report and the connection that writes.
#[derive(Debug, Default)]
pub struct Events {
    state: Mutex<State>,
    news: Notify,
    taken: Notify,
}

#[derive(Debug)]
struct State {
    waiting: VecDeque<Message>,
    bytes: usize,
    dropped: usize,
    verbosity: Verbosity,
    /// Activities the client knows of: clients crash on news of others.
    started: HashSet<u64>,
    /// The client writes and does not read: whatever is sent to it now could block both ends.
    held: bool,
}

impl Default for State {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            bytes: 0,
            dropped: 0,
            verbosity: Verbosity::Info,
            started: HashSet::new(),
            held: false,
        }
    }
}

impl Events {
    /// An empty queue.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// From now on, messages above this level are not queued.
    pub fn set_verbosity(&self, verbosity: Verbosity) {
        self.state.lock().verbosity = verbosity;
    }

    /// Queues a line of log if the client wants to see its level.
    pub fn log(&self, level: Verbosity, line: impl Into<String>) {
        if level <= self.state.lock().verbosity {
            self.push(Message::Next((line.into() + "\n").into_bytes()));
        }
    }

    /// Queues any message.
    pub fn push(&self, message: Message) {
        let mut state = self.state.lock();
        let expected = match &message {
            Message::StopActivity(id) => state.started.remove(id),
            Message::Result { id, .. } => state.started.contains(id),
            _ => true,
        };
        if !expected {
            return;
        }
        let cost = OVERHEAD + text_len(&message);
        if state.bytes + cost > MAX_WAITING && is_log(&message) {
            state.dropped += 1;
            return;
        }
        if let Message::StartActivity { id, .. } = &message {
            state.started.insert(*id);
        }
        state.bytes += cost;
        state.waiting.push_back(message);
        drop(state);
        self.news.notify_one();
    }

    /// Queues a piece of a large answer, once there is room for it.
    pub async fn push_data(&self, message: Message) {
        loop {
            let taken = self.taken.notified();
            if self.state.lock().bytes < MAX_WAITING / 2 {
                break;
            }
            taken.await;
        }
        self.push(message);
    }

    /// Takes everything that waits, in order.
    pub fn take(&self) -> Vec<Message> {
        let state = self.state.lock();
        self.take_from(state)
    }

    /// The same at the end of a request: every activity that is still open is stopped.
    pub fn take_last(&self) -> Vec<Message> {
        let mut state = self.state.lock();
        let State { started, waiting, .. } = &mut *state;
        waiting.extend(started.drain().map(Message::StopActivity));
        self.take_from(state)
    }

    fn take_from(&self, mut state: MutexGuard<'_, State>) -> Vec<Message> {
        state.bytes = 0;
        self.taken.notify_one();
        let mut messages: Vec<Message> = state.waiting.drain(..).collect();
        let dropped = std::mem::take(&mut state.dropped);
        if dropped > 0 {
            let note = format!("({dropped} lines of log were left out because they were not read fast enough)\n");
            messages.push(Message::Next(note.into_bytes()));
        }
        messages
    }

    /// Waits until there is something to take.
    pub async fn wait(&self) {
        loop {
            {
                let state = self.state.lock();
                if !state.held && !state.waiting.is_empty() {
                    return;
                }
            }
            self.news.notified().await;
        }
    }

    /// Holds messages back until [`Events::release`].
    pub fn hold(&self) {
        self.state.lock().held = true;
    }

    /// Lets messages through again.
    pub fn release(&self) {
        self.state.lock().held = false;
        self.news.notify_one();
    }
}

impl build::Events for Events {
    fn emit(&self, message: Message) {
        self.push(message);
    }

    fn log(&self, level: Verbosity, line: &str) {
        Events::log(self, level, line);
    }
}

fn is_log(message: &Message) -> bool {
    match message {
        Message::Next(_) => true,
        // Builders make these, as many as they like.
        Message::Result { kind, .. } => *kind != ResultKind::SetExpected,
        Message::StartActivity { kind, .. } => *kind == ActivityKind::FileTransfer,
        _ => false,
    }
}

fn text_len(message: &Message) -> usize {
    use nix_compat::worker::stderr::Field;
    let fields_len =
        |fields: &[Field]| fields.iter().map(|f| if let Field::Text(text) = f { text.len() } else { 8 }).sum::<usize>();
    match message {
        Message::Next(text) | Message::Write(text) => text.len(),
        Message::StartActivity { text, fields, .. } => text.len() + fields_len(fields),
        Message::Result { fields, .. } => fields_len(fields),
        Message::Error(error) => error.message.len(),
        Message::Read(_) | Message::Last | Message::StopActivity(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_of_unknown_activities_is_not_passed_on() {
        let events = Events::new();
        events.push(Message::StopActivity(7));
        events.push(Message::Result { id: 7, kind: ResultKind::Progress, fields: Vec::new() });
        assert!(events.take().is_empty());
    }

    #[test]
    fn a_client_that_does_not_read_costs_bounded_memory() {
        let events = Events::new();
        for _ in 0..200_000 {
            events.log(Verbosity::Info, "x".repeat(100));
        }
        let messages = events.take();
        let bytes: usize = messages.iter().map(text_len).sum();
        assert!(bytes < MAX_WAITING);
        let Some(Message::Next(last)) = messages.last() else { panic!() };
        assert!(String::from_utf8_lossy(last).contains("left out"));
    }

    #[test]
    fn neither_do_downloads_that_builders_pretend_to_make() {
        let events = Events::new();
        for id in 0..200_000 {
            let (kind, text) = (ActivityKind::FileTransfer, vec![b'x'; 100]);
            let (level, fields) = (Verbosity::Info, Vec::new());
            events.push(Message::StartActivity { id, level, kind, text, fields, parent: 0 });
            events.push(Message::StopActivity(id));
        }
        let messages = events.take();
        assert!(messages.len() < 2 * MAX_WAITING / (OVERHEAD + 100) + 1, "{}", messages.len());
        assert_eq!(messages.len() % 2, 1, "what was started was stopped, and there is a note");
    }

    #[test]
    fn messages_above_the_verbosity_are_not_sent() {
        let events = Events::new();
        events.set_verbosity(Verbosity::Warn);
        events.log(Verbosity::Info, "not this");
        events.log(Verbosity::Warn, "but this");
        assert_eq!(events.take(), vec![Message::Next(b"but this\n".to_vec())]);
    }
}
