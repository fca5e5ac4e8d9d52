//! The RPC socket's bytes, and the files that the control plane reads.

use std::fs;
use std::path::PathBuf;

use ferry_controlplane::config;
use ferry_controlplane::framing::{Framer, MAX_ID, MAX_REQUEST, Rejection, Request};
use ferry_controlplane::model::Model;
use ferry_controlplane::rpc::decode::decode;
use ferry_controlplane::rpc::table;
use ferry_controlplane::state::Store;
use serde_json::Value;

type Outcome = Result<Request, Rejection>;

/// Everything that comes out of a stream that arrives in pieces of `size` bytes, up to the end of the connection.
fn read(stream: &[u8], size: usize) -> Vec<Outcome> {
    let mut framer = Framer::default();
    let mut outcomes = Vec::new();
    for piece in stream.chunks(size) {
        framer.push(piece);
        while let Some(outcome) = framer.next_request() {
            let fatal = matches!(&outcome, Err(rejection) if rejection.fatal);
            outcomes.push(outcome);
            if fatal {
                return outcomes;
            }
        }
    }
    outcomes
}

/// A stream of requests. The first byte says in pieces of how many bytes it arrives, which must make no difference.
pub fn stream(data: &[u8]) {
    let Some((size, stream)) = data.split_first() else {
        return;
    };
    let whole = read(stream, stream.len().max(1));
    let pieces = read(stream, usize::from(*size).max(1));
    // Whether an oversized request is told from a malformed one depends on which of the two is seen first.
    if stream.len() <= MAX_REQUEST {
        assert_eq!(whole, pieces);
    }
    for outcome in whole {
        let id = match &outcome {
            Ok(request) => &request.id,
            Err(rejection) => &rejection.id,
        };
        assert!(id.len() <= MAX_ID);
        assert!(
            serde_json::from_str::<Value>(id).is_ok(),
            "{id} is not JSON"
        );
        if let Ok(request) = outcome
            && let Some(method) = table::find(&request.method)
        {
            let _ = decode(method, &request.params);
        }
    }
}

/// A saved configuration: what can be read is the same after it was written and read again.
pub fn configuration(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let _ = config::parse_subsystem(text);
    let Ok(entries) = config::parse(text) else {
        return;
    };
    let list = entries.iter().map(|entry| {
        let mut object = serde_json::Map::new();
        object.insert("method".into(), Value::from(entry.method.as_str()));
        if let Some(params) = &entry.params {
            object.insert("params".into(), Value::Object(params.clone()));
        }
        Value::Object(object)
    });
    let document = config::document(vec![("all".into(), list.collect())]);
    let again = config::parse(&config::render(&document, 2)).expect("it was written here");
    assert_eq!(entries, again);
}

/// Corrects the length and the checksum in the first line of a state file.
fn with_right_checksum(data: &[u8]) -> Vec<u8> {
    let end = data.iter().position(|byte| *byte == b'\n');
    let Some((line, body)) = end.and_then(|end| data.split_at_checked(end + 1)) else {
        return data.to_vec();
    };
    let line = String::from_utf8_lossy(line);
    let fields: Vec<&str> = line.split_whitespace().collect();
    let kept = fields[..fields.len().saturating_sub(2)].join(" ");
    let checksum = crc32fast::hash(body);
    let mut file = format!("{kept} {} {checksum:08x}\n", body.len()).into_bytes();
    file.extend_from_slice(body);
    file
}

/// A state file. The first byte says whether its checksum is made right. What is refused is left as it was.
pub fn state(data: &[u8]) {
    let Some((right, file)) = data.split_first() else {
        return;
    };
    let file = if right & 1 != 0 {
        with_right_checksum(file)
    } else {
        file.to_vec()
    };
    let dir = Dir::new();
    let path = dir.0.join("state");
    fs::write(&path, &file).expect("a writable folder");
    match Store::open(&dir.0) {
        Err(_) => assert_eq!(fs::read(&path).expect("it is there"), file),
        Ok((mut store, state)) => {
            let Ok(model) = Model::restore(state.expect("it was read")) else {
                return;
            };
            let kept = model.stored();
            store.save(&kept).expect("a writable folder");
            drop(store);
            let (_, again) = Store::open(&dir.0).expect("it was written here");
            assert_eq!(again, Some(kept));
        }
    }
}

/// A folder that is removed with the value.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Dir {
        let name = format!("ferry-fuzz-state-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).expect("a folder");
        Dir(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
