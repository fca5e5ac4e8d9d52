//! Who a caller is in the host, and who an owner is in the guest.
//!
//! Ids are mapped by ranges. An id of the guest without a counterpart cannot act or be given anything; an owner in the
//! host without one is shown as nobody, as Linux does. A squashed caller acts as nobody too, and because the guest's
//! kernel would let its superuser do everything, what it asks for is done, or checked, with that user's rights here.

use core::mem::size_of;

use ferry_shared::errno::Errno;
use ferry_shared::export::Squash;

use super::identity::Identity;
use super::sys::{self, Stat};
use super::{Passthrough, attr};
use crate::fsdev::Caller;
use crate::fuse::abi::{FUSE_ALLOW_IDMAP, FUSE_INVALID_UIDGID, fuse_attr};

/// An ACL as an extended attribute: a version, and entries of tag, permissions and id.
const ACL_HEADER: usize = 4;
const ACL_ENTRY: usize = 8;
const ACL_USER: u16 = 0x02;
const ACL_GROUP: u16 = 0x08;
/// Longest ACL whose ids are mapped; Linux's own file systems keep far less.
pub(super) const MAX_ACL: usize = ACL_HEADER + 512 * ACL_ENTRY;

impl Passthrough {
    /// `EROFS` where the guest can change nothing.
    pub(super) fn expect_writable(&self) -> Result<(), Errno> {
        if self.spec.export.read_only {
            Err(Errno::EROFS)
        } else {
            Ok(())
        }
    }

    pub(super) fn is_squashed(&self, caller: &Caller<'_>) -> bool {
        self.spec.export.squash.applies_to(caller.uid)
    }

    /// Whether the guest does not say who asks, as one with mapped ids does for most requests.
    pub(super) fn is_untold(&self, caller: &Caller<'_>) -> bool {
        caller.uid == FUSE_INVALID_UIDGID && self.has(FUSE_ALLOW_IDMAP)
    }

    /// The caller as the host knows it.
    fn in_host<'c>(&self, caller: &Caller<'c>) -> Result<Caller<'c>, Errno> {
        let export = &self.spec.export;
        if self.is_squashed(caller) {
            return Ok(Caller {
                uid: export.anon_uid,
                gid: export.anon_gid,
                supplementary_group: None,
                ..*caller
            });
        }
        let group = |gid: u32| match export.squash {
            Squash::Root if gid == 0 => Ok(export.anon_gid),
            _ => export.map_gid.to_host(gid).ok_or(Errno::EOVERFLOW),
        };
        Ok(Caller {
            uid: export.map_uid.to_host(caller.uid).ok_or(Errno::EOVERFLOW)?,
            gid: group(caller.gid)?,
            supplementary_group: caller.supplementary_group.map(group).transpose()?,
            ..*caller
        })
    }

    /// Acts as the caller, see [`Identity::assume`].
    pub(super) fn act_as(&self, caller: &Caller<'_>, umask: u32) -> Result<Identity, Errno> {
        let identity = Identity::assume(&self.in_host(caller)?, umask)?;
        if caller.uid == 0 && !self.is_squashed(caller) && !self.spec.export.map_uid.is_identity() {
            // The guest's superuser is an ordinary user here, who may do everything in the export.
            sys::raise_capabilities()?;
        }
        Ok(identity)
    }

    /// Acts as the caller if it is squashed, and as the service if not.
    pub(super) fn act_if_squashed(&self, caller: &Caller<'_>) -> Result<Option<Identity>, Errno> {
        if self.is_squashed(caller) {
            Identity::assume(&self.in_host(caller)?, 0).map(Some)
        } else {
            Ok(None)
        }
    }

    /// Whether a squashed caller has these rights (`R_OK`, `W_OK`, `X_OK`) to the inode behind `fd`.
    pub(super) fn demand(&self, caller: &Caller<'_>, fd: i32, mask: i32) -> Result<(), Errno> {
        match self.act_if_squashed(caller)? {
            Some(_caller) => sys::access(fd, mask as u32),
            None => Ok(()),
        }
    }

    /// The host's owner for one that a guest wants to give; `None` stays.
    pub(super) fn owner_in_host(
        &self,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> Result<(u32, u32), Errno> {
        let (users, groups) = (&self.spec.export.map_uid, &self.spec.export.map_gid);
        let found = |mapped: Option<u32>| mapped.ok_or(Errno::EINVAL);
        Ok((
            uid.map_or(Ok(u32::MAX), |id| found(users.to_host(id)))?,
            gid.map_or(Ok(u32::MAX), |id| found(groups.to_host(id)))?,
        ))
    }

    /// The attributes with the guest's ids.
    pub(super) fn attr(&self, stat: &Stat) -> fuse_attr {
        let (users, groups) = (&self.spec.export.map_uid, &self.spec.export.map_gid);
        let attr = attr::from_stat(stat);
        fuse_attr {
            uid: users.to_guest(attr.uid),
            gid: groups.to_guest(attr.gid),
            ..attr
        }
    }

    /// Whether ACLs need [`Passthrough::map_acl`].
    pub(super) fn maps_ids(&self) -> bool {
        !self.spec.export.map_uid.is_identity() || !self.spec.export.map_gid.is_identity()
    }

    /// Maps the ids of an ACL, in place.
    pub(super) fn map_acl(&self, acl: &mut [u8], to_host: bool) -> Result<(), Errno> {
        let entries = acl.get_mut(ACL_HEADER..).unwrap_or_default();
        for entry in entries.chunks_exact_mut(ACL_ENTRY) {
            let Some((head, id)) = entry.split_at_mut_checked(size_of::<u32>()) else {
                continue;
            };
            let tag = head.first_chunk().map_or(0, |b| u16::from_le_bytes(*b));
            let map = match tag {
                ACL_USER => &self.spec.export.map_uid,
                ACL_GROUP => &self.spec.export.map_gid,
                _ => continue,
            };
            if let Some(id) = id.first_chunk_mut() {
                let given = u32::from_le_bytes(*id);
                let mapped = if to_host {
                    map.to_host(given).ok_or(Errno::EINVAL)?
                } else {
                    map.to_guest(given)
                };
                *id = mapped.to_le_bytes();
            }
        }
        Ok(())
    }
}
