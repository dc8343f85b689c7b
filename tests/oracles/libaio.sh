#!/bin/sh
# Unpacks Debian's libaio into the folder that is named, where the system has none: the tests that offload to NVMe for
# real compile DeepSpeed's aio against it. It never fails, and takes a minute at most: those tests say what they miss.
folder=$1
[ -e /usr/include/libaio.h ] && exit 0
command -v apt-get >/dev/null && command -v dpkg >/dev/null || exit 0
mkdir -p "$folder" && cd "$folder" || exit 0

download() {
    library=$(apt-cache depends libaio-dev 2>/dev/null | sed -n 's/.*Depends: \(libaio1[a-z0-9]*\)$/\1/p' | head -n 1)
    timeout 20 apt-get -qq download libaio-dev "${library:-libaio1}" >/dev/null 2>&1
}

download || { timeout 20 apt-get -qq update >/dev/null 2>&1; download; }
for package in *.deb; do
    [ -e "$package" ] && dpkg -x "$package" .
done
exit 0
