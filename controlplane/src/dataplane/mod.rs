//! The link to the data plane: what carries commands, and the task that keeps it up.

#[cfg(test)]
pub(crate) mod fake;
mod ring;

use core::convert::Infallible;
use core::future::Future;
use core::pin::Pin;
use core::time::Duration;
use std::path::Path;
use std::rc::Rc;

use ferry_shared::counters::Counters;
use ferry_shared::msg::Command;
use ferry_shared::msg::Failure;
use ferry_shared::msg::Reply;

use tokio::time::MissedTickBehavior;

use crate::app::App;

pub use ring::RingLink;

/// The answer to a command, to be awaited.
pub type Outcome = Pin<Box<dyn Future<Output = Result<Reply, Failure>>>>;

/// What carries commands to the data plane.
pub trait Link {
    /// Sends a command; commands arrive in the order of the calls. When the data plane goes away, the outcome is a
    /// failure that says so.
    fn call(&self, command: Command) -> Outcome;

    /// The counters of the data plane's cores, where there are any.
    fn counters(&self) -> Option<Rc<Counters>> {
        None
    }
}

/// Time between two attempts to connect.
const RETRY: Duration = Duration::from_millis(250);

/// Connects, reconciles, and connects again whenever the data plane has gone.
pub async fn keep_connected(app: Rc<App>, run_dir: &Path) -> Infallible {
    let mut retry = tokio::time::interval(RETRY);
    retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = String::new();
    loop {
        tokio::select! {
            _ = retry.tick() => {}
            () = app.impatience() => {}
        }
        let why = match RingLink::connect(run_dir).await {
            Ok(link) => {
                tracing::info!(run_dir = %run_dir.display(), "connected to the data plane");
                let why = converse(&app, link).await;
                tracing::warn!(why, "the data plane has gone; trying to reach it again");
                last.clone_from(&why);
                why
            }
            Err(error) => error.to_string(),
        };
        if why != last {
            tracing::warn!(why, "no data plane; trying until there is one");
            last.clone_from(&why);
        }
        app.disconnected(why);
    }
}

/// Reconciles and then carries messages until the data plane goes; says why.
async fn converse(app: &Rc<App>, link: Rc<RingLink>) -> String {
    let reconcile = {
        let app = Rc::clone(app);
        let link = Rc::clone(&link);
        async move {
            match app.connected(link).await {
                Ok(()) => core::future::pending().await,
                Err(failure) => format!("{}: {}", failure.errno, failure.detail),
            }
        }
    };
    tokio::select! {
        why = link.run(|event| app.event(event)) => why,
        why = reconcile => why,
    }
}

#[cfg(test)]
mod tests;
