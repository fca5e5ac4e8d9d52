//! QEMU's machine protocol: one JSON object on each line, answers in order, events in between.

use serde_json::Value;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::LinkError;
use super::MESSAGE_LIMIT;

/// A connection that has been greeted.
pub(super) struct Qmp {
    socket: String,
    stream: UnixStream,
    /// What has arrived and is not yet a whole line, or not yet taken.
    buffer: Vec<u8>,
    /// Events that came while an answer was awaited.
    events: Vec<Value>,
}

impl Qmp {
    pub(super) async fn connect(socket: &str) -> Result<Qmp, LinkError> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|error| LinkError::Socket {
                socket: socket.to_owned(),
                error,
            })?;
        let mut qmp = Qmp {
            socket: socket.to_owned(),
            stream,
            buffer: Vec::new(),
            events: Vec::new(),
        };
        let greeting = qmp.message().await?;
        if greeting.get("QMP").is_none() {
            return Err(qmp.protocol(format!("it greets with {greeting}")));
        }
        qmp.execute("qmp_capabilities", &json!({})).await?;
        Ok(qmp)
    }

    fn socket_error(&self, error: std::io::Error) -> LinkError {
        LinkError::Socket {
            socket: self.socket.clone(),
            error,
        }
    }

    fn protocol(&self, mut what: String) -> LinkError {
        what.truncate(what.floor_char_boundary(200));
        LinkError::Protocol {
            socket: self.socket.clone(),
            what,
        }
    }

    async fn message(&mut self) -> Result<Value, LinkError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .map_err(|error| self.protocol(error.to_string()));
            }
            if self.buffer.len() > MESSAGE_LIMIT {
                return Err(self.protocol("a line does not end".to_owned()));
            }
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) => {
                    let gone = std::io::ErrorKind::UnexpectedEof.into();
                    return Err(self.socket_error(gone));
                }
                Ok(_) => {}
                Err(error) => return Err(self.socket_error(error)),
            }
        }
    }

    /// Carries out a command and gives what it returns.
    pub(super) async fn execute(
        &mut self,
        command: &str,
        arguments: &Value,
    ) -> Result<Value, LinkError> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        let sent = self.stream.write_all(line.as_bytes()).await;
        sent.map_err(|error| self.socket_error(error))?;
        loop {
            let mut message = self.message().await?;
            if message.get("event").is_some() {
                self.events.push(message);
            } else if let Some(result) = message.get_mut("return") {
                return Ok(result.take());
            } else if let Some(error) = message.get("error") {
                let text = |key| error.get(key).and_then(Value::as_str).unwrap_or_default();
                return Err(LinkError::Refused {
                    socket: self.socket.clone(),
                    reason: format!("{} ({})", text("desc"), text("class")),
                });
            } else {
                return Err(self.protocol(message.to_string()));
            }
        }
    }

    /// Has the guest asked to let go of a device. That it was asked before is no mistake.
    pub(super) async fn delete(&mut self, id: &str) -> Result<(), LinkError> {
        match self.execute("device_del", &json!({"id": id})).await {
            Ok(_) => Ok(()),
            Err(LinkError::Refused { reason, .. })
                if reason.contains("already in the process of unplug") =>
            {
                Ok(())
            }
            Err(LinkError::Refused { socket, reason }) if reason.contains("DeviceNotFound") => {
                let id = id.to_owned();
                Err(LinkError::Unknown { socket, id })
            }
            Err(error) => Err(error),
        }
    }

    /// Waits until the device is gone. A VMM that ends has let go of it, too.
    pub(super) async fn deleted(mut self, id: &str) -> Result<(), LinkError> {
        let mut early = core::mem::take(&mut self.events).into_iter();
        loop {
            let event = match early.next() {
                Some(event) => event,
                None => match self.message().await {
                    Ok(event) => event,
                    Err(LinkError::Socket { .. }) => return Ok(()),
                    Err(error) => return Err(error),
                },
            };
            let about = event.pointer("/data/device").and_then(Value::as_str);
            if about != Some(id) {
                continue;
            }
            match event.get("event").and_then(Value::as_str) {
                Some("DEVICE_DELETED") => return Ok(()),
                Some("DEVICE_UNPLUG_GUEST_ERROR") => {
                    return Err(LinkError::GuestRefused {
                        socket: self.socket,
                        id: id.to_owned(),
                    });
                }
                _ => {}
            }
        }
    }
}
