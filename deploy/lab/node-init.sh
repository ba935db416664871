#!/bin/sh
# First process of a lab node. The caller has made the network, mount, UTS and process-id namespaces;
# this script furnishes them and then waits, so that the node outlives its engine like a machine does.
# Killing it ends everything that runs in the node.
#   NODE   name                     DIR   the node's folder in the lab's state
#   DATA   its /var/lib/docker      ROOT  a Debian root to run in, empty for the machine's own
#   SEED   images to begin with (seed.py), empty for none
set -eu

# /proc is still the outer one here: this is the process id as the lab sees it.
read -r pid _ </proc/self/stat
mount --make-rprivate /
hostname "$NODE"

# Writable layers that vanish with the node: the engine writes /etc/docker/key.json, for example.
mkdir -p "$DIR/layer" "$DIR/engine" "$DIR/run"
mount -t tmpfs -o mode=755 tmpfs "$DIR/layer"
mkdir -p "$DIR/layer/upper" "$DIR/layer/work" "$DIR/layer/root"
layers() { echo "lowerdir=$1,upperdir=$DIR/layer/upper,workdir=$DIR/layer/work"; }
if [ -n "$ROOT" ]; then
    new=$DIR/layer/root
    mount -t overlay -o "$(layers "$ROOT")" overlay "$new"
    mount --rbind /dev "$new/dev"
    mount --rbind /sys "$new/sys"
    mkdir -p "$new/lib/modules"
    [ ! -d /lib/modules ] || mount --rbind -o ro /lib/modules "$new/lib/modules"  # an engine loads modules
else
    new=
    mount -t overlay -o "$(layers /etc)" overlay /etc
fi
rm -f "$new/etc/docker/daemon.json"  # the machine's own settings are not the node's
# A name server that refuses at once: else every task waits 20 s for a public registry's name.
rm -f "$new/etc/resolv.conf"
echo "nameserver 127.0.0.1" >"$new/etc/resolv.conf"
echo "$NODE" >"$new/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$NODE" >"$new/etc/hosts"

mkdir -p "$new/var/lib/docker"
mount --bind "$DATA" "$new/var/lib/docker"
if [ -n "$SEED" ]; then
    cp -a "$SEED/engine/." "$DATA/"
    for layer in "$SEED"/layers/*; do
        mount --bind -o ro "$layer" "$new/var/lib/docker/overlay2/${layer##*/}/diff"
    done
fi

# /run is built aside and moved into place, since the lab's own folder lies below the old /run.
mount -t tmpfs -o mode=755 tmpfs "$DIR/run"
mkdir -p "$DIR/run/lab" "$DIR/run/lock"
mount --bind "$DIR/engine" "$DIR/run/lab"
mount -n --move "$DIR/run" "$new/run"
mount -t proc proc "$new/proc"

if [ -n "$new" ]; then
    # A plain chroot is not enough: runc remounts / and needs it to be a mount's root.
    cd "$new"
    pivot_root . .
    umount -l .
    cd /
fi
mount --make-rshared /  # as systemd does: services bind parts of /run with rslave

echo "$pid" >/run/lab/init.pid.new
mv /run/lab/init.pid.new /run/lab/init.pid  # appears complete, and only when the node is ready
exec tini -- sleep infinity
