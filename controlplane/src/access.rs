//! Who may call what: the credentials that the kernel gives of a connection's peer, and the rules of `--allow`.
//!
//! Without a rule, the mode and the group of the socket decide alone. With rules, root and the user of this process may
//! call everything, and everybody else what the rules of their groups name.

use core::fmt;
use core::str::FromStr;
use std::ffi::CString;

use nix::unistd::Gid;
use nix::unistd::Group;
use nix::unistd::Uid;
use nix::unistd::User;
use nix::unistd::geteuid;
use nix::unistd::getgrouplist;

use crate::rpc::table;

/// A group and the methods that its members may call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    group: Gid,
    /// `None`: all.
    methods: Option<Vec<&'static str>>,
}

/// Looks a group up by its name or number.
pub fn parse_group(text: &str) -> Result<Gid, String> {
    if let Ok(number) = text.parse() {
        return Ok(Gid::from_raw(number));
    }
    match Group::from_name(text) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => Err(format!("there is no group {text:?}")),
        Err(errno) => Err(format!("group {text:?} cannot be looked up: {errno}")),
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Rule, String> {
        let (group, methods) = text
            .split_once(':')
            .ok_or("a rule is GROUP:METHOD,METHOD or GROUP:*")?;
        let group = parse_group(group)?;
        if methods == "*" {
            return Ok(Rule {
                group,
                methods: None,
            });
        }
        let known = |name: &str| {
            table::find(name)
                .filter(|method| method.is_remote())
                .map(|method| method.name)
                .ok_or_else(|| format!("there is no method {name:?}"))
        };
        let methods: Result<_, _> = methods.split(',').map(known).collect();
        Ok(Rule {
            group,
            methods: Some(methods?),
        })
    }
}

/// The peer of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process, as far as it is in sight of this one.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: Uid,
    /// Its group.
    pub gid: Gid,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "user {} of group {}", self.uid, self.gid)
    }
}

/// What a peer may call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Everything.
    All,
    /// These methods.
    Only(Vec<&'static str>),
}

impl Grant {
    /// Whether a method is among them.
    pub fn includes(&self, method: &str) -> bool {
        match self {
            Grant::All => true,
            Grant::Only(methods) => methods.contains(&method),
        }
    }
}

/// The groups of a peer: its own, and those that the user database gives to its user.
fn groups(peer: &Peer) -> Vec<Gid> {
    let mut groups = vec![peer.gid];
    if let Ok(Some(user)) = User::from_uid(peer.uid)
        && let Ok(name) = CString::new(user.name)
    {
        groups.extend(getgrouplist(&name, user.gid).unwrap_or_default());
    }
    groups
}

/// What the rules grant to a peer.
pub fn grant(rules: &[Rule], peer: &Peer) -> Grant {
    if rules.is_empty() || peer.uid.is_root() || peer.uid == geteuid() {
        return Grant::All;
    }
    granted(rules, &groups(peer))
}

fn granted(rules: &[Rule], groups: &[Gid]) -> Grant {
    let mut methods = Vec::new();
    for rule in rules.iter().filter(|rule| groups.contains(&rule.group)) {
        match &rule.methods {
            None => return Grant::All,
            Some(named) => methods.extend(named),
        }
    }
    Grant::Only(methods)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(texts: &[&str]) -> Vec<Rule> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn members_may_call_what_any_of_their_groups_may() {
        let rules = rules(&[
            "7:rpc_get_methods,fsdev_get_fsdevs",
            "8:spdk_get_version",
            "9:*",
        ]);
        let of = |groups: &[u32]| {
            let groups: Vec<Gid> = groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
            granted(&rules, &groups)
        };
        assert_eq!(of(&[9, 7]), Grant::All);
        assert_eq!(of(&[1]), Grant::Only(Vec::new()));
        let both = of(&[7, 8]);
        for method in ["rpc_get_methods", "fsdev_get_fsdevs", "spdk_get_version"] {
            assert!(both.includes(method), "{method}");
        }
        assert!(!both.includes("virtio_fs_device_start"));
        assert!(!of(&[8]).includes("rpc_get_methods"));
    }

    #[test]
    fn without_rules_and_for_the_own_user_everything_is_allowed() {
        let stranger = Peer {
            pid: None,
            uid: Uid::from_raw(12_345_678),
            gid: Gid::from_raw(12_345_678),
        };
        let own = Peer {
            uid: geteuid(),
            ..stranger.clone()
        };
        let rules = rules(&["7:rpc_get_methods"]);
        assert_eq!(grant(&[], &stranger), Grant::All);
        assert_eq!(grant(&rules, &own), Grant::All);
        assert_eq!(grant(&rules, &stranger), Grant::Only(Vec::new()));
    }

    #[test]
    fn older_names_of_methods_mean_the_same() {
        let rules = rules(&["7:get_rpc_methods"]);
        assert!(granted(&rules, &[Gid::from_raw(7)]).includes("rpc_get_methods"));
    }

    #[test]
    fn mistakes_in_rules_name_their_culprit() {
        for (text, culprit) in [
            ("7", "GROUP:METHOD"),
            ("no-such-group-here:*", "no-such-group-here"),
            ("7:rpc_get_methods,bogus", "bogus"),
            ("7:save_config", "save_config"),
            ("7:", "\"\""),
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert!(error.contains(culprit), "{text}: {error}");
        }
    }
}
