#!/bin/sh
# The first process of the virtual machine. The host speaks to it over ttyS1, a line at a time:
# each is run by this shell, and its output and "=done STATUS" come back.
export PATH=/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /run
for module in /modules/*; do
    # Compressed ones are unpacked first.
    case $module in
        *.xz) unxz -c "$module" > /run/module && module=/run/module ;;
    esac
    insmod "$module" || echo "init: $module cannot be loaded"
done
ip link set lo up
ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0
# The daemon's state directory is on the first namespace, which may take a moment to appear.
for second in 1 2 3 4 5 6 7 8 9 10; do
    [ -b /dev/nvme0n1 ] && break
    sleep 1
done
mkdir -p /state
mount -t ext4 /dev/nvme0n1 /state || echo "init: no state"
exec < /dev/ttyS1 > /dev/ttyS1 2>&1
stty raw -echo
echo "=ready $(uname -r)"
while read -r line; do
    eval "$line"
    echo "=done $?"
done
