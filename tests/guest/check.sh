#!/bin/sh
# The checks of a mounted virtio-fs tag, run inside the guest with nothing but busybox and the program `checks`.
#
#   check.sh CHECKS DIR [TAG]
#
# CHECKS is the program built from this directory, DIR the mount point. With a TAG the script mounts and unmounts it
# itself and ends with the checks of mounting again and of rebinding the driver; without one DIR is used as it is, which is
# how the checks themselves are proved on a local file system.
#
# Prints `ok N name`, `ok N name # skipped: why` or `not ok N name: why`, and at the
# end `N passed, N failed`. The files under DIR/kept stay for the host to compare.
CHECKS=$1 DIR=$2 TAG=$3
number=0 passed=0 failed=0 skipped=0
SCRATCH=$(mktemp -d) || exit 1

# check NAME FUNCTION [ARGS...]: the function returns 0 passed, 77 skipped, anything else failed; its output says why.
check() {
    name=$1
    shift
    number=$((number + 1))
    why=$("$@" 2>&1)
    case $? in
    0) passed=$((passed + 1)); echo "ok $number $name" ;;
    77) skipped=$((skipped + 1)); echo "ok $number $name # skipped: $why" ;;
    *) failed=$((failed + 1)); echo "not ok $number $name: $(echo "$why" | tr '\n' ' ')" ;;
    esac
}

finish() {
    rm -rf "$SCRATCH"
    [ $skipped = 0 ] || echo "$skipped skipped"
    echo "$passed passed, $failed failed"
    [ $failed = 0 ]
    exit
}

checksum() { sha256sum < "$1" | cut -d' ' -f1; }
forget_cached_pages() { sync; echo 3 > /proc/sys/vm/drop_caches 2>/dev/null || true; }

mount_tag() { mkdir -p "$DIR" && mount -t virtiofs "$TAG" "$DIR"; }

mount_wrong_tag() {
    mkdir -p "$SCRATCH/wrong"
    if mount -t virtiofs "$TAG-wrong" "$SCRATCH/wrong" 2>/dev/null; then
        umount "$SCRATCH/wrong"
        echo "a tag that no device has was mounted"
        return 1
    fi
}

read_back_64_mib() {
    dd if=/dev/urandom of="$SCRATCH/random" bs=1M count=4 2>/dev/null || return 1
    for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do cat "$SCRATCH/random"; done > "$DIR/kept/big" || return 1
    wrote=$(for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do cat "$SCRATCH/random"; done | sha256sum | cut -d' ' -f1)
    rm "$SCRATCH/random"
    forget_cached_pages
    [ "$(stat -c %s "$DIR/kept/big")" = 67108864 ] || { echo "the size is $(stat -c %s "$DIR/kept/big")"; return 1; }
    [ "$(checksum "$DIR/kept/big")" = "$wrote" ] || { echo "read back other bytes than were written"; return 1; }
    echo "$wrote" > "$DIR/kept/big.sha256"
}

program_runs() {
    cp "$CHECKS" "$DIR/kept/program" && chmod 755 "$DIR/kept/program" || return 1
    forget_cached_pages
    [ "$("$DIR/kept/program" hello)" = "hello from the mount" ] || { echo "the program did not run"; return 1; }
    chmod 644 "$DIR/kept/program"
    if "$DIR/kept/program" hello 2>/dev/null; then
        echo "a program without execute permission ran"
        return 1
    fi
}

script_runs() {
    printf '#!/bin/sh\necho "$1 and $0"\n' > "$DIR/kept/script" && chmod 755 "$DIR/kept/script" || return 1
    [ "$("$DIR/kept/script" here)" = "here and $DIR/kept/script" ]
}

make_tree() {
    mkdir -p "$1/a/b/c" "$1/empty" || return 1
    for i in 1 2 3 4 5 6 7 8 9 10; do
        echo "file $i" > "$1/a/file-$i" && cp "$1/a/file-$i" "$1/a/b/c/" || return 1
    done
    ln -s ../file-3 "$1/a/b/link" && ln "$1/a/file-1" "$1/a/b/hard" && chmod 640 "$1/a/file-2" && chmod 700 "$1/empty"
}

same_tree() {
    diff -r "$1" "$2" || return 1
    [ "$(cd "$1" && find . | sort | xargs stat -c '%n %a %u %g %F')" = "$(cd "$2" && find . | sort | xargs stat -c '%n %a %u %g %F')" ]
}

copy_a_tree() {
    make_tree "$DIR/tree" && cp -a "$DIR/tree" "$DIR/tree-copy" && same_tree "$DIR/tree" "$DIR/tree-copy" && rm -r "$DIR/tree-copy"
}

pack_a_tree() {
    mkdir -p "$DIR/unpacked" && tar -C "$DIR/tree" -cf "$DIR/tree.tar" . && tar -C "$DIR/unpacked" -xf "$DIR/tree.tar" || return 1
    same_tree "$DIR/tree" "$DIR/unpacked" && rm -r "$DIR/unpacked" "$DIR/tree.tar" "$DIR/tree"
}

redirect_and_append() {
    echo one > "$DIR/kept/lines" && echo two >> "$DIR/kept/lines" && echo three >> "$DIR/kept/lines" || return 1
    [ "$(cat "$DIR/kept/lines")" = "one
two
three" ]
}

# What the host looks at on the export afterwards.
leave_for_the_host() {
    echo owned > "$DIR/kept/owned" && chown 1234:4321 "$DIR/kept/owned" && chmod 2640 "$DIR/kept/owned" || return 1
    echo linked > "$DIR/kept/linked" && ln "$DIR/kept/linked" "$DIR/kept/linked-2" && ln "$DIR/kept/linked" "$DIR/kept/linked-3" || return 1
    ln -s big "$DIR/kept/link" && mkfifo -m 600 "$DIR/kept/fifo" || return 1
    touch -d '2001-02-03 04:05:06' "$DIR/kept/dated" && chmod 1777 "$DIR/kept/."
}

kept_is_there() {
    [ "$(checksum "$DIR/kept/big")" = "$(cat "$DIR/kept/big.sha256")" ] || { echo "the 64 MiB file changed"; return 1; }
    [ "$(stat -c '%u %g %a %h' "$DIR/kept/owned")" = "1234 4321 2640 1" ] || { echo "owner or mode changed"; return 1; }
    [ "$(stat -c %h "$DIR/kept/linked-2")" = 3 ] || { echo "the link count changed"; return 1; }
    [ "$(readlink "$DIR/kept/link")" = big ] || { echo "the symbolic link changed"; return 1; }
    [ "$(TZ=UTC0 stat -c %Y "$DIR/kept/dated")" = "$(cat "$SCRATCH/dated")" ] || { echo "the time changed"; return 1; }
}

mount_again() {
    umount "$DIR" || return 1
    [ ! -e "$DIR/kept" ] || { echo "still mounted"; return 1; }
    mount_tag && kept_is_there
}

mounts_in_a_row() {
    for i in 1 2 3 4 5; do
        umount "$DIR" && mount_tag && [ -f "$DIR/kept/owned" ] || { echo "failed in round $i"; return 1; }
    done
}

busy_unmount() {
    exec 5< "$DIR/kept/owned"
    if umount "$DIR" 2>/dev/null; then
        echo "unmounted while a file is open"
        return 1
    fi
    read -r word <&5
    exec 5<&-
    [ "$word" = owned ]
}

# rebind BUS DRIVER DEVICE
rebind() {
    umount "$DIR" || return 1
    echo "$3" > "/sys/bus/$1/drivers/$2/unbind" || return 1
    if mount -t virtiofs "$TAG" "$DIR" 2>/dev/null; then
        echo "mounted without a driver"
        return 1
    fi
    echo "$3" > "/sys/bus/$1/drivers/$2/bind" || return 1
    mount_tag && kept_is_there
}

if [ -n "$TAG" ]; then
    check "mount" mount_tag
    [ $failed = 0 ] || finish
    check "mount of a wrong tag" mount_wrong_tag
fi
rm -rf "$DIR/kept" && mkdir "$DIR/kept"
check "64 MiB written and read back" read_back_64_mib
"$CHECKS" list > "$SCRATCH/names"
while read -r line; do
    # Answers tell nothing by themselves: tests/posix compares them.
    case $line in answers*) continue ;; esac
    check "$line" "$CHECKS" run "$line" "$DIR"
done < "$SCRATCH/names"
check "a program runs from the mount" program_runs
check "a script runs from the mount" script_runs
check "redirect and append" redirect_and_append
check "copy a tree" copy_a_tree
check "pack and unpack a tree" pack_a_tree
check "leave files for the host" leave_for_the_host
stat -c %Y "$DIR/kept/dated" > "$SCRATCH/dated"
check "what was left is there" kept_is_there
if [ -n "$TAG" ]; then
    check "unmount is refused while a file is open" busy_unmount
    check "unmount and mount again" mount_again
    check "five mounts in a row" mounts_in_a_row
    for path in /sys/bus/virtio/drivers/virtiofs/virtio*; do
        [ -e "$path" ] || continue
        device=${path##*/}
        # what a vhost-user connection of User-Mode-Linux cannot do: there is no bus below virtio's to go back to
        [ -e "$(dirname "$(readlink -f "$path")")/vendor" ] || continue
        check "unbind and rebind the virtiofs driver" rebind virtio virtiofs "$device"
        pci=$(basename "$(dirname "$(readlink -f "$path")")")
        check "unbind and rebind the PCI driver" rebind pci virtio-pci "$pci"
        break
    done
    umount "$DIR"
fi
finish
