use super::*;

#[test]
fn a_word_holds_every_state_that_a_session_can_have() {
    for mounted in [false, true] {
        for minor in [27, 38, 45] {
            for set in 0..16u32 {
                let flags = (0..4)
                    .filter(|bit| set & (1 << bit) != 0)
                    .fold(0, |flags, bit| flags | Word::KEPT[bit]);
                for epoch in [0, 1, u32::MAX] {
                    let word = Word {
                        mounted,
                        protocol: Protocol { minor, flags },
                        epoch,
                    };
                    assert_eq!(Word::unpack(word.pack()), word);
                }
            }
        }
    }
    let all = Word::KEPT.iter().fold(0, |flags, flag| flags | flag);
    assert_eq!(all, Protocol::FLAGS);
    assert_eq!(Word::unpack(0), Word::default());
}

#[test]
fn nobody_keeps_a_flag_twice() {
    assert_eq!(SESSION_FLAGS & BACKEND_FLAGS, 0);
}

/// A backend whose mount is still going on while another request for it arrives.
struct Reentrant {
    session: Session,
}

impl FsDev for Reentrant {
    fn offer(&self) -> Offer {
        Offer {
            flags: 0,
            max_write: 4096,
            max_readahead: 0,
        }
    }

    fn mount(&self, _: Negotiated) -> Result<(), Errno> {
        assert!(!self.session.mounted());
        assert_eq!(self.session.init(self, &asked()), Err(Errno::EBUSY));
        assert_eq!(self.session.destroy(self), Err(Errno::EBUSY));
        Ok(())
    }

    fn unmount(&self) {
        assert!(!self.session.mounted());
    }

    fn may_block(&self, _: u32) -> bool {
        false
    }
}

fn asked() -> Init {
    Init {
        major: 7,
        minor: 45,
        wishes: Some(InitWishes::default()),
    }
}

#[test]
fn nobody_waits_while_a_mount_begins_or_ends() {
    let fs = Reentrant {
        session: Session::default(),
    };
    assert!(fs.session.init(&fs, &asked()).is_ok());
    assert!(fs.session.mounted());
    assert_eq!(fs.session.destroy(&fs), Ok(()));
    assert_eq!(fs.session.epoch(), 2);
}
