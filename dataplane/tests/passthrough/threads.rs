//! Several cores at once.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use ferry_dataplane::fsdev::FsDev as _;
use ferry_dataplane::fsdev::passthrough::Capacity;
use ferry_dataplane::fuse::abi::*;
use ferry_shared::errno::Errno;

use crate::rig::{ROOT, Rig, SetOnDrop, as_user, name, root};

/// A generator that is the same on every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// One guest thread: what it has looked up, and how often.
#[derive(Default)]
struct Guest {
    counts: HashMap<u64, u64>,
    inos: HashMap<u64, u64>,
}

impl Guest {
    fn note(&mut self, entry: &fuse_entry_out) {
        *self.counts.entry(entry.nodeid).or_default() += 1;
        // While it is counted, a node id names one inode.
        let ino = self.inos.entry(entry.nodeid).or_insert(entry.attr.ino);
        assert_eq!(*ino, entry.attr.ino);
    }

    fn forget_some(&mut self, rig: &Rig, dice: &mut Dice) {
        let mut ids: Vec<_> = self.counts.keys().copied().collect();
        ids.sort_unstable();
        ids.retain(|_| dice.roll(2) == 0);
        for id in ids {
            let count = self.counts[&id];
            let n = 1 + dice.roll(count);
            rig.fs.forget(id, n);
            if n == count {
                self.counts.remove(&id);
                self.inos.remove(&id);
            } else {
                self.counts.insert(id, count - n);
            }
        }
    }
}

fn play(rig: &Rig, seed: u64) {
    let mut dice = Dice(seed);
    let mut guest = Guest::default();
    let entries = ["a", "b", "c", "d", "e", "f"];
    for turn in 0..4_000 {
        let n = entries[dice.roll(6) as usize];
        match dice.roll(8) {
            0..=2 => match rig.look(ROOT, n) {
                Ok(entry) => guest.note(&entry),
                Err(errno) => assert_eq!(errno, Errno::ENOENT),
            },
            3 => {
                if let Ok((entry, open)) = rig.create_with(&root(), ROOT, n, libc::O_RDWR, 0o644, 0)
                {
                    guest.note(&entry);
                    rig.release(entry.nodeid, open.fh);
                }
            }
            4 => {
                let to = name(entries[dice.roll(6) as usize]);
                let _ = rig.fs.rename(&root(), ROOT, &name(n), ROOT, &to, 0);
            }
            5 => {
                let _ = rig.fs.unlink(&root(), ROOT, &name(n));
            }
            6 => {
                for e in rig
                    .list(ROOT, 4096, true)
                    .iter()
                    .filter_map(|e| e.entry.as_ref())
                {
                    if e.nodeid != 0 {
                        guest.note(e);
                    }
                }
            }
            _ => {
                for (id, ino) in &guest.inos {
                    match rig.fs.getattr(&root(), *id, None) {
                        Ok(out) => assert_eq!(out.attr.ino, *ino),
                        // It went cold, and its last name went afterwards.
                        Err(errno) => assert_eq!(errno, Errno::ESTALE),
                    }
                }
            }
        }
        if turn % 16 == 0 {
            guest.forget_some(rig, &mut dice);
        }
    }
    for (id, n) in guest.counts {
        rig.fs.forget(id, n);
    }
}

#[test]
fn threads_that_look_up_forget_rename_and_unlink_agree_on_every_inode() {
    for (base, hot) in [("/dev/shm", 8), ("/dev/shm", 1000), ("/tmp", 8)] {
        let capacity = Capacity {
            hot_inodes: hot,
            ..Default::default()
        };
        let rig = Rig::sized(base, capacity, |_| {});
        let fds = rig.fds();
        std::thread::scope(|scope| {
            for seed in 1..=4u64 {
                let rig = &rig;
                scope.spawn(move || play(rig, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            }
        });
        assert_eq!(rig.fs.usage(), (1, 0, 0));
        assert_eq!(rig.fds(), fds);
    }
}

#[test]
fn identities_do_not_leak_between_threads() {
    let rig = Rig::new();
    crate::rig::chmod(&rig.top, 0o777);
    std::thread::scope(|scope| {
        for id in 0..4u32 {
            let rig = &rig;
            scope.spawn(move || {
                for i in 0..500u32 {
                    let umask = if i % 2 == 0 { 0o077 } else { 0o002 };
                    let n = format!("t{id}-{i}");
                    let caller = as_user(id * 1000, id * 2000);
                    let (entry, open) = rig
                        .create_with(&caller, ROOT, &n, libc::O_RDWR, 0o666, umask)
                        .unwrap();
                    assert_eq!((entry.attr.uid, entry.attr.gid), (id * 1000, id * 2000));
                    assert_eq!(entry.attr.mode & 0o777, 0o666 & !umask);
                    rig.release(entry.nodeid, open.fh);
                }
            });
        }
    });
}

#[test]
fn an_unmount_under_traffic_ends_everything_and_hurts_nobody() {
    let rig = Rig::new();
    for i in 0..8 {
        fs::write(rig.top.join(format!("f{i}")), "text").unwrap();
    }
    let fds = rig.fds();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 1..=3u64 {
            let (rig, done) = (&rig, &done);
            scope.spawn(move || {
                let mut dice = Dice(seed);
                while !done.load(Ordering::Relaxed) {
                    let n = format!("f{}", dice.roll(8));
                    let Ok(entry) = rig.look(ROOT, &n) else {
                        continue;
                    };
                    let Ok(fh) = rig.open(entry.nodeid, libc::O_RDWR) else {
                        continue;
                    };
                    if let Ok(data) = rig.read(entry.nodeid, fh, 0, 4) {
                        assert_eq!(data, b"text");
                    }
                    let lk = fuse_file_lock {
                        type_: libc::F_RDLCK as u32,
                        ..Default::default()
                    };
                    let arg = fuse_lk_in {
                        fh,
                        owner: seed,
                        lk,
                        ..Default::default()
                    };
                    let _ = rig.fs.setlk(&root(), entry.nodeid, &arg, false);
                }
            });
        }
        let _end = SetOnDrop(&done);
        for _ in 0..200 {
            rig.mount(u64::MAX);
            rig.fs.unmount();
        }
    });
    assert_eq!(rig.fs.usage(), (1, 0, 0));
    assert_eq!(rig.look(ROOT, "f0").unwrap_err(), Errno::ENOTCONN);
    assert_eq!(rig.fds(), fds);
}
