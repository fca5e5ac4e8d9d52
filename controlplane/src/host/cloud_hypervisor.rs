//! The API of cloud-hypervisor: HTTP on a unix socket, one request for each connection.

use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::LinkError;
use super::MESSAGE_LIMIT;

/// Sends a request. What it answers beyond the status is only of interest when it refuses.
pub(super) async fn put(socket: &str, action: &str, body: &Value) -> Result<(), LinkError> {
    let failed = |error| LinkError::Socket {
        socket: socket.to_owned(),
        error,
    };
    let mut stream = UnixStream::connect(socket).await.map_err(failed)?;
    let body = body.to_string();
    let request = format!(
        "PUT /api/v1/{action} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.map_err(failed)?;
    let answer = answer(&mut stream).await.map_err(failed)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, reason) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1))
        .and_then(|status| status.parse::<u16>().ok());
    match status {
        Some(200..=299) => Ok(()),
        Some(404) => Err(LinkError::Unknown {
            socket: socket.to_owned(),
            id: body,
        }),
        Some(status) => Err(LinkError::Refused {
            socket: socket.to_owned(),
            reason: format!("status {status} {}", reason.trim()),
        }),
        None => Err(LinkError::Protocol {
            socket: socket.to_owned(),
            what: head.chars().take(200).collect(),
        }),
    }
}

/// Reads a whole answer: up to the length that its header names, or to the end of the connection.
async fn answer(stream: &mut UnixStream) -> std::io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    loop {
        if let Some(end) = answer.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(answer.get(..end).unwrap_or_default());
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                let named = name.eq_ignore_ascii_case("content-length");
                named.then(|| value.trim().parse().ok())?
            });
            // An answer without a body says so by its status, or has no length at all.
            let length: usize = length.unwrap_or(0);
            let total = length.saturating_add(end).saturating_add(4);
            if answer.len() >= total.min(MESSAGE_LIMIT) {
                return Ok(answer);
            }
        }
        if answer.len() > MESSAGE_LIMIT || stream.read_buf(&mut answer).await? == 0 {
            return Ok(answer);
        }
    }
}
