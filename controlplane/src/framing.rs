//! Cuts a byte stream into JSON-RPC requests and judges their envelope.
//!
//! Requests are JSON objects one after another, with or without blanks between them. The bytes come from any local
//! client: nothing here panics, and nothing grows beyond the limits.

use serde::Deserialize;
use serde::Deserializer;
use serde::de::IgnoredAny;
use serde::de::MapAccess;
use serde::de::Visitor;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::rpc::RpcError;
use crate::rpc::decode::Params;

/// Bytes of one request.
pub const MAX_REQUEST: usize = 32 * 1024;
/// JSON values in one request; names and both ends of containers count.
pub const MAX_VALUES: usize = 1024;
/// Bytes of an id as it was written.
pub const MAX_ID: usize = 128;
/// Bytes of one response.
pub const MAX_RESPONSE: usize = 32 * 1024 * 1024;

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The id, ready to be written back.
    pub id: String,
    /// Name of the method.
    pub method: String,
    /// Its parameters.
    pub params: Params,
}

/// What came instead of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The id if it is known, else `null`.
    pub id: String,
    /// The answer.
    pub error: RpcError,
    /// Whether the rest of the stream cannot be understood, so that the connection has to be closed.
    pub fatal: bool,
}

/// Collects bytes and gives requests.
#[derive(Debug, Default)]
pub struct Framer {
    bytes: Vec<u8>,
    /// How far `bytes` has been looked at.
    scanned: usize,
    depth: usize,
    values: usize,
    in_string: bool,
    escaped: bool,
}

impl Framer {
    /// Adds bytes that have arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next request, if one is complete.
    pub fn next_request(&mut self) -> Option<Result<Request, Rejection>> {
        if self.scanned == 0 {
            let blanks = self
                .bytes
                .iter()
                .take_while(|byte| is_blank(**byte))
                .count();
            self.bytes.drain(..blanks);
        }
        match *self.bytes.first()? {
            b'{' | b'[' => self.next_container(),
            _ => Some(self.next_scalar()),
        }
    }

    fn next_container(&mut self) -> Option<Result<Request, Rejection>> {
        while let Some(byte) = self.bytes.get(self.scanned).copied() {
            self.scanned += 1;
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                // Both ends, and the first value or name inside.
                b'{' | b'[' => {
                    self.depth += 1;
                    self.values += 3;
                }
                b',' | b':' => self.values += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(self.take_container());
                    }
                }
                _ => {}
            }
        }
        if self.bytes.len() > MAX_REQUEST {
            return Some(Err(too_long()));
        }
        None
    }

    fn take_container(&mut self) -> Result<Request, Rejection> {
        let rest = self.bytes.split_off(self.scanned.min(self.bytes.len()));
        let Framer { bytes, values, .. } = core::mem::take(self);
        self.bytes = rest;
        if bytes.len() > MAX_REQUEST {
            return Err(too_long());
        }
        if values > MAX_VALUES {
            return Err(parse_error(&format!(
                "the request has more than {MAX_VALUES} values"
            )));
        }
        parse(&bytes)
    }

    /// A scalar is never a request; it only matters whether it is JSON.
    fn next_scalar(&mut self) -> Result<Request, Rejection> {
        let mut stream =
            serde_json::Deserializer::from_slice(&self.bytes).into_iter::<IgnoredAny>();
        match stream.next() {
            Some(Ok(_)) => {
                let end = stream.byte_offset();
                self.bytes.drain(..end.min(self.bytes.len()));
                Err(invalid("null", "a request must be an object"))
            }
            Some(Err(error)) => Err(parse_error(&error.to_string())),
            None => Err(parse_error("nothing")),
        }
    }
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

fn parse_error(detail: &str) -> Rejection {
    let error = RpcError::new(RpcError::PARSE_ERROR, format!("Parse error: {detail}"));
    Rejection {
        id: "null".to_owned(),
        error,
        fatal: true,
    }
}

fn too_long() -> Rejection {
    let detail = format!("Invalid request: longer than {MAX_REQUEST} bytes");
    Rejection {
        id: "null".to_owned(),
        error: RpcError::new(RpcError::INVALID_REQUEST, detail),
        fatal: true,
    }
}

fn invalid(id: &str, detail: &str) -> Rejection {
    let error = RpcError::new(
        RpcError::INVALID_REQUEST,
        format!("Invalid request: {detail}"),
    );
    Rejection {
        id: id.to_owned(),
        error,
        fatal: false,
    }
}

/// The members of an object, unjudged.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Members<'a>, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(Collect).map(Members)
    }
}

fn parse(bytes: &[u8]) -> Result<Request, Rejection> {
    if bytes.first() == Some(&b'[') {
        return match serde_json::from_slice::<IgnoredAny>(bytes) {
            Ok(_) => Err(invalid(
                "null",
                "batches are not supported; send one object after another",
            )),
            Err(error) => Err(parse_error(&error.to_string())),
        };
    }
    let Members(members) =
        serde_json::from_slice(bytes).map_err(|error| parse_error(&error.to_string()))?;
    let (mut version, mut id, mut method, mut params) = (None, None, None, None);
    for (name, value) in &members {
        let member = match name.as_str() {
            "jsonrpc" => &mut version,
            "id" => &mut id,
            "method" => &mut method,
            "params" => &mut params,
            _ => return Err(invalid("null", &format!("there is no member {name:?}"))),
        };
        if member.replace(value.get()).is_some() {
            return Err(invalid("null", &format!("member {name:?} is given twice")));
        }
    }
    let text = |json: &str| serde_json::from_str::<String>(json).ok();
    if version.is_some_and(|version| text(version).as_deref() != Some("2.0")) {
        return Err(invalid("null", "jsonrpc must be \"2.0\""));
    }
    let id = match id {
        None => "null".to_owned(),
        Some(id) => echo(id).ok_or_else(|| {
            invalid(
                "null",
                &format!("id must be a string, a number or null of at most {MAX_ID} bytes"),
            )
        })?,
    };
    let Some(method) = method.and_then(text) else {
        return Err(invalid("null", "method must be given as a string"));
    };
    let params = match params.map(serde_json::from_str) {
        None => Params::Absent,
        Some(Ok(params)) => params,
        Some(Err(_)) => return Err(invalid(&id, "params must be an object")),
    };
    Ok(Request { id, method, params })
}

/// The id as it is written back: numbers digit by digit, strings in their shortest form.
fn echo(raw: &str) -> Option<String> {
    if raw.len() > MAX_ID {
        return None;
    }
    match serde_json::from_str(raw).ok()? {
        Value::Number(_) => Some(raw.to_owned()),
        id @ (Value::Null | Value::String(_)) => Some(id.to_string()),
        Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

/// Writes a response, with its newline.
pub fn response(id: &str, outcome: &Result<Value, RpcError>) -> Vec<u8> {
    let member = match outcome {
        Ok(result) => format!("\"result\":{result}"),
        Err(error) => {
            let message = Value::from(error.message.as_str());
            format!(
                "\"error\":{{\"code\":{},\"message\":{message}}}",
                error.code
            )
        }
    };
    let response = format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},{member}}}\n");
    if response.len() > MAX_RESPONSE {
        let error = RpcError::new(
            RpcError::INTERNAL_ERROR,
            format!("Internal error: the response is longer than {MAX_RESPONSE} bytes"),
        );
        return self::response(id, &Err(error));
    }
    response.into_bytes()
}

#[cfg(test)]
mod tests;
