#!/bin/sh
# Installs Debian's Chromium where no browser is there and this may be done: the report page is tested in it. It never
# fails, and takes three minutes at most: without it those tests say what they miss.
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || exit 0
export DEBIAN_FRONTEND=noninteractive

install() {
    timeout 120 apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core >/dev/null 2>&1
}

install || { timeout 30 apt-get -qq update >/dev/null 2>&1 && install; }
exit 0
