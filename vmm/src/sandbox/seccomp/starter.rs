//! The thread that starts those of devices, so that they inherit its filter and not that of a vCPU.

use std::io;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};

use devices::virtio::thread::{ThreadKind, start_threads_with};

use super::enter;

struct Order {
    kind: ThreadKind,
    name: String,
    body: Box<dyn FnOnce() + Send>,
    answer: Sender<io::Result<JoinHandle<()>>>,
}

/// Starts thread `starter`, which lives as long as the process.
pub(super) fn start() -> io::Result<()> {
    let (orders, received) = channel::<Order>();
    let work = move || {
        for Order { kind, name, body, answer } in received {
            let confined = move || {
                enter(kind.into());
                body();
            };
            // Whoever asked waits for it.
            let _ = answer.send(thread::Builder::new().name(name).spawn(confined));
        }
    };
    thread::Builder::new().name("starter".into()).spawn(work)?;
    let orders = Mutex::new(orders);
    start_threads_with(Box::new(move |kind, name, body| {
        let (answer, answered) = channel();
        let order = Order { kind, name: name.to_owned(), body, answer };
        let gone = || io::Error::other("there is no thread that starts others");
        orders.lock().unwrap_or_else(|e| e.into_inner()).send(order).map_err(|_| gone())?;
        answered.recv().map_err(|_| gone())?
    }));
    Ok(())
}
