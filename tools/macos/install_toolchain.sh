#!/bin/sh
# The compiler and linker that build for macOS: installed where this machine lets us, else named.
set -eu
packages="clang-22 lld-22 llvm-22"
present() {
  for tool in clang++-22 ld64.lld-22 llvm-ar-22 llvm-nm-22 llvm-objdump-22; do
    command -v "$tool" >/dev/null 2>&1 || return 1
  done
}
if present; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "wheel-macos: installing $packages"
  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages) \
    >/dev/null 2>&1 || true
fi
if ! present; then
  echo "wheel-macos: no LLVM 22; on Debian: apt-get install $packages" >&2
  exit 1
fi
