//! The data plane is killed, again and again, under a Linux guest that works on its own mount: no call fails there, no byte is
//! wrong, no name is lost or doubled, no task hangs.

use anyhow::{Context, Result, ensure};
use ferry_tests::{
    Device, Guest, Kernel, Numbers, Rigs, RunningGuest, Service, TempDir, build_checks, need,
    wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::times;

/// How often the data plane is killed under each guest, unless `FERRY_KILLS` says otherwise.
const KILLS: usize = 8;
/// What the guest has looked up, and how much of that it keeps open. An emulated processor takes minutes for so much, so
/// that there it is a tenth, unless `FERRY_KILLS` asks for more than usual.
const FILES: usize = 10_000;
const OPENED: usize = 1_000;
const TAG: &str = "endures";
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const LIMIT: Duration = Duration::from_secs(120);
/// What fsx does: everything that a guest's kernel has a request for.
const FSX: &str = "flen = 262144\n[opsize]\nmax = 65536\n[weights]\nclose_open = 1\ninvalidate = 1\nmapread = 5\nmapwrite = 5\n\
                   read = 10\nwrite = 10\ntruncate = 3\nfsync = 1\nfdatasync = 1\nposix_fallocate = 2\npunch_hole = 2\n\
                   copy_file_range = 3\n";

/// Ends with 0 when both loads came to their end without a complaint. Feature 34 is `VIRTIO_F_RING_PACKED`.
fn script(kind: Kind, seed: usize) -> String {
    let packed = u8::from(kind.packed);
    let (files, opened) = kind.held();
    format!(
        "[ ! -e /proc/sys/kernel/hung_task_timeout_secs ] || echo 20 > /proc/sys/kernel/hung_task_timeout_secs
         mount -t virtiofs {TAG} /mnt || exit 1
         packed=$(cut -c35 /sys/bus/virtio/drivers/virtiofs/virtio*/features)
         [ $packed = {packed} ] || {{ echo packed rings: $packed; exit 1; }}
         mkdir /mnt/work /mnt/fsx || exit 1
         (n={seed}; until [ -e /mnt/work/progress -o -e /mnt/stop ]; do usleep 100000; done
          while [ ! -e /mnt/stop ]; do
              n=$((n + 1)); /bin/fsx -N 300 -S $n -f /fsx.toml -P /tmp /mnt/fsx/file > /tmp/fsx.log 2>&1 || {{
                  echo fsx with seed $n; tail -n 50 /tmp/fsx.log; exit 1; }}
          done; echo fsx: $((n - {seed})) seeds) & fsx=$!
         ln -s ../many /mnt/work/many; echo READY
         /checks endure /mnt/work {seed} {files} {opened}; status=$?
         touch /mnt/stop
         wait $fsx || status=1
         umount /mnt || status=1
         exit $status\n"
    )
}

struct Rig {
    service: Service,
    export: PathBuf,
    guest: RunningGuest,
}

impl Rig {
    fn start(guest: Guest, kind: Kind, seed: usize) -> Result<Rig> {
        let (service, export) = Service::start_exporting("--enable-xattr")?;
        let many = export.join("many");
        fs::create_dir(&many)?;
        for n in 0..kind.held().0 {
            fs::write(many.join(format!("file-{n}")), n.to_string())?;
        }
        let device = kind.start(&service)?;
        let scratch = TempDir::new();
        fs::write(scratch.join("fsx.toml"), FSX)?;
        let guest = guest
            .device(device)
            .file("checks", &build_checks(scratch.path())?)
            .file("fsx.toml", &scratch.join("fsx.toml"))
            .program("bin/fsx", &fsx()?)?
            .start(&script(kind, seed))?;
        Ok(Rig {
            service,
            export,
            guest,
        })
    }

    /// How many answers the guest's first process has seen.
    fn answers(&self) -> Result<u64> {
        let mut count = [0; 8];
        let path = self.export.join("work/progress");
        let file = fs::File::open(&path).with_context(|| path.display().to_string())?;
        file.read_exact_at(&mut count, 0)?;
        Ok(u64::from_ne_bytes(count))
    }

    fn wait_for_answers(&mut self, more: u64) -> Result<()> {
        let wanted = self.answers()? + more;
        let waited = wait_until("requests are answered", LIMIT, || {
            Ok(self.answers()? >= wanted)
        });
        waited.with_context(|| format!("the guest's console:\n{}", self.guest.console()))
    }

    /// Kills the data plane when the machine has connected and its driver may not have begun.
    fn kill_while_it_boots(&self) -> Result<()> {
        wait_until("the machine has connected", BOOT_LIMIT, || {
            let devices = self.service.call("virtio_fs_get_devices")?;
            Ok(devices[0]["connected"] == true)
        })?;
        let old = self.service.child("ferry-dataplane")?;
        kill(old, Signal::SIGKILL).context("kill the data plane")?;
        self.next_data_plane(old).map(drop)
    }

    /// Kills the data plane somewhere in its work, and gives the time until the guest's next request was done.
    fn kill_once(&mut self, numbers: &mut Numbers) -> Result<Duration> {
        self.wait_for_answers(5 + numbers.below(100) as u64)?;
        // Nothing but the moment of the kill depends on this.
        (0..numbers.below(400_000)).for_each(|_| core::hint::spin_loop());
        let old = self.service.child("ferry-dataplane")?;
        let began = Instant::now();
        kill(old, Signal::SIGKILL).context("kill the data plane")?;
        wait_until("it is dead", LIMIT, || {
            Ok(!Path::new(&format!("/proc/{old}/fdinfo/0")).exists())
        })?;
        let before = self.answers()?;
        self.next_data_plane(old)?;
        let answered = wait_until("a request is answered", LIMIT, || {
            Ok(self.answers()? > before)
        });
        answered.with_context(|| format!("the guest's console:\n{}", self.guest.console()))?;
        Ok(began.elapsed())
    }

    fn next_data_plane(&self, old: Pid) -> Result<Pid> {
        self.service.next_child("ferry-dataplane", Some(old))
    }

    /// The guest ends its work; what it says, and what is left on the export.
    fn finish(self) -> Result<()> {
        let Rig {
            mut service,
            export,
            guest,
        } = self;
        fs::write(export.join("work/stop"), "")?;
        let outcome = guest.wait(BOOT_LIMIT)?;
        println!("{}", outcome.output);
        ensure!(
            outcome.status == 0,
            "the guest says:\n{}\n{}",
            outcome.output,
            outcome.dmesg
        );
        for bad in ["BUG:", "WARNING:", "Oops", "blocked for more than", "rror"] {
            ensure!(
                !outcome.dmesg.contains(bad),
                "the guest's kernel complains:\n{}",
                outcome.dmesg
            );
        }
        for emptied in ["names-1", "names-2"] {
            let left = fs::read_dir(export.join("work").join(emptied))?.count();
            ensure!(left == 0, "{left} names are left in {emptied}");
        }
        let log = fs::read(export.join("work/log"))?;
        let mut numbers = log.as_chunks::<4>().0.iter().zip(0u32..);
        ensure!(
            numbers.all(|(found, wanted)| u32::from_ne_bytes(*found) == wanted),
            "the log is out of order"
        );
        service.stop()
    }
}

fn fsx() -> Result<PathBuf> {
    let path = Rigs::find(&[])?.path("posix/bin/fsx");
    ensure!(
        path.exists(),
        "no {}: tools/test posix installs it",
        path.display()
    );
    Ok(path)
}

fn endures(guest: Guest, kind: Kind, seed: usize) -> Result<()> {
    let mut rig = Rig::start(guest, kind, seed)?;
    let mut pauses = Vec::new();
    let killed = (|| -> Result<()> {
        rig.kill_while_it_boots()?;
        rig.guest.wait_for("READY", BOOT_LIMIT)?;
        let ready = wait_until("the guest works", BOOT_LIMIT, || {
            ensure!(
                !rig.guest.console().contains("a process has ended"),
                "it has failed"
            );
            Ok(rig.answers().is_ok())
        });
        ready.with_context(|| format!("the guest's console:\n{}", rig.guest.console()))?;
        let mut numbers = Numbers(seed as u64);
        for round in 0..times(KILLS)? {
            let pause = rig.kill_once(&mut numbers);
            pauses.push(pause.with_context(|| format!("kill {round}"))?);
        }
        Ok(())
    })();
    killed.with_context(|| format!("log of the service:\n{}", rig.service.log()))?;
    let log = rig.service.log();
    rig.finish()
        .with_context(|| format!("log of the service:\n{log}"))?;
    pauses.sort_unstable();
    let at = |part: usize| pauses.get((pauses.len() * part).div_ceil(100).saturating_sub(1));
    let (files, opened) = kind.held();
    println!(
        "{} kills with {files} inodes known and {opened} files open; from the kill to the next request done: median {:?}, \
         p99 {:?}",
        pauses.len(),
        at(50),
        at(99)
    );
    Ok(())
}

/// A transport, and whether the rings are packed.
#[derive(Clone, Copy)]
struct Kind {
    vfio_user: bool,
    packed: bool,
}

impl Kind {
    /// How many files the guest knows, and how many it has open.
    fn held(self) -> (usize, usize) {
        let all = !self.vfio_user || std::env::var_os("FERRY_KILLS").is_some();
        let part = if all { 1 } else { 10 };
        (FILES / part, OPENED / part)
    }

    fn start(self, service: &Service) -> Result<Device> {
        let options = if self.packed { "--packed-vq" } else { "" };
        Ok(if self.vfio_user {
            Device::VfioUser(service.start_doca_device_with("vfsdev0", TAG, "aio0", options)?)
        } else {
            let socket = service.start_vhost_user_device_with("vfsdev0", TAG, "aio0", options)?;
            Device::VhostUser {
                socket,
                tag: TAG.to_owned(),
            }
        })
    }
}

fn check(vfio_user: bool, packed: bool, seed: usize) {
    let guest = if vfio_user {
        need!(Guest::qemu(Kernel::Forky))
    } else {
        need!(Guest::user_mode())
    };
    need!(fsx());
    let kind = Kind { vfio_user, packed };
    endures(guest, kind, seed).unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn kills_over_vhost_user_are_only_pauses_in_a_linux_guest() {
    check(false, false, 0xb0a7);
}

#[test]
fn kills_over_vhost_user_with_packed_rings_are_only_pauses_in_a_linux_guest() {
    check(false, true, 0x1dea);
}

#[test]
fn kills_over_vfio_user_are_only_pauses_in_a_linux_guest() {
    check(true, false, 0xfe44);
}

#[test]
fn kills_over_vfio_user_with_packed_rings_are_only_pauses_in_a_linux_guest() {
    check(true, true, 0x0dd5);
}
