//! The first message of a connection.
//!
//! Its JSON is read for one number only; what else a client can do changes nothing here.

use ferry_shared::limits::MAX_MEMORY_REGIONS;
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{MAX_DATA_XFER, MAX_MSG_FDS, VERSION_MAJOR, VERSION_MINOR, Version};

/// What the client has told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Client {
    /// The protocol's minor version to speak.
    pub(crate) minor: u16,
    /// File descriptors that it takes in one message.
    pub(crate) max_fds: usize,
}

/// Reads the version message; `None` if the client speaks another protocol.
pub(crate) fn parse(payload: &[u8]) -> Option<Client> {
    let (version, json) = Version::read_from_prefix(payload).ok()?;
    if version.major != VERSION_MAJOR {
        return None;
    }
    let max_fds = number_after(json, b"\"max_msg_fds\"").unwrap_or(1);
    Some(Client {
        minor: version.minor.min(VERSION_MINOR),
        max_fds: max_fds.min(MAX_MSG_FDS),
    })
}

/// The number that follows a key; tolerant of everything around it.
fn number_after(json: &[u8], key: &[u8]) -> Option<usize> {
    let at = json.windows(key.len()).position(|w| w == key)?;
    let rest = json.get(at.checked_add(key.len())?..)?;
    let digits = rest
        .iter()
        .skip_while(|b| b.is_ascii_whitespace() || **b == b':')
        .take_while(|b| b.is_ascii_digit());
    let mut number = None;
    for digit in digits {
        let before: usize = number.unwrap_or(0);
        number = Some(
            before
                .saturating_mul(10)
                .saturating_add(usize::from(digit & 0xf)),
        );
    }
    number
}

/// The answer.
pub(crate) fn reply(client: Client) -> Vec<u8> {
    let version = Version {
        major: VERSION_MAJOR,
        minor: client.minor,
    };
    let json = format!(
        "{{\"capabilities\":{{\"max_msg_fds\":{MAX_MSG_FDS},\"max_data_xfer_size\":{MAX_DATA_XFER},\
         \"max_dma_maps\":{MAX_MEMORY_REGIONS},\"pgsizes\":4096}}}}\0"
    );
    let mut reply = version.as_bytes().to_vec();
    reply.extend_from_slice(json.as_bytes());
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(major: u16, minor: u16, json: &str) -> Vec<u8> {
        let mut m = Version { major, minor }.as_bytes().to_vec();
        m.extend_from_slice(json.as_bytes());
        m
    }

    #[test]
    fn the_lower_minor_version_is_spoken_and_another_major_refused() {
        assert_eq!(parse(&message(0, 0, "")).unwrap().minor, 0);
        assert_eq!(parse(&message(0, 9, "")).unwrap().minor, VERSION_MINOR);
        assert_eq!(parse(&message(1, 0, "")), None);
        assert_eq!(parse(&[0, 0, 1]), None);
    }

    #[test]
    fn the_number_of_descriptors_is_found_or_one() {
        let fds = |json| parse(&message(0, 1, json)).unwrap().max_fds;
        assert_eq!(fds(""), 1);
        assert_eq!(
            fds("{\"capabilities\": {\"max_msg_fds\" : 8, \"x\": 9}}\0"),
            8
        );
        assert_eq!(
            fds("{\"capabilities\":{\"max_msg_fds\":99999999999999999999999}}"),
            MAX_MSG_FDS
        );
        for odd in [
            "{\"max_msg_fds\"",
            "{\"max_msg_fds\":",
            "{\"max_msg_fds\":\"8\"}",
            "\"max_msg_fds\":-3",
        ] {
            assert_eq!(fds(odd), 1, "{odd}");
        }
    }

    #[test]
    fn the_reply_is_terminated_text() {
        let reply = reply(Client {
            minor: 1,
            max_fds: 1,
        });
        assert_eq!(&reply[..4], &[0, 0, 1, 0]);
        assert_eq!(reply.last(), Some(&0));
        assert!(reply[4..].starts_with(b"{\"capabilities\":{"));
    }
}
