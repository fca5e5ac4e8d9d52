//! What a row of the table of methods holds.

use core::future::Future;
use core::pin::Pin;
use std::rc::Rc;

use serde_json::Value;

use super::RpcError;
use super::decode::Args;
use super::params::Param;
use crate::app::App;

/// One method.
#[derive(Clone, Copy)]
pub struct Method {
    /// Name on the wire and on the command line.
    pub name: &'static str,
    /// Older names.
    pub aliases: &'static [&'static str],
    /// When it may be called.
    pub when: When,
    /// One line for the help.
    pub help: &'static str,
    /// Its parameters, in the order of the positional ones.
    pub params: &'static [Param],
    /// What the absence of parameters means, and how a wrong one is answered.
    pub rule: Rule,
    /// Whether it is answered by the data plane, so that its absence is the first thing to report.
    pub dataplane: bool,
    /// What the command line prints.
    pub output: Output,
    /// What answers it.
    pub handler: Handler,
}

/// When a method may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before `framework_start_init` only.
    Startup,
    /// After it only.
    Runtime,
    /// Always.
    Always,
}

/// How the `params` member is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Every key must be known; a wrong one is answered with this code and text.
    Strict(i32, &'static str),
    /// Any `params` but null is answered with this text.
    Absent(&'static str),
    /// `params` are not looked at.
    Ignored,
}

/// What the command line prints of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// JSON with indent 2; a string without quotes.
    Json,
    /// Nothing: the result only says that it was done.
    Nothing,
}

/// The future of an asynchronous handler.
pub type Answer = Pin<Box<dyn Future<Output = Result<Value, RpcError>>>>;

/// What answers a method.
#[derive(Clone, Copy)]
pub enum Handler {
    /// Answers at once.
    Now(fn(&App, &Args) -> Result<Value, RpcError>),
    /// Waits for the data plane.
    Later(fn(Rc<App>, Args) -> Answer),
    /// May wait for other requests, so later requests of the same connection overtake it.
    Detached(fn(Rc<App>, Args) -> Answer),
    /// A command of the client that is composed of other methods; the server does not know it.
    Client(ClientCommand),
}

/// Commands of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientCommand {
    /// Write the whole configuration.
    SaveConfig,
    /// Apply a saved configuration.
    LoadConfig,
    /// Write the configuration of one subsystem.
    SaveSubsystemConfig,
    /// Apply the configuration of one subsystem.
    LoadSubsystemConfig,
}

impl Method {
    /// Whether the server answers it.
    pub fn is_remote(&self) -> bool {
        !matches!(self.handler, Handler::Client(_))
    }
}
