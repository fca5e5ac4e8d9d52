#!/bin/sh
# The units as systemd runs them: a service of the same systemd works through everything that Ferry must survive.
fail() { echo "FAILED: $*"; systemctl status --no-pager -n 30 ferry-dataplane ferry-controlplane; exit 1; }
# soon WHAT COMMAND...: the command succeeds before long.
soon() {
    what=$1; shift
    deadline=$(($(cut -d. -f1 /proc/uptime) + 120))
    until "$@" > /tmp/why 2>&1; do
        [ "$(cut -d. -f1 /proc/uptime)" -lt $deadline ] || { cat /tmp/why; fail "$what"; }
        usleep 100000
    done
}
rpc() { ferry rpc -s /run/ferry-control/rpc.sock "$@"; }
of() { systemctl show -P "$2" "ferry-$1"; }
is() { [ "$($1)" = "$2" ]; }
moved() { [ "$(of dataplane MainPID)" != "$1" ] && [ "$(of dataplane MainPID)" != 0 ] && systemctl is-active --quiet ferry-dataplane; }

soon "the data plane is up" systemctl is-active ferry-dataplane
soon "the control plane is up" systemctl is-active ferry-controlplane
# As README says: the data plane is told whom to let in.
echo "FERRY_CONTROL_UID=$(of controlplane UID)" >> /etc/default/ferry
systemctl restart ferry-dataplane || fail restart
soon "the control plane reaches the data plane" rpc virtio_fs_get_devices
echo "the units run"
mkdir -p /export /mnt/ferry
for line in "fsdev_aio_create aio0 /export" "virtio_fs_transport_create -t VHOST_USER" "virtio_fs_transport_start -t VHOST_USER" \
    "virtio_fs_device_create --transport-name VHOST_USER --dev-name d0 --tag t --fsdev aio0 --num-request-queues 1 --queue-size 64" \
    "virtio_fs_device_start --dev-name d0"; do
    rpc $line || fail "$line"
done
ferry mount /run/ferry/vhost/d0.sock /mnt/ferry > /tmp/mount.log 2>&1 &
soon "it is mounted" grep -q " /mnt/ferry fuse" /proc/mounts
echo kept > /mnt/ferry/held
# Not this shell holds it: whoever ends or becomes another program closes what it has, which waits while nobody serves.
tail -f /dev/null 5< /mnt/ferry/held &
holder=$!
soon "it is held" test -e /proc/$holder/fd/5
rm /mnt/ferry/held
works() { echo "$1" > /mnt/ferry/written || fail "write after $1"; [ "$(cat /export/written)" = "$1" ] || fail "read after $1"; echo "the mount survives $1"; }
[ "$(of dataplane NFileDescriptorStore)" -gt 5 ] || fail "only $(of dataplane NFileDescriptorStore) descriptors are kept"
works nothing
pid=$(of dataplane MainPID); systemctl restart ferry-dataplane || fail restart; moved $pid || fail "no other process"; works restart
pid=$(of dataplane MainPID); kill -9 $pid; soon "it is started again" moved $pid; works kill
pid=$(of dataplane MainPID); kill -STOP $pid; soon "the watchdog ends it" moved $pid; works watchdog
systemctl stop ferry-dataplane; systemctl start ferry-dataplane ferry-controlplane || fail start; works "stop and start"
kill -9 "$(of dataplane MainPID)" "$(of controlplane MainPID)"; works "the end of both"
soon "the control plane answers again" rpc virtio_fs_get_devices
[ "$(cat /proc/$holder/fd/5)" = kept ] || fail "the file without a name has changed"
kill $holder; wait $holder 2> /dev/null
umount /mnt/ferry || fail umount
echo "all is well"
