//! One connection to the RPC socket: a request, its response, the next request.

use core::time::Duration;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::time::Instant;

use nix::poll::PollTimeout;
use nix::poll::poll;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use super::options::Options;

/// Time between two attempts to connect, in milliseconds.
const RETRY: u8 = 200;

/// Why a request has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// Nobody listens.
    #[error(
        "cannot connect to the RPC socket {}: {error}; is ferry-controlplane running, and does it use this socket (-s)?",
        .socket.display()
    )]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The answer of the operating system.
        error: io::Error,
    },
    /// The connection failed.
    #[error("the connection to the RPC socket has failed: {0}")]
    Connection(#[from] io::Error),
    /// The request cannot be printed.
    #[error("cannot write standard output: {0}")]
    Print(io::Error),
    /// The server closed the connection.
    #[error("the service has closed the connection before it answered {0}")]
    Closed(String),
    /// No response in time.
    #[error("no response to {method} within {} s; a longer time can be given with -t", .timeout.as_secs_f64())]
    Timeout {
        /// The method.
        method: String,
        /// How long it was given.
        timeout: Duration,
    },
    /// The response makes no sense.
    #[error("the service has answered {method} with something that is no response: {answer}")]
    NoResponse {
        /// The method.
        method: String,
        /// What it said.
        answer: String,
    },
    /// The service refuses.
    #[error("request:\n{request}\nGot JSON-RPC error response\nresponse:\n{error}")]
    Refused {
        /// The parameters, the method and the number of the request, as JSON.
        request: String,
        /// The error member, as JSON.
        error: String,
    },
}

/// The client; it connects with the first request.
pub(crate) struct Client {
    options: Options,
    verbose: bool,
    stream: Option<UnixStream>,
    received: Vec<u8>,
    next: u64,
}

impl Client {
    /// One with no other options than its socket and how long it waits.
    pub(crate) fn to(socket: &Path, timeout: Duration) -> Client {
        Client::new(Options {
            socket: socket.to_owned(),
            timeout,
            ..Options::new()
        })
    }

    pub(super) fn new(options: Options) -> Client {
        let verbose = options.verbose;
        Client {
            options,
            verbose,
            stream: None,
            received: Vec::new(),
            next: 1,
        }
    }

    /// Whether standard input holds the commands.
    pub(super) fn commands_on_stdin(&self) -> bool {
        self.options.commands_on_stdin
    }

    /// Whether the next requests are logged, apart from what the options say.
    pub(super) fn set_verbose(&mut self, verbose: bool) {
        self.verbose = verbose || self.options.verbose;
    }

    /// Sends a request and waits for its result. In a dry run it prints the request instead, and there is none.
    pub(crate) fn call(
        &mut self,
        method: &str,
        params: &Map<String, Value>,
        out: &mut dyn Write,
    ) -> Result<Option<Value>, CallError> {
        let id = self.next;
        self.next += 1;
        let mut request = json!({"jsonrpc": "2.0", "method": method, "id": id});
        if !params.is_empty() {
            request["params"] = json!(params);
        }
        if self.options.dry_run {
            writeln!(out, "Request:\n{request:#}").map_err(CallError::Print)?;
            return Ok(None);
        }
        if self.verbose {
            eprintln!("INFO: request:\n{request:#}");
        }
        let deadline = Instant::now() + self.options.timeout;
        self.connection()?
            .write_all(request.to_string().as_bytes())?;
        let mut response = self.receive(method, deadline)?;
        if self.verbose {
            eprintln!("INFO: response:\n{response:#}");
        }
        if let Some(error) = response.get("error") {
            let mut request = params.clone();
            request.insert("method".to_owned(), json!(method));
            request.insert("req_id".to_owned(), json!(id));
            let request = format!("{:#}", Value::Object(request));
            return Err(CallError::Refused {
                request,
                error: format!("{error:#}"),
            });
        }
        let belongs = response.get("id") == Some(&json!(id));
        match response.get_mut("result") {
            Some(result) if belongs => Ok(Some(result.take())),
            _ => Err(CallError::NoResponse {
                method: method.to_owned(),
                answer: response.to_string(),
            }),
        }
    }

    fn connection(&mut self) -> Result<&mut UnixStream, CallError> {
        if self.stream.is_none() {
            self.stream = Some(self.connect()?);
        }
        let socket = &self.options.socket;
        self.stream.as_mut().ok_or_else(|| CallError::Connect {
            socket: socket.clone(),
            error: io::ErrorKind::NotConnected.into(),
        })
    }

    fn connect(&self) -> Result<UnixStream, CallError> {
        let mut left = self.options.retries;
        loop {
            match UnixStream::connect(&self.options.socket) {
                Ok(stream) => {
                    stream.set_write_timeout(Some(self.options.timeout))?;
                    return Ok(stream);
                }
                Err(error) if left == 0 => {
                    return Err(CallError::Connect {
                        socket: self.options.socket.clone(),
                        error,
                    });
                }
                Err(_) => {
                    left -= 1;
                    // Nothing is polled: this only passes the time, and a signal ends it early.
                    let _ = poll(&mut [], PollTimeout::from(RETRY));
                }
            }
        }
    }

    fn receive(&mut self, method: &str, deadline: Instant) -> Result<Value, CallError> {
        let timeout = self.options.timeout;
        let mut buffer = [0; 8192];
        loop {
            if let Some(response) = self.take_response(method)? {
                return Ok(response);
            }
            let late = || CallError::Timeout {
                method: method.to_owned(),
                timeout,
            };
            let left = deadline
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero());
            let stream = self.connection()?;
            stream.set_read_timeout(Some(left.ok_or_else(late)?))?;
            match stream.read(&mut buffer) {
                Ok(0) => return Err(CallError::Closed(method.to_owned())),
                Ok(count) => self
                    .received
                    .extend_from_slice(buffer.get(..count).unwrap_or_default()),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) =>
                {
                    return Err(late());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn take_response(&mut self, method: &str) -> Result<Option<Value>, CallError> {
        // A response ends with a newline, and JSON from the service has no other.
        if !self.received.contains(&b'\n') && !self.received.ends_with(b"}") {
            return Ok(None);
        }
        let mut stream = serde_json::Deserializer::from_slice(&self.received).into_iter::<Value>();
        match stream.next() {
            Some(Ok(response)) => {
                let end = stream.byte_offset();
                self.received.drain(..end);
                Ok(Some(response))
            }
            Some(Err(error)) if !error.is_eof() => {
                let answer = String::from_utf8_lossy(&self.received).into_owned();
                Err(CallError::NoResponse {
                    method: method.to_owned(),
                    answer,
                })
            }
            Some(Err(_)) | None => Ok(None),
        }
    }
}
