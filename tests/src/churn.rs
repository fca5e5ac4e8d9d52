//! Work for a control plane that is killed in the middle of it, and what has to be true of the next one: every change that was
//! acknowledged is there, and of the one that was not, all of it or nothing.

use crate::numbers::Numbers;
use crate::process::wait_until;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Requests between two kills, on the average.
const REQUESTS: usize = 20;
/// Devices that come and go, at most.
const DEVICES: usize = 4;
const LIMIT: Duration = Duration::from_secs(30);

/// A connection to a control plane.
pub type Client = BufReader<UnixStream>;

/// A connection to a control plane that listens there, sooner or later.
///
/// # Errors
/// When none does.
pub fn connect(socket: &Path) -> Result<Client> {
    let mut connected = None;
    wait_until("the control plane answers", LIMIT, || {
        connected = UnixStream::connect(socket).ok();
        Ok(connected.is_some())
    })?;
    Ok(BufReader::new(connected.context("no connection")?))
}

/// Sends a request, does something, and waits for the answer; `None` when the control plane died first.
fn ask_and(
    client: &mut Client,
    method: &str,
    params: &Value,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<Option<Value>> {
    let request = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
    let mut line = String::new();
    let sent = client.get_mut().write_all(request.to_string().as_bytes());
    meanwhile()?;
    match sent.and_then(|()| client.read_line(&mut line)) {
        Ok(_) if !line.ends_with('\n') => Ok(None),
        Ok(_) => Ok(Some(serde_json::from_str(&line)?)),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Sends a request that must succeed; gives its result.
///
/// # Errors
/// When it does not.
pub fn ask(client: &mut Client, method: &str, params: &Value) -> Result<Value> {
    let answer = ask_and(client, method, params, || Ok(()))?.context("it has ended")?;
    let result = answer.get("result").cloned();
    result.with_context(|| format!("{method} {params}: {answer}"))
}

/// What is known of one device: absent, or its tag and state.
pub type Known = Option<(String, String)>;

/// What the last request that got no answer may have done besides nothing.
#[derive(Debug)]
struct Unknown {
    device: String,
    after: Known,
}

/// Chooses what to do with a device, and what it is afterwards.
fn choose(numbers: &mut Numbers, name: &str, known: &Known) -> (&'static str, Value, Known) {
    let state = |tag: &str, state: &str| Some((tag.to_owned(), state.to_owned()));
    match known {
        None => {
            let tag = format!("t{}", numbers.below(1000));
            let params = json!({"transport_name": "VHOST_USER", "dev_name": name, "tag": tag,
                "fsdev": "null0", "num_request_queues": 1});
            ("virtio_fs_device_create", params, state(&tag, "idle"))
        }
        Some((tag, now)) if now == "running" => (
            "virtio_fs_device_stop",
            json!({"dev_name": name}),
            state(tag, "stopped"),
        ),
        Some((tag, now)) => match numbers.below(3) {
            0 => {
                let tag = format!("t{}", numbers.below(1000));
                let params = json!({"dev_name": name, "tag": tag});
                ("virtio_fs_device_modify", params, state(&tag, now))
            }
            1 => ("virtio_fs_device_destroy", json!({"dev_name": name}), None),
            _ => (
                "virtio_fs_device_start",
                json!({"dev_name": name}),
                state(tag, "running"),
            ),
        },
    }
}

/// Devices of the churn, by name; others are left alone.
///
/// # Errors
/// When they cannot be listed.
pub fn devices(client: &mut Client) -> Result<BTreeMap<String, Known>> {
    let answer = ask(client, "virtio_fs_get_devices", &json!({}))?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let listed = answer.as_array().context("not a list")?;
    let all = listed.iter().map(|device| {
        let known = (text(&device["tag"]), text(&device["state"]));
        (text(&device["name"]), Some(known))
    });
    Ok(all.filter(|(name, _)| name.starts_with("churn")).collect())
}

/// Devices that are created, started, changed, stopped and destroyed at random, on a transport `VHOST_USER` that is started.
#[derive(Debug)]
pub struct Churn {
    numbers: Numbers,
    client: Client,
    known: BTreeMap<String, Known>,
    unknown: Option<Unknown>,
}

impl Churn {
    /// Makes the file system that all of them have.
    ///
    /// # Errors
    /// When that fails.
    pub fn new(mut client: Client) -> Result<Churn> {
        ask(&mut client, "fsdev_null_create", &json!({"name": "null0"}))?;
        Ok(Churn {
            numbers: Numbers(0x5eed),
            client,
            known: BTreeMap::new(),
            unknown: None,
        })
    }

    /// Sends work, of which everything is answered.
    ///
    /// # Errors
    /// When something is not, or not well.
    pub fn work(&mut self, rounds: usize) -> Result<()> {
        for _ in 0..rounds * REQUESTS {
            let end = self.request(|_| Ok(()))?;
            ensure!(!end, "it has ended");
        }
        Ok(())
    }

    /// Sends work and has the control plane killed at a random moment of it.
    ///
    /// # Errors
    /// When something is answered otherwise than well, or it cannot be killed.
    pub fn until_killed(&mut self, kill: impl Fn() -> Result<()>) -> Result<()> {
        let patience = self.numbers.below(2 * REQUESTS);
        for count in 0.. {
            let strike = |spins: usize| {
                if count == patience {
                    // Some requests have gone a part of their way, some have not begun, and some are done.
                    (0..spins).for_each(|_| core::hint::spin_loop());
                    kill()?;
                }
                Ok(())
            };
            if self.request(strike)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Sends a random request and does something before it is answered; whether no answer has come.
    fn request(&mut self, meanwhile: impl FnOnce(usize) -> Result<()>) -> Result<bool> {
        let device = format!("churn{}", self.numbers.below(DEVICES));
        let before = self.known.get(&device).cloned().flatten();
        let (method, params, after) = choose(&mut self.numbers, &device, &before);
        let spins = self.numbers.below(200_000);
        let answer = ask_and(&mut self.client, method, &params, || meanwhile(spins))?;
        let Some(answer) = answer else {
            self.unknown = Some(Unknown { device, after });
            return Ok(true);
        };
        ensure!(answer["result"] == true, "{method} {params}: {answer}");
        self.known.insert(device, after);
        Ok(false)
    }

    /// Goes on with the next control plane, which has to know what was acknowledged.
    ///
    /// # Errors
    /// When it does not.
    pub fn go_on(&mut self, client: Client) -> Result<()> {
        self.client = client;
        let now = devices(&mut self.client)?;
        if let Some(Unknown { device, after }) = self.unknown.take() {
            let seen = now.get(&device).cloned().flatten();
            // A destruction begins in the data plane, so half of one leaves the device configured and not started.
            let halfway = |(_, state): &(String, String)| after.is_none() && state == "idle";
            if seen == after || seen.as_ref().is_some_and(halfway) {
                self.known.insert(device, seen);
            }
        }
        self.known.retain(|_, known| known.is_some());
        let known = &self.known;
        ensure!(now == *known, "{now:?} where {known:?} was acknowledged");
        Ok(())
    }

    /// What was acknowledged of each device.
    #[must_use]
    pub fn known(&self) -> &BTreeMap<String, Known> {
        &self.known
    }
}
