//! Asks for the counters again and again, in a thread of its own, so that a silent service holds up nobody.

use core::time::Duration;
use std::path::Path;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::mpsc::Sender;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Instant;

use anyhow::Context;
use serde::Deserialize;
use serde_json::Map;

use super::sample::Counters;
use super::sample::Sample;
use crate::rpc::CallError;
use crate::rpc::Client;

const METHOD: &str = "ferry_get_counters";

/// What was learnt: the counters, or in one line why there are none.
pub(super) type Learnt = Result<Sample, String>;

/// The thread that asks.
pub(super) struct Feed {
    orders: Sender<Order>,
}

/// What the thread is told.
enum Order {
    /// Ask so often from now on.
    Interval(Duration),
    /// Ask now.
    Now,
}

impl Feed {
    /// Starts asking; `hand_over` gets what is learnt and says whether to go on.
    pub(super) fn start(
        socket: &Path,
        interval: Duration,
        timeout: Duration,
        hand_over: impl FnMut(Learnt) -> bool + Send + 'static,
    ) -> anyhow::Result<Feed> {
        let (orders, ordered) = channel();
        let asker = Asker {
            socket: socket.to_owned(),
            timeout,
            client: None,
        };
        thread::Builder::new()
            .name("feed".to_owned())
            .spawn(move || keep_asking(asker, interval, &ordered, hand_over))
            .context("cannot start a thread")?;
        Ok(Feed { orders })
    }

    /// Changes how often it asks.
    pub(super) fn every(&self, interval: Duration) {
        // A thread that has ended has handed over its reason.
        let _ = self.orders.send(Order::Interval(interval));
    }

    /// Asks at once.
    pub(super) fn now(&self) {
        let _ = self.orders.send(Order::Now);
    }
}

fn keep_asking(
    mut asker: Asker,
    mut interval: Duration,
    orders: &Receiver<Order>,
    mut hand_over: impl FnMut(Learnt) -> bool,
) {
    let mut next = Instant::now();
    loop {
        next += interval;
        if !hand_over(asker.ask()) {
            return;
        }
        // After a wait for a silent service the pace begins anew.
        next = next.max(Instant::now());
        loop {
            let left = next.saturating_duration_since(Instant::now());
            match orders.recv_timeout(left) {
                Ok(Order::Interval(other)) => {
                    next = Instant::now() + other;
                    interval = other;
                }
                Ok(Order::Now) => next = Instant::now(),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}

struct Asker {
    socket: PathBuf,
    timeout: Duration,
    client: Option<Client>,
}

impl Asker {
    fn ask(&mut self) -> Learnt {
        let client = self
            .client
            .get_or_insert_with(|| Client::to(&self.socket, self.timeout));
        let taken = Instant::now();
        let answer = client.call(METHOD, &Map::new(), &mut std::io::sink());
        let failed = match answer {
            Ok(answer) => match Counters::deserialize(answer.unwrap_or_default()) {
                Ok(counters) => return Ok(Sample { taken, counters }),
                Err(error) => format!("{METHOD} is answered with something else: {error}"),
            },
            // The connection is as good as before.
            Err(CallError::Refused { error, .. }) => return Err(reason(&error)),
            Err(error) => error.to_string(),
        };
        self.client = None;
        Err(failed)
    }
}

/// The sentence of an error member.
fn reason(error: &str) -> String {
    let error: serde_json::Value = serde_json::from_str(error).unwrap_or_default();
    let message = error["message"].as_str().unwrap_or_default();
    format!("{METHOD} is refused: {message}")
}
