//! The other end of the guest's console.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::guest::{Line, READY, Reply, read_line};

/// What the driver waits for.
pub enum Event {
    /// The agent listens.
    Ready,
    /// A reply.
    Reply(Reply),
    /// The console is of no more use, and why.
    Broken(String),
}

/// Lines kept; a guest that prints without end must not fill the host's memory.
const KEPT: usize = 5000;

/// The console's text, for people, as it grows.
#[derive(Clone, Default)]
pub struct Text(Arc<Mutex<VecDeque<String>>>);

impl Text {
    fn lines(&self) -> MutexGuard<'_, VecDeque<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: String) {
        let mut lines = self.lines();
        if lines.len() == KEPT {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// All of it.
    pub fn all(&self) -> String {
        self.tail(KEPT)
    }

    /// The last lines.
    pub fn tail(&self, count: usize) -> String {
        let lines = self.lines();
        let skip = lines.len().saturating_sub(count);
        lines.iter().skip(skip).map(|line| format!("  | {line}\n")).collect()
    }
}

/// Starts to read the guest's console and the program's standard error; what matters comes as events.
pub fn follow(
    console: impl Read + Send + 'static,
    errors: impl Read + Send + 'static,
) -> (Text, Receiver<Event>) {
    let text = Text::default();
    let (sender, events) = mpsc::channel();
    let (console_text, error_text) = (text.clone(), text.clone());
    thread::spawn(move || {
        let why = read_console(BufReader::new(console), &console_text, &sender);
        // If nobody listens any more the virtual machine is being dropped.
        let _ = sender.send(Event::Broken(why));
    });
    thread::spawn(move || {
        // After a failure the program shows the end of the console, in which our own messages are only noise.
        let lines = BufReader::new(errors).lines().map_while(Result::ok);
        for line in lines.filter(|line| !line.trim_start().starts_with('@')) {
            error_text.push(format!("(stderr) {line}"));
        }
    });
    (text, events)
}

fn read_console(mut console: impl BufRead, text: &Text, events: &Sender<Event>) -> String {
    loop {
        let event = match read_line::<Reply>(&mut console) {
            Ok(Some(Line::Message(reply))) => Event::Reply(reply),
            Ok(Some(Line::Other(line))) if line == READY => Event::Ready,
            Ok(Some(Line::Other(line))) => {
                if !line.is_empty() {
                    text.push(line);
                }
                continue;
            }
            Ok(None) => return "the console was closed".into(),
            Err(error) => return error.to_string(),
        };
        if events.send(event).is_err() {
            return "nobody listens".into();
        }
    }
}
