#!/bin/sh
# The compiler that the software Metal device needs for its tests: installed where this machine lets
# us, else named. Never fails: the tests that need it are skipped, and say so.
[ "$(uname)" = Linux ] || exit 0
packages="clang-19 libclang-rt-19-dev"
if command -v "${SOFTMETAL_CLANG:-clang++-19}" >/dev/null 2>&1; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "softmetal: apt-get install $packages (SOFTMETAL=off goes without)"
  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages) >/dev/null 2>&1
fi
if ! command -v clang++-19 >/dev/null 2>&1; then
  echo "softmetal: no clang++-19, so the tests of the software Metal device are skipped; on Debian: apt install $packages"
fi
exit 0
