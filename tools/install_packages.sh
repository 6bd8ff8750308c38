#!/bin/sh
# What parts of the project need of Debian: install_packages.sh softmetal|macos|arm64|ccache...
# Installed where this machine lets us, else named.
set -eu
packages="" tools=""
for part in "$@"; do
  case $part in
    softmetal)
      packages="$packages clang-19 libclang-rt-19-dev"
      tools="$tools ${SOFTMETAL_CLANG:-clang++-19}" ;;
    macos)
      packages="$packages clang-22 lld-22 llvm-22"
      tools="$tools clang++-22 ld64.lld-22 llvm-ar-22 llvm-nm-22 llvm-objdump-22" ;;
    arm64)
      # arm64 itself needs no cross compiler.
      if [ "$(uname -m)" != aarch64 ]; then
        packages="$packages g++-aarch64-linux-gnu qemu-user-static"
        tools="$tools aarch64-linux-gnu-g++ qemu-aarch64-static"
      fi ;;
    ccache) packages="$packages ccache" tools="$tools ccache" ;;
    *) echo "install_packages.sh: part is '$part', expected softmetal, macos, arm64 or ccache" >&2; exit 2 ;;
  esac
done
missing() {
  for tool in $tools; do command -v "$tool" >/dev/null 2>&1 || printf ' %s' "$tool"; done
}
if [ -n "$(missing)" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "apt-get install$packages"
  # shellcheck disable=SC2086
  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages) \
    >/dev/null 2>&1 || true
fi
if [ -n "$(missing)" ]; then
  echo "$*: missing$(missing); on Debian: apt-get install$packages" >&2
  exit 1
fi
