//! What a Linux guest can do to a function with its own drivers: look at it, reset it, take the driver away and give it
//! back, and reboot, with and without work under way.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Device, Guest, Kernel, Outcome, Service, TempDir, binary, need, wait_until};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(600);
const TAG: &str = "docatag";

/// Cycles of unbinding and binding; a number in `FERRY_BIND_CYCLES` asks for more.
fn cycles() -> u32 {
    let asked = std::env::var("FERRY_BIND_CYCLES").ok();
    asked.and_then(|n| n.parse().ok()).unwrap_or(5)
}

/// What every guest script begins with: the function, its driver, and work on the mount.
const PRELUDE: &str = "
for f in /sys/bus/pci/devices/*; do
    read -r device < $f/device; [ $device != 0x105a ] || function=$f
done
name=${function##*/}
driver=/sys/bus/pci/drivers/virtio-pci
fail() { echo \"FAILED: $*\"; exit 1; }
mkdir -p /mnt
work() {
    mount -t virtiofs docatag /mnt || fail mount
    dd if=/dev/urandom of=/mnt/data bs=64k count=8 2>/dev/null || fail write
    sum=$(sha256sum < /mnt/data); echo 3 > /proc/sys/vm/drop_caches
    [ \"$sum\" = \"$(sha256sum < /mnt/data)\" ] || fail compare
    umount /mnt || fail umount
}
unbind() { echo $name > $driver/unbind || fail unbind; }
bind() { echo $name > $driver/bind || fail bind; }
";

/// Runs a script in a guest that has one function, and gives what it printed.
fn run(guest: Guest, script: &str) -> Result<Outcome> {
    let (mut service, _export) = Service::start_exporting("")?;
    let socket = service.start_doca_device("vfsdev0", TAG, "aio0")?;
    let outcome = guest
        .device(Device::VfioUser(socket))
        .run(&format!("{PRELUDE}{script}"), LIMIT)
        .with_context(|| format!("service:\n{}", service.log()))?;
    println!("{}", outcome.output);
    ensure!(
        outcome.status == 0,
        "{}\n{}\nservice:\n{}",
        outcome.output,
        outcome.dmesg,
        service.log()
    );
    for bad in ["BUG:", "WARNING:", "Oops", "hung_task"] {
        ensure!(!outcome.dmesg.contains(bad), "{}", outcome.dmesg);
    }
    service.call("virtio_fs_device_stop --dev-name vfsdev0")?;
    service.call("virtio_fs_device_destroy --dev-name vfsdev0")?;
    service.stop()?;
    Ok(outcome)
}

#[test]
fn a_function_is_what_lspci_expects_in_a_linux_guest() {
    need!(binary("ferry"));
    let guest = need!(Guest::qemu(Kernel::Forky));
    let guest = need!(guest.program("bin/pci", Path::new("/usr/bin/lspci")));
    let outcome = run(guest, "pci -vvv -n -s ${name#*:} && work\n").unwrap();
    for line in [
        "1af4:105a",
        "64-bit, prefetchable",
        "Express (v2)",
        "FLReset+",
        "Power Management version 3",
        "MSI-X: Enable+ Count=10 Masked-",
        "VirtIO: CommonCfg",
        "VirtIO: ISR",
        "VirtIO: DeviceCfg",
        "VirtIO: Notify",
    ] {
        assert!(
            outcome.output.contains(line),
            "no {line} in {}",
            outcome.output
        );
    }
}

#[test]
fn a_function_works_after_its_reset_through_sysfs_in_a_linux_guest() {
    need!(binary("ferry"));
    let guest = need!(Guest::qemu(Kernel::Forky));
    let script = "
        cat $function/reset_method
        work
        unbind; echo 1 > $function/reset || fail reset; bind
        work
        echo 1 > $function/reset || fail 'reset with a driver'
        unbind; bind
        work
        echo DONE\n";
    run(guest, script).unwrap();
}

#[test]
fn the_driver_goes_and_comes_again_and_again_in_a_linux_guest() {
    need!(binary("ferry"));
    let guest = need!(Guest::qemu(Kernel::Forky));
    let cycles = cycles();
    let script = format!(
        "for n in $(seq {cycles}); do work; unbind; bind; done; work; echo {cycles} cycles\n"
    );
    run(guest, &script).unwrap();
}

#[test]
fn a_guest_that_reboots_finds_its_function_again_in_a_linux_guest() {
    need!(binary("ferry"));
    let guest = need!(Guest::qemu(Kernel::Forky)).reboots();
    // It reboots in the middle of writing, and without unmounting anything.
    let script = "
        mount -t virtiofs docatag /mnt || fail mount
        boot=$(cat /mnt/boots 2>/dev/null); boot=$((boot + 1)); echo $boot > /mnt/boots; sync
        echo boot $boot
        if [ $boot -lt 4 ]; then
            (while :; do dd if=/dev/zero of=/mnt/busy bs=4k count=256 conv=fsync; done) 2>/dev/null &
            until [ -s /mnt/busy ]; do :; done
            reboot -f
        fi
        umount /mnt; work\n";
    let outcome = run(guest, script).unwrap();
    assert!(outcome.output.contains("boot 4"), "{}", outcome.output);
}

/// The guest's driver cannot give back requests that went down with the function, and waits for them for ever; the function
/// itself is as new for the kernel that comes next.
#[test]
fn a_function_that_was_reset_during_work_works_for_the_next_kernel_in_a_linux_guest() {
    need!(binary("ferry"));
    let guest = need!(Guest::qemu(Kernel::Forky)).reboots();
    let script = "
        mount -t virtiofs docatag /mnt || fail mount
        boot=$(cat /mnt/boots 2>/dev/null); boot=$((boot + 1)); echo $boot > /mnt/boots; sync
        if [ $boot -lt 4 ]; then
            (while :; do dd if=/dev/zero of=/mnt/busy$boot bs=4k count=256 conv=fsync; done) 2>/dev/null &
            until [ -s /mnt/busy$boot ]; do :; done
            echo 1 > $function/reset || fail reset
            echo b > /proc/sysrq-trigger
        fi
        umount /mnt; work; echo boot $boot\n";
    let outcome = run(guest, script).unwrap();
    assert!(outcome.output.contains("boot 4"), "{}", outcome.output);
}

/// Sends QEMU commands, and waits for the answer to each.
fn command_qemu(qmp: &Path, commands: &[serde_json::Value]) -> Result<()> {
    wait_until("QEMU listens", LIMIT, || Ok(qmp.exists()))?;
    let stream = UnixStream::connect(qmp).context("connect to QEMU")?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let hello = serde_json::json!({ "execute": "qmp_capabilities" });
    for command in std::iter::once(&hello).chain(commands) {
        writeln!(&stream, "{command}")?;
        loop {
            let line = lines.next().context("QEMU has closed its socket")??;
            ensure!(!line.contains("\"error\""), "{command}: {line}");
            if line.contains("\"return\"") {
                break;
            }
        }
    }
    Ok(())
}

/// Memory that comes while requests are under way is used for them, once the guest has it.
#[test]
fn memory_that_is_added_during_work_is_used_for_it_in_a_linux_guest() {
    need!(binary("ferry"));
    let dir = TempDir::new();
    let qmp = dir.join("qmp");
    let guest = need!(Guest::qemu(Kernel::Forky)).memory_slot(&qmp);
    let (service, _export) = Service::start_exporting("").unwrap();
    let socket = service.start_doca_device("vfsdev0", TAG, "aio0").unwrap();
    // More than the machine began with goes through memory, so that some of it is new.
    let script = "
        echo online > /sys/devices/system/memory/auto_online_blocks
        mount -t virtiofs docatag /mnt || fail mount
        (until [ -e /stop ]; do dd if=/dev/zero of=/mnt/busy bs=64k count=64 conv=fsync; done) 2>/dev/null &
        total() { sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; }
        before=$(total)
        echo READY
        until [ $(total) -gt $((before + 600000)) ]; do usleep 100000; done
        mkdir /big; mount -t tmpfs -o size=900m big /big
        dd if=/dev/zero of=/big/fill bs=1M count=420 2>/dev/null || fail fill
        dd if=/dev/urandom of=/big/data bs=1M count=32 2>/dev/null || fail data
        cp /big/data /mnt/data || fail write
        echo 3 > /proc/sys/vm/drop_caches
        cmp /big/data /mnt/data || fail compare
        touch /stop; wait; umount /mnt || fail umount
        echo DONE\n";
    let run = || -> Result<Outcome> {
        let mut guest = guest
            .device(Device::VfioUser(socket))
            .start(&format!("{PRELUDE}{script}"))?;
        guest.wait_for("READY", LIMIT)?;
        let size: u64 = 768 << 20;
        command_qemu(
            &qmp,
            &[
                serde_json::json!({ "execute": "object-add", "arguments": {
                    "qom-type": "memory-backend-memfd", "id": "more", "size": size, "share": true } }),
                serde_json::json!({ "execute": "device_add", "arguments": {
                    "driver": "pc-dimm", "id": "dimm", "memdev": "more" } }),
            ],
        )?;
        guest.wait(LIMIT)
    };
    let outcome = run().with_context(|| service.log()).unwrap();
    assert_eq!(outcome.status, 0, "{}\n{}", outcome.output, outcome.dmesg);
}
