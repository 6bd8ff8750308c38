#!/bin/sh
# The cross compiler and the emulator: installed where this machine lets us, else named. On arm64
# itself none is needed.
set -eu
[ "$(uname -m)" != aarch64 ] || exit 0
packages="g++-aarch64-linux-gnu qemu-user-static"
present() {
  for tool in aarch64-linux-gnu-g++ qemu-aarch64-static; do
    command -v "$tool" >/dev/null 2>&1 || return 1
  done
}
if present; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "arm64: installing $packages"
  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages) \
    >/dev/null 2>&1 || true
fi
if ! present; then
  echo "arm64: no cross compiler; on Debian: apt-get install $packages" >&2
  exit 1
fi
