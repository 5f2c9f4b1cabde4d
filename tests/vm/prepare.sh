#!/usr/bin/env bash
# Makes what the virtual machine of this test boots: a Debian kernel and an initramfs with the
# daemon, a busybox and the tools for the kernel's own NBD client. Touches nothing outside FOLDER.
#
#   prepare.sh FOLDER PROGRAM...
#
# Needs from Debian: busybox-static, e2fsprogs, kmod, nbd-client, and a mirror for the kernel's
# package; or HN4_VM_KERNEL, a kernel's file, and HN4_VM_MODULES, the folder of its modules.dep.
# The kernel is kept in FOLDER, the initramfs is made anew.
set -euo pipefail
folder=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:/usr/sbin:/sbin

if [ -n "${HN4_VM_KERNEL:-}" ]; then
    kernel=$HN4_VM_KERNEL modules=$HN4_VM_MODULES
else
    if [ ! -e "$folder/kernel/ok" ]; then
        rm -rf "$folder/kernel" && mkdir -p "$folder/kernel"
        package=$(apt-cache depends linux-image-cloud-amd64 |
            sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
        (cd "$folder/kernel" && apt-get download -q "$package")
        dpkg-deb -x "$folder"/kernel/*.deb "$folder/kernel"
        rm "$folder"/kernel/*.deb
        depmod -b "$folder/kernel" "$(basename "$folder"/kernel/lib/modules/*)"
        touch "$folder/kernel/ok"
    fi
    kernel=$(echo "$folder"/kernel/boot/vmlinuz-*)
    modules=$(echo "$folder"/kernel/lib/modules/*)
fi
ln -sfn "$kernel" "$folder/vmlinuz"

root=$folder/root
rm -rf "$root"
mkdir -p "$root"/{bin,dev,etc,lib,lib64,mnt,proc,run,sys,tmp,modules}
cp "$(command -v busybox)" "$root/bin/busybox"
"$root/bin/busybox" --install -s "$root/bin"
# Links that point into this folder's name would be wrong inside.
find "$root/bin" -type l -exec ln -sfn busybox {} \;
cp "$here/init.sh" "$root/init"
chmod +x "$root/init"

# A program and the libraries that it says it needs, where it looks for them.
add() {
    local program=$1 name=$2 library
    rm -f "$root/bin/$name"
    cp "$program" "$root/bin/$name"
    for library in $(ldd "$program" | grep -o '/[^ ]*'); do
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done
}
for program in "$@"; do
    add "$program" "$(basename "$program")"
    strip "$root/bin/$(basename "$program")"
done
for name in mke2fs e2fsck nbd-client; do
    add "$(command -v "$name")" "$name"
done

# Modules in the order in which they can be loaded. What is built in needs none.
number=100
for module in virtio_pci virtio_net virtio_scsi sd_mod nfit nd_pmem nbd; do
    depends=$(modprobe -d "${modules%/lib/modules/*}" -S "$(basename "$modules")" \
        --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p')
    for file in $depends; do
        if ! ls "$root"/modules/*-"$(basename "$file")" > /dev/null 2>&1; then
            cp "$file" "$root/modules/$number-$(basename "$file")"
            number=$((number + 1))
        fi
    done
done
(cd "$root" && find . | busybox cpio -o -H newc 2> /dev/null) > "$folder/initramfs"
