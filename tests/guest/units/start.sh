#!/bin/sh
# Runs systemd with Ferry's units inside a guest, as the first process of a container of that guest. /root.tar is a Debian
# tree with systemd and nothing else, /programs and /units are what is tested, and `check.sh` the service that tests it.
set -e
mkdir /new
mount -t tmpfs -o mode=755,size=300m root /new
tar -xf /root.tar -C /new
rm /root.tar
cd /new
mkdir -p etc/default proc sys dev tmp run results var/log root mnt home
chmod 1777 tmp
cp /bin/busybox usr/bin/
for applet in $(busybox --list); do
    [ -e usr/bin/$applet ] || [ -e usr/sbin/$applet ] || ln -s busybox usr/bin/$applet
done
mv /programs/* usr/bin/
cp /check.sh etc/check
printf 'root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n' > etc/passwd
printf 'root:x:0:\nnogroup:x:65534:\n' > etc/group
printf 'passwd: files systemd\ngroup: files systemd\n' > etc/nsswitch.conf
: > etc/machine-id
units=etc/systemd/system
mkdir -p $units/multi-user.target.wants $units/ferry-dataplane.service.d
cp /units/* $units/
# What an emulated machine without hugepages needs, and a watchdog that can be waited for.
cat > $units/ferry-dataplane.service.d/test.conf <<'UNIT'
[Service]
WatchdogSec=5
Environment="FERRY_DATAPLANE_OPTIONS=--cpumask=0x1 --no-huge"
UNIT
cat > $units/check.service <<'UNIT'
[Unit]
After=ferry-dataplane.service ferry-controlplane.service
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/sh /etc/check
StandardOutput=file:/results/check
StandardError=inherit
ExecStopPost=/usr/bin/systemctl --no-block exit
UNIT
ln -sf /usr/lib/systemd/system/multi-user.target $units/default.target
for unit in ferry-dataplane ferry-controlplane check; do
    ln -s ../$unit.service $units/multi-user.target.wants/
done
mount -o bind /results results
mount -o rbind /dev dev
# The root is moved, for what lives in a mere chroot may make no user namespaces.
cat > /enter <<'SHELL'
cd /new && mount -o move . / && exec chroot . /bin/sh -c '
    mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t cgroup2 cgroup2 /sys/fs/cgroup; mount -t tmpfs tmpfs /run
    exec env container=ferry /usr/lib/systemd/systemd --system --log-target=console --show-status=0'
SHELL
unshare --pid --fork --mount --ipc --uts sh /enter || true
cat /results/check
grep -q '^all is well' /results/check
